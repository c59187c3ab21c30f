"""``kdcache export``: every form is the run's student, loads from its files, and appears whole or not at all."""

import json
import os
import shutil
import stat
import sys

import numpy as np
import pytest
import torch
import transformers
import yaml
from safetensors import SafetensorError
from typer.testing import CliRunner

import kdcache.cli  # noqa: F401 - registers the commands
from kdcache.commands.app import app
from kdcache.errors import CacheError, ModelError, StorageError, TrainingError, TransferError
from kdcache.evaluate.saved_run import Students, open_saved_run
from kdcache.export import forms, run
from kdcache.export.card import licence_of
from kdcache.export.formats import FORMS, chosen_forms, refuse_unpublished_base
from kdcache.export.publish import publish
from kdcache.export.run import export
from kdcache.models import load_model
from kdcache.progress import Silent
from kdcache.recipe_student import StudentSection
from tests.cache.hub_server import Repository
from tests.export.model_hub import ModelHub

GGUF = [name for name, form in FORMS.items() if form.gguf]


class Told(Silent):
    """Remembers messages and warnings."""

    def __init__(self):
        self.messages = []

    def message(self, text):
        self.messages.append(text)

    warning = message


@pytest.fixture(scope="module")
def everything(qlora_run, tmp_path_factory):
    """All forms of one run."""
    mask = os.umask(0o022)
    try:
        return export(
            qlora_run, tmp_path_factory.mktemp("all") / "out", list(FORMS), base_model="user/base", licence="mit"
        )
    finally:
        os.umask(mask)


@pytest.fixture
def copied(qlora_run, tmp_path):
    """A copy of the run, to be changed."""
    return shutil.copytree(qlora_run, tmp_path / "run")


@pytest.fixture
def unloaded(monkeypatch):
    """No model may be loaded."""
    monkeypatch.setattr(forms, "load_student", lambda *a: pytest.fail("a model was loaded"))
    monkeypatch.setattr(forms, "load_model", lambda *a, **k: pytest.fail("a model was loaded"))


def changed(folder, name, change):
    values = json.loads((folder / name).read_text())
    change(values)
    (folder / name).write_text(json.dumps(values))


def test_every_form_is_the_student_of_the_run(everything):
    rows = everything.rows
    assert list(rows) == ["run", *FORMS]
    before = rows["run"]
    for name in FORMS:
        row = rows[name]
        assert row["tokens"] == row["compared_positions"] == before["tokens"]
        assert row["bytes"] > 0
        assert row["tokens_per_second"] > 0
        assert row["kl_to_run"] < {"nf4": 0.05, "gguf-q4_0": 0.05}.get(name, 2e-3)
        assert row["perplexity"] == pytest.approx(before["perplexity"], rel=0.05)
    # The adapter on its base is the run itself.
    assert rows["adapter"]["kl_to_run"] == pytest.approx(0, abs=1e-9)
    assert rows["adapter"]["top_1"] == 1
    assert rows["adapter"]["loss"] == before["loss"]
    assert rows["gguf-f16"]["kl_to_run"] < rows["gguf-q4_0"]["kl_to_run"]
    sizes = [rows[name]["bytes"] for name in ("gguf-f16", "gguf-q8_0", "gguf-q4_0")]
    assert sizes == sorted(sizes, reverse=True)
    assert rows["merged"]["bytes"] > rows["int8"]["bytes"] > rows["nf4"]["bytes"]
    for name in GGUF:
        assert rows[name]["read_back"]["relative_error"] < 0.1


def test_the_comparison_is_that_of_whole_distributions(everything, qlora_run):
    saved = open_saved_run(qlora_run)
    merged = load_model(str(everything.folder / "merged"), device="cpu")
    kl, agreed, ce, count = 0.0, 0, 0.0, 0
    with Students().after(saved) as model, torch.inference_mode():
        model.eval()
        for sequence in saved.validation:
            ids = torch.from_numpy(sequence.token_ids.astype(np.int64))[None]
            places = np.flatnonzero(sequence.targets) - 1
            # Training was in float32, so no autocast; the merged model is bfloat16.
            p, q = (m(input_ids=ids).logits[0, places].double().log_softmax(-1) for m in (model, merged))
            kl += float((p.exp() * (p - q)).sum())
            agreed += int((p.argmax(-1) == q.argmax(-1)).sum())
            ce -= float(q[torch.arange(len(places)), ids[0, places + 1]].sum())
            count += len(places)
    row = everything.rows["merged"]
    assert row["compared_positions"] == count
    # Logits of a bfloat16 head are rounded; those that were compared are float32.
    assert row["kl_to_run"] == pytest.approx(kl / count, abs=2e-4)
    assert row["top_1"] == pytest.approx(agreed / count, abs=0.02)
    assert row["loss"] == pytest.approx(ce / count, abs=2e-3)


