"""``bench-inference``: the forms of a student are the same student, figures are of what they say, failures are rows."""

import copy
import hashlib
import json
import re
import sys

import pytest
import torch

from kdcache.errors import ModelError, TrainingError
from kdcache.evaluate import inference, inference_worker
from kdcache.evaluate.inference import FIGURES, InferenceBench, Workload, students
from kdcache.models import load_adapter, load_model
from kdcache.progress import Silent
from kdcache.recipe import parse_recipe
from kdcache.student.distill import distill

SMALL = Workload(batch_size=2, prompt_tokens=5, new_tokens=3, repeats=2)
FORMS = ["merged, bfloat16", "merged, int8", "merged, nf4"]


class Told(Silent):
    """Remembers messages."""

    def __init__(self):
        self.messages = []

    def message(self, text):
        self.messages.append(text)


@pytest.fixture(scope="module")
def run(base_values, shared_cache, tmp_path_factory):
    """A QLoRA student whose adapter has learnt something."""
    values = copy.deepcopy(base_values)
    values["output"] = str(tmp_path_factory.mktemp("quantised") / "student")
    values["cache"]["directory"] = str(shared_cache)
    values["student"] |= {"quantization": "nf4", "dtype": "bfloat16"}
    values["training"] |= {"max_steps": 4, "learning_rate": 5e-2}
    return distill(parse_recipe(values)).output


@pytest.fixture
def here(monkeypatch, tmp_path):
    """Workers in this process, which take no time to start."""

    def ask(self, request):
        asked, answer = tmp_path / "request.json", tmp_path / "answer.json"
        asked.write_text(json.dumps(request))
        inference_worker.main(asked, answer)
        return json.loads(answer.read_text())

    monkeypatch.setattr(InferenceBench, "_ask", ask)


@pytest.fixture
def elsewhere(run, tmp_path):
    """A copy of the run's record and student, to be changed."""
    import shutil

    return shutil.copytree(run, tmp_path / "copy")


def changed(run, change):
    record = json.loads((run / "run.json").read_text())
    change(record["recipe"])
    (run / "run.json").write_text(json.dumps(record))
    return run


def test_every_form_of_a_student_is_measured_and_written_down(run, here):
    values = InferenceBench(SMALL).run(run)
    assert json.loads((run / "inference.json").read_text()) == values
    assert values["format"] == "kdcache-inference"
    assert values["run_sha256"] == hashlib.sha256((run / "run.json").read_bytes()).hexdigest()
    assert [values[k] for k in ("batch_size", "prompt_tokens", "new_tokens", "repeats")] == [2, 5, 3, 2]
    rows = {row["model"]: row for row in values["rows"]}
    assert list(rows) == ["teacher, float32", "student, nf4 + adapter", *FORMS]
    for row in rows.values():
        assert row["error"] is None
        assert set(FIGURES) <= row.keys()
        for key in ("tokens_per_second", "time_to_first_token"):
            assert 0 < row[f"{key}_min"] <= row[key] <= row[f"{key}_max"]
        assert row["memory_bytes"] >= row["libraries_bytes"] > 0
        assert row["memory_of"] == "process"
    sizes = [rows[name]["disk_bytes"] for name in FORMS]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 3
    # The base in 4 bits lies on disk with the adapter beside it, as it was loaded and not as it was prepared for training.
    adapter = sum((run / "model" / n).stat().st_size for n in ("adapter_model.safetensors", "adapter_config.json"))
    assert rows["student, nf4 + adapter"]["disk_bytes"] == pytest.approx(sizes[2] + adapter, rel=0.03)


def test_the_merged_student_is_the_student_with_its_adapter(run, tmp_path):
    recipe = parse_recipe(json.loads((run / "run.json").read_text())["recipe"])
    load = recipe.student.model_dump(include={"model", "revision", "quantization", "dtype", "device", "attention"})
    inference_worker.merge({"load": load, "adapter": str(run / "model"), "folder": str(tmp_path / "merged")})
    ids = torch.arange(5, 45)[None]
    adapted = load_adapter(load_model(**load), str(run / "model"), quantized=True).eval()
    with torch.inference_mode():
        wanted = adapted(input_ids=ids).logits.log_softmax(-1)
        found = load_model(str(tmp_path / "merged"), device="cpu")(input_ids=ids).logits.float().log_softmax(-1)
        with adapted.disable_adapter():
            base = adapted(input_ids=ids).logits.log_softmax(-1)

    def kl(other):
        return float((wanted.exp() * (wanted - other)).sum(-1).mean())

    # What is left is rounding to bfloat16.
    assert kl(found) < 1e-3 < 0.02 < kl(base)


def test_generation_goes_on_to_the_last_token_and_reads_the_prompt_once(run, monkeypatch):
    recipe = parse_recipe(json.loads((run / "run.json").read_text())["recipe"])
    model = load_model(recipe.student.model, device="cpu")
    # Whatever comes first would end a generation that minds it.
    model.generation_config.eos_token_id = list(range(model.config.vocab_size))
    lengths = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    request = {"batch_size": 2, "prompt_tokens": 5, "new_tokens": 3, "repeats": 1, "precision": None}
    figures = inference_worker.speed(model, request)
    # A warm-up and a repeat, each one first token and one whole generation.
    assert lengths == 2 * [(2, 5), (2, 5), (2, 1), (2, 1)]
    assert figures["tokens_per_second"] < 6 / figures["time_to_first_token"]


