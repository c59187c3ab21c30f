"""Things that were wrong once, each as a user or a reviewer met it."""

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from kdcache.cache import layout
from kdcache.cache.manifest import parse_manifest, parse_plan
from kdcache.cache.reader import open_cache, shard_path
from kdcache.cache.strict_json import parse_object
from kdcache.cache.verify import verify
from kdcache.cache.writer import CacheWriter
from kdcache.console import printable
from kdcache.data.examples import Example, Message, load_examples
from kdcache.data.tokens import tokenise
from kdcache.errors import (
    CacheError,
    CorruptCacheError,
    DataError,
    ModelError,
    PlanMismatchError,
    RecipeError,
    StorageError,
    TrainingError,
)
from kdcache.evaluate.saved_run import score_saved_run
from kdcache.models import load_model
from kdcache.recipe import parse_recipe
from kdcache.student.distill import distill
from kdcache.teacher.select import Selection, select
from kdcache.token_maps import load_tokenizer
from tests.cache.samples import TOKENS, sample_plan, sample_sequences, stored_rows


@pytest.fixture
def training(values, shared_cache):
    """Recipe values for short training runs on the shared cache."""
    values["cache"]["directory"] = str(shared_cache)
    values["training"]["max_steps"] = 4
    return values


@pytest.mark.parametrize("values", ["quantised", "half"])
def test_interpolation_survives_rows_whose_tail_drowns_in_rounding(values):
    """Kept mass .99999 and more: the tail at T = 1 is below the rounding of the kept logits."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(100, 20_000, generator=generator) * 1.5
    logits[:, :64] += torch.linspace(25, 14, 64)
    exact_rows = select(logits, torch.zeros(100, dtype=torch.int64), Selection("top_k", (1.0, 2.0), k=64)).rows
    rows = stored_rows(exact_rows, values=values)
    assert rows.kept_mass()[:, 0].mean() > 0.99999
    relative = logits.double() - logits.double().amax(dim=1, keepdim=True)
    for t in (1.5, 3.0, 4.0):
        exact = torch.logsumexp(relative / t, dim=1).numpy()
        assert np.abs(rows.log_partition_at(t) - exact).max() < 1.0
    between, (low, high) = rows.log_partition_at(1.5), (rows.log_partition_at(t) for t in (1.0, 2.0))
    assert ((between >= low - 1e-3) & (between <= high + 1e-3)).all()


def test_overwrite_forgets_nothing_before_the_new_run_can_start(training):
    record = distill(parse_recipe(training))
    before = {p.name: p.read_bytes() for p in (record.output / "model").iterdir()}
    broken = copy.deepcopy(training)
    broken["student"]["model"] = "/nowhere/model"
    with pytest.raises(ModelError):
        distill(parse_recipe(broken), overwrite=True)
    assert {p.name: p.read_bytes() for p in (record.output / "model").iterdir()} == before
    assert (record.output / "run.json").exists()


def test_an_output_directory_with_something_else_in_it_is_refused(training):
    output = Path(training["output"])
    output.mkdir(parents=True)
    (output / "thesis.tex").write_text("x")
    for flags in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(TrainingError, match=r"no run \(thesis\.tex\)"):
            distill(parse_recipe(training), **flags)
    assert [p.name for p in output.iterdir()] == ["thesis.tex"]


def test_a_run_stopped_behind_its_last_checkpoint_takes_no_extra_step(training):
    training["training"] |= {"save_steps": 4, "schedule": "constant"}
    record = distill(parse_recipe(training))
    weights = record.output / "model" / "adapter_model.safetensors"
    whole = weights.read_bytes()
    (record.output / "run.json").unlink()
    shutil.rmtree(record.output / "model")
    again = distill(parse_recipe(training), resume=True)
    assert again.values["steps"] == 4
    assert weights.read_bytes() == whole
    assert again.scores == record.scores


def test_a_temperature_the_cache_cannot_give_is_refused_before_anything(training):
    training["loss"] = {"temperature": 0.5}
    with pytest.raises(CacheError, match=r"loss\.temperature 0\.5 is below"):
        distill(parse_recipe(training))
    assert not Path(training["output"]).exists()


def test_a_run_without_a_checkpoint_needs_no_flag(training, monkeypatch):
    from kdcache.student.trainer import DistillationTrainer

    def stopped(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(DistillationTrainer, "train", stopped)
        with pytest.raises(KeyboardInterrupt):
            distill(parse_recipe(training))
    training["loss"] = {"temperature": 1.5}
    assert distill(parse_recipe(training)).values["steps"] == 4


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data.train.path", "other.jsonl"),
        ("data.system", "Be brief."),
        ("data.date", "2025-01-01"),
        ("data.shape", "chat"),
        ("data.columns", {"output": "answer"}),
        ("data.train.revision", "main"),
        ("teacher.revision", "0" * 40),
    ],
)
def test_every_key_the_plan_records_is_compared(training, key, value):
    place = training
    *path, last = key.split(".")
    for name in path:
        place = place[name]
    place[last] = value
    with pytest.raises(PlanMismatchError, match=key.replace(".", r"\.")):
        distill(parse_recipe(training))


def test_folders_are_compared_by_name_through_links(training, models, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "teacher").symlink_to(models / "teacher")
    training["teacher"]["model"] = str(tmp_path / "elsewhere" / "teacher")
    assert distill(parse_recipe(training)).values["steps"] == 4


def test_before_after_and_evaluate_use_one_arithmetic(training):
    """With a learning rate of nothing, all three are the same number, in bf16 and 4 bits too."""
    training["student"] |= {"quantization": "nf4", "dtype": "bfloat16"}
    training["training"] |= {"precision": "bf16", "learning_rate": 1e-30}
    record = distill(parse_recipe(training))
    assert record.scores["student after"] == record.scores["student before"]
    again = score_saved_run(record.output, batch_size=training["training"]["batch_size"])
    assert again.scores == record.scores


def test_a_full_disk_while_saving_is_one_typed_error(training, monkeypatch):
    training["training"]["save_steps"] = 2

    def full(*args, **kwargs):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(StorageError, match="free some space and go on by --resume"):
            distill(parse_recipe(training))
    assert distill(parse_recipe(training), resume=True).values["steps"] == 4


def test_the_saved_student_says_what_it_is_and_can_be_read(training):
    record = distill(parse_recipe(training))
    card = (record.output / "model" / "README.md").read_text()
    assert "student after" in card
    assert record.values["cache_id"] in card
    modes = {p.stat().st_mode & 0o777 for p in (record.output / "model").iterdir()}
    assert len(modes) == 1


def test_a_template_that_writes_the_date_does_not_depend_on_the_day(models):
    tokenizer = copy.deepcopy(load_tokenizer(str(models / "teacher")))
    for source in (
        "{{ strftime_now('%d %b %Y') }}",
        "{% if date_string is defined %}{{ date_string }}{% else %}{{ strftime_now('%Y') }}{% endif %}",
    ):
        tokenizer.chat_template = "{{ 'x' }}" + source + load_tokenizer(str(models / "teacher")).chat_template
        example = Example(0, messages=(Message("user", "u"), Message("assistant", "a")))
        row = tokenise([example], tokenizer, date="2024-07-26", max_length=99).rows[0]
        assert tokenizer.decode(row.ids).startswith("x26 Jul 2024")


def test_logits_changed_behind_the_head_are_refused(tmp_path, models):
    import transformers

    config = transformers.Gemma2Config(
        vocab_size=128, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, final_logit_softcapping=30.0,
    )  # fmt: skip
    transformers.Gemma2ForCausalLM(config).save_pretrained(tmp_path / "capped")
    with pytest.raises(ModelError, match="final_logit_softcapping"):
        load_model(str(tmp_path / "capped"), dtype="float32", device="cpu")
    granite = transformers.GraniteConfig(
        vocab_size=128, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, logits_scaling=8.0,
    )  # fmt: skip
    transformers.GraniteForCausalLM(granite).save_pretrained(tmp_path / "scaled")
    with pytest.raises(ModelError, match="changes its logits"):
        load_model(str(tmp_path / "scaled"), dtype="float32", device="cpu")


def test_shards_that_could_never_be_read_are_refused_in_the_recipe(values):
    values["selection"] = {"method": "top_k", "k": 60_000}
    values["cache"]["positions_per_shard"] = 65_536
    with pytest.raises(RecipeError, match=r"cache\.positions_per_shard 65536 makes shards of more than"):
        parse_recipe(values)
    values["selection"] = {"method": "random_sampling", "draws": 255, "temperatures": [1.0]}
    values["cache"]["positions_per_shard"] = 1 << 24
    with pytest.raises(RecipeError, match=r"cache\.positions_per_shard 16777216 makes shards of more than"):
        parse_recipe(values)
    for selection in ({"bytes_per_position": 20_000}, {"floors": [1e-4, 1e-4]}):
        values["selection"] = selection
        values["cache"]["positions_per_shard"] = 65_536
        with pytest.raises(RecipeError, match=r"cache\.positions_per_shard 65536 makes shards of more than"):
            parse_recipe(values)


CONTENTS = [sample_sequences(sequences=n, seed=n) for n in (3, 2)]
PLAN = sample_plan(CONTENTS)


@pytest.fixture
def cache(tmp_path):
    writer = CacheWriter(tmp_path / "c", PLAN, TOKENS)
    for index, content in enumerate(CONTENTS):
        writer.commit(index, content)
    writer.finalise()
    return tmp_path / "c"


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["splits"][1].update(positions=0),
        lambda m: m["splits"][0].update(tokens=1),
        lambda m: m["splits"][0].update(kept_mass_mean=[0.5]),
        lambda m: m["splits"][0].pop("kept_positions"),
        lambda m: m["splits"][0].update(kept_mass_mean=[2.0, 2.0]),
    ],
)
def test_manifest_totals_are_held_against_the_plan(cache, change):
    manifest = json.loads((cache / layout.MANIFEST_FILE).read_text())
    change(manifest)
    with pytest.raises(CorruptCacheError, match=r"manifest\.json"):
        parse_manifest(json.dumps(manifest).encode(), PLAN)


def test_special_ids_beyond_the_vocabulary_are_refused():
    value = json.loads(PLAN.to_bytes())
    value["tokenizer"]["pad_id"] = 10**9
    with pytest.raises(CorruptCacheError, match="pad_id"):
        parse_plan(json.dumps(value).encode())


@pytest.mark.parametrize("field", ["raw_bytes", "entries", "content_sha256"])
def test_verify_checks_every_field_of_the_manifest(cache, field):
    manifest = json.loads((cache / layout.MANIFEST_FILE).read_text())
    manifest["shards"][0][field] = "0" * 64 if field == "content_sha256" else manifest["shards"][0][field] - 1
    (cache / layout.MANIFEST_FILE).write_text(json.dumps(manifest))
    assert [f.file for f in verify(cache)] == ["shards/00000.safetensors.zst"]


def test_verify_checks_the_fingerprint_of_a_split(tmp_path):
    value = json.loads(PLAN.to_bytes())
    value["data"]["splits"][0]["fingerprint"] = "0" * 64
    other = parse_plan(json.dumps(value).encode())
    writer = CacheWriter(tmp_path / "f", other, TOKENS)
    for index, content in enumerate(CONTENTS):
        writer.commit(index, content)
    writer.finalise()
    assert [f.file for f in verify(tmp_path / "f")] == [layout.PLAN_FILE]


def test_another_process_with_other_content_is_refused_and_with_the_same_is_not(cache):
    writer = CacheWriter(cache, PLAN, TOKENS)
    writer.commit(0, CONTENTS[0])
    changed = sample_sequences(sequences=3, seed=3)
    altered = type(changed)(changed.lengths, changed.token_ids, changed.targets, changed.rows)
    altered.rows.label_log_prob[0] -= 0.5
    with pytest.raises(CacheError, match="by another process with other content"):
        writer.commit(0, altered)


def test_a_directory_that_is_refused_is_left_as_it_was(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(CacheError):
        CacheWriter(tmp_path, PLAN, TOKENS)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_notes_in_the_data_card_stay(cache):
    card = cache / layout.CARD_FILE
    card.write_text(card.read_text() + "licence: ours\n")
    CacheWriter(cache, PLAN, TOKENS).finalise()
    assert card.read_text().endswith("licence: ours\n")
    assert verify(cache) == []


def test_an_oversized_shard_is_made_again_and_not_an_abort(cache, monkeypatch):
    monkeypatch.setattr(layout, "SHARD_LIMIT", shard_path(cache, 0).stat().st_size - 1)
    todo, complaints = CacheWriter(cache, PLAN, TOKENS).survey()
    assert 0 in todo
    assert "limit" in complaints[0]


def test_a_shard_cannot_unpack_to_more_than_the_manifest_says(cache):
    opened = open_cache(cache)
    entry = opened.manifest.shards[0]
    small = entry.model_copy(update={"raw_bytes": entry.raw_bytes - 1})
    opened.manifest = opened.manifest.model_copy(update={"shards": (small, *opened.manifest.shards[1:])})
    with pytest.raises(CorruptCacheError, match="more than the limit"):
        opened.shard(0)


def test_text_of_a_stranger_does_not_steer_the_terminal():
    assert printable("a\x1b[31mb\x07\ud800 [red]c[/x]\n") == "a[31mb [red]c[/x]\n"
    with pytest.raises(CorruptCacheError):
        parse_object(b'{"a": \xff}', what="it")


def test_summed_slices_and_odd_messages(tmp_path):
    import datasets

    table = datasets.Dataset.from_list([{"text": str(i)} for i in range(10)])
    table.save_to_disk(str(tmp_path / "saved"))
    assert [e.text for e in load_examples(str(tmp_path / "saved"), split="train[:2]+train[8:]")] == ["0", "1", "8", "9"]
    (tmp_path / "m.jsonl").write_text('{"messages": 3}\n')
    with pytest.raises(DataError, match="messages should be a list, found int"):
        list(load_examples(str(tmp_path / "m.jsonl")))


def test_a_log_line_with_infinity_survives_a_resume(tmp_path):
    """Ordinary in the first steps of fp16 training."""
    from types import SimpleNamespace

    from kdcache.student.log import CsvLog, read_log

    log = CsvLog(tmp_path / "log.csv")
    state = SimpleNamespace(is_world_process_zero=True, global_step=0)
    log.on_train_begin(None, state, None)
    for step, norm in ((1, float("inf")), (2, float("nan")), (3, 1.0)):
        state.global_step = step
        log.on_log(None, state, None, logs={"loss": 2.0, "grad_norm": norm})
    state.global_step = 2
    log.on_train_begin(None, state, None)
    assert [row["step"] for row in read_log(tmp_path / "log.csv")] == [1, 2]


def test_an_evaluation_in_between_is_no_part_of_the_training_log(training, tmp_path):
    from kdcache.student.arguments import training_arguments
    from kdcache.student.collate import Collator
    from kdcache.student.trainer import DistillationTrainer, SplitDataset

    recipe = parse_recipe(training)
    cache = open_cache(training["cache"]["directory"])
    arguments = training_arguments(recipe.training, device="cpu", seed=0, checkpoints=tmp_path)
    trainer = DistillationTrainer(
        model=load_model(recipe.student.model, dtype="float32", device="cpu"), args=arguments,
        train_dataset=SplitDataset(cache.split("train")), eval_dataset=SplitDataset(cache.split("validation")),
        data_collator=Collator(0, 2.0),
        distillation={"vocab_size": cache.vocab_size, "temperature": 2.0, "ce_weight": 0.5, "kd_weight": 0.5},
    )  # fmt: skip
    assert trainer.evaluate()["eval_loss"] > 0
    assert not trainer._window.any()


def test_shards_are_closed_by_tokens_too(monkeypatch):
    """Long prompts with short answers once made shards that nothing could read back."""
    import numpy as np

    from kdcache.cache import layout
    from kdcache.data.tokens import TokenRow
    from kdcache.teacher.planning import _cut

    monkeypatch.setattr(layout, "TOKENS_PER_SHARD", 20)
    rows = [TokenRow(i, np.zeros(8, dtype=np.uint32), np.arange(8) == 7) for i in range(7)]
    assert [(s.start, s.sequences, s.tokens) for s in _cut(0, rows, 1000)] == [(0, 3, 24), (3, 3, 24), (6, 1, 8)]