def test_a_form_that_is_another_model_shows(everything, qlora_run):
    from kdcache.export.compare import compared, reference_of

    saved = open_saved_run(qlora_run)
    reference = reference_of(saved, Silent())
    base = load_model(saved.student.model, device="cpu")
    row = compared(saved, reference, base, "base", Silent())
    assert row["kl_to_run"] > 20 * everything.rows["merged"]["kl_to_run"]
    assert row["top_1"] < 0.9


def test_what_the_card_says_to_do_loads_each_form(everything):
    out = str(everything.folder)
    merged = transformers.AutoModelForCausalLM.from_pretrained(out, subfolder="merged", dtype="auto")
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    assert merged.config.use_cache
    tokenizer = transformers.AutoTokenizer.from_pretrained(out, subfolder="merged")
    assert tokenizer.chat_template
    for name, kind in (("nf4", "Linear4bit"), ("int8", "Linear8bitLt")):
        packed = transformers.AutoModelForCausalLM.from_pretrained(out, subfolder=name, dtype="auto")
        assert type(packed.model.layers[0].mlp.up_proj).__name__ == kind
    config = json.loads((everything.folder / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "user/base"


def test_files_are_for_all_to_read_and_nothing_is_left_over(everything):
    out = everything.folder
    files = [p for p in out.rglob("*") if p.is_file()]
    assert {stat.S_IMODE(p.stat().st_mode) for p in files} == {0o644}
    assert {p.name for p in out.iterdir()} == {"README.md", "export.json", *FORMS}
    assert {p.name for p in out.parent.iterdir()} == {"out"}
    for name in GGUF:
        assert [p.name for p in (out / name).iterdir()] == [everything.rows[name]["file"]]


def test_the_card_holds_names_numbers_and_ways_to_load(everything, qlora_run):
    text = (everything.folder / "README.md").read_text()
    fields = yaml.safe_load(text.split("---\n")[1])
    assert fields["base_model"] == "user/base"
    assert fields["license"] == "mit"
    assert fields["library_name"] == "transformers"
    assert {"kdcache", "knowledge-distillation", "gguf"} <= set(fields["tags"])
    scores = json.loads((qlora_run / "run.json").read_text())["scores"]
    for name, score in scores.items():
        assert f"| {name} | {score['loss']:.4f} | {score['perplexity']:.3f} |" in text
    for name in FORMS:
        assert f"**{name}**" in text
        assert f"| {name} | {everything.rows[name]['perplexity']:.3f} |" in text
    assert "llama-cli -m gguf-q8_0/" in text
    assert str(qlora_run) not in text


def test_the_licence_of_a_base_is_taken_from_its_card(tmp_path):
    assert licence_of(str(tmp_path)) is None
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Base\n")
    assert licence_of(str(tmp_path)) == "apache-2.0"
    (tmp_path / "README.md").write_text("---\nlicense: [a, b\n---\n")
    assert licence_of(str(tmp_path)) is None


def test_one_form_lies_in_the_folder_itself_and_the_same_again_is_there_already(full_run, tmp_path, monkeypatch):
    out = tmp_path / "out"
    made = export(full_run, out, ["merged"])
    assert made.rows["merged"]["kl_to_run"] < 1e-3
    assert {"config.json", "model.safetensors", "README.md", "export.json"} <= {p.name for p in out.iterdir()}
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    # Tied heads stay tied.
    assert model.lm_head.weight is model.model.embed_tokens.weight
    monkeypatch.setattr(run, "Maker", lambda *a: pytest.fail("made again"))
    assert export(full_run, out, ["merged"]).rows == made.rows
    with pytest.raises(StorageError, match="holds another export"):
        export(full_run, out, ["nf4"])
    monkeypatch.undo()
    assert export(full_run, out, ["gguf-f16"], overwrite=True).rows["gguf-f16"]["kl_to_run"] < 1e-3
    assert {p.suffix for p in out.iterdir()} == {".gguf", ".md", ".json"}
    assert {p.name for p in tmp_path.iterdir()} == {"out"}


def test_without_the_cache_the_comparison_is_left_out_by_name_alone(copied, tmp_path, shared_cache):
    changed(copied, "run.json", lambda r: r["recipe"]["cache"].update(directory=str(tmp_path / "gone")))
    with pytest.raises(CacheError, match=r"--cache DIRECTORY_OR_URL; or leave the comparison out with --no-compare"):
        export(copied, tmp_path / "out", ["adapter"])
    told = Told()
    made = export(copied, tmp_path / "out", ["adapter"], compare=False, progress=told)
    assert "kl_to_run" not in made.rows["adapter"]
    assert any("not compared" in text for text in told.messages)
    assert "not compared" in (tmp_path / "out" / "README.md").read_text()
    there = export(copied, tmp_path / "other", ["adapter"], cache=str(shared_cache))
    assert there.rows["adapter"]["top_1"] == 1


@pytest.mark.parametrize(
    ("prepare", "names", "error", "match"),
    [
        (lambda r: None, ["merged", "gguf-q5"], ModelError, "expected the forms merged, .*, found gguf-q5"),
        (lambda r: None, [], ModelError, "found none"),
        (lambda r: (r / "run.json").unlink(), ["merged"], TrainingError, "no finished run"),
        (lambda r: shutil.rmtree(r / "model"), ["merged"], ModelError, "no saved student"),
        (lambda r: changed(r, "run.json", lambda v: v["recipe"]["student"].update(model="/no/such/base")), ["merged"], ModelError,
         "the model folder /no/such/base does not exist"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_before_a_model_is_loaded(copied, unloaded, tmp_path, prepare, names, error, match):
    prepare(copied)
    with pytest.raises(error, match=match):
        export(copied, tmp_path / "out", names)
    assert not list(tmp_path.glob("out*"))


def test_an_architecture_without_gguf_is_refused_before_a_model_is_loaded(copied, unloaded, models, tmp_path):
    base = shutil.copytree(models / "student", tmp_path / "base")
    changed(base, "config.json", lambda c: c.update(model_type="gpt_neox", architectures=["GPTNeoXForCausalLM"]))
    changed(copied, "run.json", lambda r: r["recipe"]["student"].update(model=str(base)))
    with pytest.raises(ModelError, match="of type gpt_neox; GGUF is written for"):
        export(copied, tmp_path / "out", ["gguf-q8_0"])


def test_without_the_package_gguf_its_extra_is_named(qlora_run, unloaded, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModelError, match=r"pip install 'kdcache\[gguf\]'"):
        export(qlora_run, tmp_path / "out", ["gguf-f16"])


def test_an_unknown_rule_for_words_is_told(copied, tmp_path):
    expression = {}

    def own(state):
        expression.update(state["pre_tokenizer"]["pretokenizers"][0]["pattern"])
        state["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\w+|\W"

    changed(copied / "model", "tokenizer.json", own)
    # A class of its own would put its own rule there again.
    changed(copied / "model", "tokenizer_config.json", lambda c: c.update(tokenizer_class="PreTrainedTokenizerFast"))
    told = Told()
    export(copied, tmp_path / "out", ["gguf-q8_0"], compare=False, progress=told)
    assert any("names its default one" in text for text in told.messages)
    assert "takes its default one" in (tmp_path / "out" / "README.md").read_text()


def test_students_without_a_base_to_name_have_no_adapter_to_export(full_run, tmp_path):
    with pytest.raises(ModelError, match="trained every weight"):
        export(full_run, tmp_path / "out", ["adapter"])
    made = StudentSection(model="base", init={"method": "drop_layers", "every": 2})
    with pytest.raises(ModelError, match=r"made by student\.init"):
        refuse_unpublished_base(chosen_forms(["adapter"], tmp_path, made), tmp_path, made)
    with pytest.raises(ModelError, match="expected --base-model USER/NAME"):
        export(full_run, tmp_path / "out", ["merged"], base_model="no id")


def test_other_folders_are_not_touched(qlora_run, unloaded, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("keep")
    (tmp_path / "file").write_text("")
    (tmp_path / "new.partial").mkdir()
    (tmp_path / "new.partial" / "notes").write_text("keep")
    for out, overwrite, match in (
        ("mine", False, "holds something that is no export"),
        ("mine", True, "holds something that is no export"),
        ("file", True, "holds something that is no export"),
        ("file/out", False, "cannot write beside"),
        ("new", False, "no stopped export"),
    ):
        with pytest.raises(StorageError, match=match):
            export(qlora_run, tmp_path / out, ["adapter"], overwrite=overwrite)
    assert (tmp_path / "mine" / "notes").read_text() == (tmp_path / "new.partial" / "notes").read_text() == "keep"


@pytest.mark.parametrize("error", [SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), OSError(28, "No space left on device")])  # fmt: skip
def test_a_full_disk_is_one_error_and_leaves_nothing(qlora_run, tmp_path, monkeypatch, error):
    def full(*arguments, **options):
        raise error

    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", full)
    with pytest.raises(StorageError, match="No space left on device"):
        export(qlora_run, tmp_path / "out", ["merged"], compare=False)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_too_small_is_seen_before(qlora_run, unloaded, tmp_path, monkeypatch):
    changed_usage = shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: changed_usage)
    with pytest.raises(StorageError):
        export(qlora_run, tmp_path / "out", ["merged"], compare=False)
    assert not list(tmp_path.iterdir())


def test_a_stopped_export_is_gone_on_with(qlora_run, tmp_path, monkeypatch):
    def stop(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(forms, "write_gguf", stop)
    with pytest.raises(KeyboardInterrupt):
        export(qlora_run, tmp_path / "out", ["merged", "gguf-f16"], compare=False)
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    monkeypatch.setattr(forms, "load_student", lambda *a: pytest.fail("merged again"))
    made = export(qlora_run, tmp_path / "out", ["merged", "gguf-f16"], compare=False)
    assert {p.name for p in tmp_path.iterdir()} == {"out"}
    assert set(made.rows) == {"merged", "gguf-f16"}
    # What a stopped export of something else left is not taken for it.
    monkeypatch.undo()
    monkeypatch.setattr(forms, "write_gguf", stop)
    with pytest.raises(KeyboardInterrupt):
        export(qlora_run, tmp_path / "two", ["gguf-f16"], compare=False)
    monkeypatch.undo()
    assert set(export(qlora_run, tmp_path / "two", ["adapter"], compare=False).rows) == {"adapter"}
    assert {p.name for p in tmp_path.iterdir()} == {"out", "two"}


@pytest.fixture
def hub(monkeypatch):
    """A Hub on loopback that this process takes for the real one."""
    from huggingface_hub import constants

    with ModelHub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
        monkeypatch.setenv("HF_TOKEN", "hf_sample")
        yield server
        assert server.unknown == []
        assert server.tokens <= {"Bearer hf_sample"}


# huggingface_hub's own way to send bytes.
@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
def test_the_command_prints_the_table_and_pushes_one_commit(qlora_run, hub, tmp_path):
    out = tmp_path / "out"

    def command(repository, *options):
        arguments = ["export", qlora_run, out, "--to", "adapter,gguf-q8_0", "--push", repository, *options]
        return CliRunner().invoke(app, [str(a) for a in arguments])

    assert isinstance(command("no/such/id").exception, TransferError)
    assert not out.exists()
    hub.refuse = lambda method, path: 403 if path.endswith("/create") else None
    failed = command("user/name")
    assert isinstance(failed.exception, TransferError)
    assert "refuses access" in str(failed.exception)
    # Nothing is lost: the export is there, and the same command goes on.
    assert (out / "export.json").exists()
    hub.refuse = lambda method, path: None
    done = command("user/name")
    assert done.exit_code == 0, done.output
    assert "holds this export, finished" in done.output
    assert "KL to the run" in done.output
    repository = hub.repositories["user/name"]
    assert repository.private
    assert len(repository.commits) == 2
    files = {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert {n: d for n, d in repository.commits[1][1].items() if n != ".gitattributes"} == files
    # Somebody's own model is not written over, unless that is said.
    other = hub.repositories["user/other"] = Repository(private=False)
    other.add({".gitattributes": b"", "pytorch_model.bin": b"mine"}, "mine")
    failed = command("user/other")
    assert "holds something else (pytorch_model.bin)" in str(failed.exception)
    assert len(other.commits) == 2
    publish(out, "user/other", overwrite=True)
    assert "pytorch_model.bin" not in other.commits[2][1]
    assert files.items() <= other.commits[2][1].items()