def test_a_form_that_fails_is_a_row_and_not_the_end(run, here, monkeypatch):
    def load(model, **options):
        if options["quantization"] == "int8":
            raise ModelError("no 8 bits here")
        return load_model(model, **options)

    monkeypatch.setattr(inference_worker, "load_model", load)
    rows = {row["model"]: row for row in InferenceBench(SMALL).run(run)["rows"]}
    assert rows["merged, int8"] == {
        "model": "merged, int8",
        **dict.fromkeys(FIGURES),
        "error": "ModelError: no 8 bits here",
    }
    assert [name for name, row in rows.items() if row["error"]] == ["merged, int8"]


def test_what_cannot_be_merged_is_three_rows(run, here, monkeypatch):
    def merge(request):
        raise RuntimeError("cannot")

    monkeypatch.setattr(inference_worker, "merge", merge)
    rows = InferenceBench(SMALL).run(run)["rows"]
    assert {row["model"]: row["error"] for row in rows if row["error"]} == dict.fromkeys(
        FORMS, "merging failed: RuntimeError: cannot"
    )


def test_a_process_of_its_own_answers_or_its_end_is_told(run, monkeypatch):
    recipe = parse_recipe(json.loads((run / "run.json").read_text())["recipe"])
    bench = InferenceBench(SMALL)
    variant = students(recipe.student, run / "model", "bf16")[0]
    row = bench._row(variant, run, None)
    assert row["error"] is None
    assert row["tokens_per_second"] > 0
    # Known from now on.
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert bench._row(variant, run, None) == row
    assert InferenceBench(SMALL)._row(variant, run, None)["error"] == "its process ended with 1, without a word"


def test_a_fully_trained_student_is_measured_as_it_was_saved():
    student = parse_recipe({
        "output": "run", "cache": {"directory": "cache"},
        "student": {"model": "base", "quantization": "none", "dtype": "float32", "lora": None},
    }).student  # fmt: skip
    found = students(student, inference.Path("run/model"), "bf16")
    assert [v.name for v in found] == ["student, float32", "student, int8", "student, nf4"]
    assert {v.load["model"] for v in found} == {"run/model"}
    assert [v.load["quantization"] for v in found] == ["none", "int8", "nf4"]
    assert not any(v.merged or v.adapter for v in found)


@pytest.mark.parametrize(
    "change", [lambda r: r.update(teacher=None), lambda r: r["teacher"].update(model="/no/such/teacher")]
)
def test_an_absent_teacher_is_left_out_with_a_word_and_can_be_named(elsewhere, change, models):
    told = Told()
    recipe = InferenceBench(SMALL).check(changed(elsewhere, change))
    assert InferenceBench(SMALL, progress=told)._teachers(recipe) == []
    assert len(told.messages) == 1
    assert "--teacher" in told.messages[0]
    [named] = InferenceBench(SMALL, teacher=str(models / "teacher"))._teachers(recipe)
    assert named.load["model"] == str(models / "teacher")


def test_what_cannot_be_measured_is_refused_before_a_model_is_loaded(elsewhere, tmp_path, monkeypatch):
    monkeypatch.setattr(InferenceBench, "_ask", lambda *args: pytest.fail("asked"))
    with pytest.raises(TrainingError, match="no finished run"):
        InferenceBench().run(tmp_path)
    with pytest.raises(ModelError, match="does not exist"):
        InferenceBench(teacher="/no/such/teacher").run(elsewhere)
    with pytest.raises(ModelError, match=r"--prompt-tokens 1000000"):
        InferenceBench(Workload(prompt_tokens=1_000_000)).run(elsewhere)
    with pytest.raises(TrainingError, match=r"of kdcache 0\.1\.0, whose recipe .* does not read: .*selection\.flor"):
        InferenceBench().run(changed(elsewhere, lambda r: r["selection"].update(flor=1)))
    changed(elsewhere, lambda r: r["selection"].pop("flor"))
    (elsewhere / "model").rename(tmp_path / "gone")
    with pytest.raises(ModelError, match="no saved student"):
        InferenceBench().run(elsewhere)


def test_the_command_prints_a_table_for_each_run(run, here):
    from typer.testing import CliRunner

    import kdcache.cli  # noqa: F401 - registers the commands
    from kdcache.commands.app import app

    options = ["--batch-size", "2", "--prompt-tokens", "5", "--new-tokens", "3", "--repeats", "1"]
    sweep = run.parent / "sweep.json"
    rows = [{"name": n, "directory": n, "state": s} for n, s in ((run.name, "finished"), ("other", "failed"))]
    sweep.write_text(json.dumps({"format": "kdcache-sweep", "rows": rows}))
    # A sweep stands for its finished rows.
    done = CliRunner().invoke(app, ["bench-inference", str(run.parent), *options])
    sweep.unlink()
    assert done.exit_code == 0, done.output
    for name in ("teacher, float32", "student, nf4 + adapter", *FORMS):
        assert re.search(rf"{re.escape(name)} +[\d,]+ +\d+% +[\d,]+ ms +[\d,.]+ [MG]iB +[\d.]+ [MK]iB", done.output), (
            done.output
        )
    assert "2 x 3 new tokens after 5" in done.output
