"""Memory that runs out, numbers that are not finite: the run goes on as it would have, or stops and says why."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers

from kdcache.errors import RecipeError, TrainingError
from kdcache.evaluate import perplexity
from kdcache.recipe import parse_recipe
from kdcache.student import kept as kept_module
from kdcache.student import trainer as trainer_module
from kdcache.student.arguments import training_arguments
from kdcache.student.distill import distill
from kdcache.student.log import read_log
from kdcache.student.nonfinite import NonFiniteGuard
from kdcache.student.record import RunDirectory
from tests.told import Told


@pytest.fixture
def training(values, shared_cache):
    values["cache"]["directory"] = str(shared_cache)
    values["student"]["lora"] = {"dropout": 0.0}
    values["training"] |= {"epochs": 2, "batch_size": 8, "logging_steps": 1, "save_steps": 100, "clip": 0.5}
    return values


@pytest.fixture
def memory(monkeypatch):
    """A device whose memory fits so many sequences per training forward; None: any number."""
    real, limit = trainer_module.loss_sums, {"sequences": None, "from": 0}

    def limited(model, base, batch, **options):
        sums = real(model, base, batch, **options)
        if limit["sequences"] is not None and len(batch["input_ids"]) > limit["sequences"]:
            limit["from"] -= 1
            if limit["from"] < 0:
                raise torch.OutOfMemoryError("CUDA out of memory")
        return sums

    monkeypatch.setattr(trainer_module, "loss_sums", limited)
    return limit


@pytest.mark.parametrize(("sequences", "batch", "accumulation", "first"), [(3, 2, 4, 0), (4, 4, 2, 5), (1, 1, 8, 2)])
def test_memory_that_runs_out_halves_the_forward_pass_and_nothing_else(
    training, memory, sequences, batch, accumulation, first
):
    whole = distill(parse_recipe(training))
    training["output"] += "-small"
    memory |= {"sequences": sequences, "from": first}
    heard = Told()
    record = distill(parse_recipe(training), progress=heard)
    assert record.values["forward_pass"] == batch
    told = [w for w in heard.warnings if "out of memory" in w]
    assert f"going on with {batch} and training.accumulation {accumulation}" in told[-1]
    assert f"out of memory at step {first + 1} with 8 sequences" in told[0]
    for ours, theirs in zip(*(read_log(r.output / "log.csv") for r in (record, whole)), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    assert record.scores["student after"]["loss"] == pytest.approx(whole.scores["student after"]["loss"], rel=1e-4)


def test_an_evaluation_that_needs_more_memory_is_made_in_smaller_batches(training, monkeypatch):
    plain = distill(parse_recipe(training | {"training": training["training"] | {"eval_steps": 4}}))
    real = perplexity.loss_sums

    def limited(model, base, batch, **options):
        if len(batch["input_ids"]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(model, base, batch, **options)

    monkeypatch.setattr(perplexity, "loss_sums", limited)
    training["output"] += "-small"
    training["training"]["eval_steps"] = 4
    heard = Told()
    record = distill(parse_recipe(training), progress=heard)
    assert record.values["forward_pass"] == 8  # the training was never short of memory
    assert "out of memory: scoring goes on with 2 sequences per forward pass" in heard.warnings
    evaluated, expected = (
        [row["eval_loss"] for row in read_log(r.output / "log.csv") if "eval_loss" in row] for r in (record, plain)
    )
    assert evaluated == pytest.approx(expected, rel=1e-5)


def test_a_summed_loss_is_the_same_after_memory_ran_out(training, memory):
    training["loss"] = {"reduction": "sum"}
    training["training"] |= {"clip": None, "optimizer": "sgd", "learning_rate": 1e-4, "max_steps": 3}
    whole = distill(parse_recipe(training))
    training["output"] += "-small"
    memory["sequences"] = 4
    record = distill(parse_recipe(training))
    assert record.values["forward_pass"] == 4
    assert record.scores["student after"]["loss"] == pytest.approx(whole.scores["student after"]["loss"], rel=1e-5)


def test_when_not_even_one_sequence_fits_the_way_out_is_named(training, memory):
    memory["sequences"] = 0
    with pytest.raises(
        TrainingError, match=r"out of memory with 1 sequences per forward pass; use training\.max_length"
    ):
        distill(parse_recipe(training))


def test_memory_that_runs_out_in_the_optimizer_is_no_matter_of_the_batch(training, monkeypatch):
    def full(self, closure=None):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.optim.AdamW, "step", full)
    with pytest.raises(TrainingError, match=r"in the optimizer's own step; a smaller batch would not help"):
        distill(parse_recipe(training))


@pytest.fixture
def spoilt(monkeypatch):
    """Sequences of the train split whose teacher is broken: their loss is infinite, or their gradient alone."""
    real, bad = trainer_module.loss_sums, {"loss": set(), "gradient": set()}

    class Poison(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value):
            return value.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * torch.nan

    def spoiling(model, base, batch, **options):
        sums = real(model, base, batch, **options)
        present = set(batch["sequence_index"].tolist())
        if present & bad["gradient"]:
            object.__setattr__(sums, "total", Poison.apply(sums.total))
        if present & bad["loss"]:
            owner = torch.repeat_interleave(batch["sequence_index"], batch["sequence_targets"])
            sums.ce_N[torch.isin(owner, torch.tensor(sorted(bad["loss"])))] = torch.inf
            object.__setattr__(sums, "total", sums.total * torch.inf)
        return sums

    monkeypatch.setattr(trainer_module, "loss_sums", spoiling)
    return bad


def test_a_loss_that_is_not_finite_names_its_sequences(training, spoilt):
    spoilt["loss"] = {7}
    with pytest.raises(
        TrainingError, match=r"the loss is not finite at step \d, in the sequences 7 of the train split"
    ):
        distill(parse_recipe(training))


def test_a_gradient_that_is_not_finite_names_the_batch(training, spoilt):
    spoilt["gradient"] = {7}
    with pytest.raises(TrainingError, match=r"the gradient is not finite at step \d, in the sequences .*\b7\b"):
        distill(parse_recipe(training))


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_steps_may_be_left_out_and_are_counted(training, spoilt, what):
    spoilt[what] = {7}
    training["training"] |= {"skip_nonfinite": 2, "save_steps": 4}
    heard = Told()
    record = distill(parse_recipe(training), progress=heard)
    assert record.values["skipped_steps"] == 2  # once an epoch
    told = [w for w in heard.warnings if "is left out" in w]
    assert len(told) == 2
    assert f"its {what} is not finite" in told[0]
    assert "0 more may be" in told[1]
    for row in read_log(record.output / "log.csv"):  # the losses of the others; the gradient's norm is told as it was
        assert math.isfinite(row["loss"])
        assert math.isfinite(row.get("ce", 0.0))
    training["training"]["skip_nonfinite"] = 1
    training["output"] += "-strict"
    with pytest.raises(TrainingError, match="after 1 steps left out"):
        distill(parse_recipe(training))


def test_a_step_left_out_changes_neither_weights_nor_optimizer(training, spoilt):
    """The run without the bad step's update is the run in which that step never had a gradient."""
    spoilt["gradient"] = set(range(1000))
    training["training"] |= {"skip_nonfinite": 1000}
    record = distill(parse_recipe(training))
    assert record.values["skipped_steps"] == record.values["steps"]
    assert record.scores["student after"] == record.scores["student before"]


def test_steps_left_out_are_remembered_by_a_run_that_is_gone_on_with_at_its_end(training, spoilt):
    spoilt["loss"] = {7}
    training["training"]["skip_nonfinite"] = 2
    record = distill(parse_recipe(training))
    (record.output / "run.json").unlink()
    assert distill(parse_recipe(training), resume=True).values["skipped_steps"] == 2


@pytest.mark.parametrize("elsewhere", [False, True])
def test_every_process_leaves_out_what_one_of_them_has_seen(monkeypatch, elsewhere):
    """An infinite loss with a finite gradient: the process that saw it and the one that did not."""
    told = []

    def worst_of_all(flag, op):
        told.append(flag.item())
        if elsewhere:
            flag.fill_(1.0)

    monkeypatch.setattr(torch.distributed, "all_reduce", worst_of_all)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    model = torch.nn.Linear(2, 1)
    model(torch.ones(1, 2)).sum().backward()
    guard, state = NonFiniteGuard(1), transformers.TrainerState()
    guard.seen({"sequence_index": torch.tensor([3])})
    if not elsewhere:
        guard.loss_not_finite("5", state)
    arguments = SimpleNamespace(world_size=2, fp16=False, device="cpu")
    guard.on_pre_optimizer_step(arguments, state, None, model=model)
    assert told == [0.0 if elsewhere else 1.0]
    assert all(p.grad is None for p in model.parameters())
    guard.loss_not_finite("5", state)
    with pytest.raises(TrainingError, match="not finite at step 1 after 1 steps left out"):
        guard.on_pre_optimizer_step(arguments, state, None, model=model)


def test_half_precision_may_overflow_but_not_for_ever():
    guard, state = NonFiniteGuard(), transformers.TrainerState()
    arguments, skipped = SimpleNamespace(fp16=True), SimpleNamespace(step_was_skipped=True)
    for _ in range(19):
        guard.on_optimizer_step(arguments, state, None, optimizer=skipped)
    guard.on_optimizer_step(arguments, state, None, optimizer=SimpleNamespace(step_was_skipped=False))
    for _ in range(19):
        guard.on_optimizer_step(arguments, state, None, optimizer=skipped)
    with pytest.raises(TrainingError, match="20 steps in a row"):
        guard.on_optimizer_step(arguments, state, None, optimizer=skipped)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"schedule": "cosine_with_min_lr"}, "transformers refuses the training section"),
        ({"optimizer": "galore_adamw"}, "transformers refuses the training section"),
        ({"optimizer": "nonsense"}, "transformers refuses the training section"),
        ({"report_to": ["nonsense"]}, "transformers refuses the training section"),
        ({"max_steps": 0}, r"training\.max_steps should be -1"),
    ],
)
def test_what_transformers_cannot_make_is_refused_before_anything_is_loaded(training, keys, message, monkeypatch):
    monkeypatch.setattr(kept_module, "load_student", lambda *a: pytest.fail("loaded"))
    training["training"] |= keys
    with pytest.raises(RecipeError, match=message):
        distill(parse_recipe(training))


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE should be the number of processes, found 'abc'"),
        ({"WORLD_SIZE": "2"}, "but RANK and MASTER_ADDR is not set; start them with torchrun"),
    ],
)
def test_launchers_variables_that_make_no_sense_are_named(training, variables, message, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(TrainingError, match=message):
        distill(parse_recipe(training))


def test_deepspeed_cannot_leave_out_steps(training, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    training["training"]["skip_nonfinite"] = 1
    with pytest.raises(RecipeError, match="skip_nonfinite is not to be had with DeepSpeed"):
        distill(parse_recipe(training))


def test_an_optimizer_that_does_not_run_here_is_replaced_in_words(values, monkeypatch, tmp_path):
    import bitsandbytes

    def broken(*args, **kwargs):
        raise RuntimeError("no kernels for this device")

    monkeypatch.setattr(bitsandbytes.optim, "AdamW8bit", broken)
    values["training"]["optimizer"] = "paged_adamw_8bit"
    said = []
    arguments = training_arguments(
        parse_recipe(values).training, device="cpu", seed=0, checkpoints=tmp_path, tell=said.append
    )
    assert arguments.optim == transformers.training_args.OptimizerNames.ADAMW_TORCH
    assert said == [
        "paged_adamw_8bit needs bitsandbytes' optimizers, which fail on this cpu (RuntimeError: no kernels for this device); "
        "adamw_torch is used instead"
    ]


@pytest.fixture
def begun(values):
    """A recipe and the directory of its run, which has reached a checkpoint."""
    recipe = parse_recipe(values)
    run = RunDirectory(Path(recipe.output))
    run.begin(recipe, "c" * 64)
    run.release()
    (run.checkpoints / "checkpoint-4").mkdir(parents=True)
    return recipe, run


@pytest.mark.parametrize(
    "gone", [["training.fraction"], ["loss.kd_weight", "selection.temperatures"], ["student.attention", "sweep"]]
)
def test_a_run_of_before_a_recipe_key_goes_on(begun, gone):
    recipe, run = begun
    without(run, gone)
    assert run.prepare(recipe, "c" * 64, resume=True, overwrite=False) is None


@pytest.mark.parametrize(
    ("gone", "change", "key"),
    [
        (["training.fraction"], {"training": {"fraction": 0.5}}, r"training\.fraction was 1\.0, now 0\.5"),
        # A section that was null is not one of defaults.
        ([], {"student": {"lora": {}}}, r"student\.lora"),
        (["loss.temperature"], {"loss": {"temperature": 3.0}}, r"loss\.temperature was 2\.0, now 3\.0"),
    ],
)
def test_a_key_that_the_earlier_run_had_no_word_for_is_compared_with_its_default(values, begun, gone, change, key):
    _, run = begun
    without(run, gone)
    for section, keys in change.items():
        values.setdefault(section, {}).update(keys)
    if "student" in change:
        earlier = json.loads((run.path / "started.json").read_text())
        kept = {k: v for k, v in earlier["recipe"].items() if not k.startswith("student.lora")}
        (run.path / "started.json").write_text(json.dumps({**earlier, "recipe": {**kept, "student.lora": None}}))
    with pytest.raises(TrainingError, match=key):
        run.prepare(parse_recipe(values), "c" * 64, resume=True, overwrite=False)


def without(run, keys):
    """As a version without these keys would have written down whose run it is."""
    file = run.path / "started.json"
    earlier = json.loads(file.read_text())
    assert earlier["recipe"].keys() >= set(keys)
    earlier["recipe"] = {k: v for k, v in earlier["recipe"].items() if k not in keys}
    file.write_text(json.dumps(earlier))


def test_what_was_measured_of_a_student_goes_with_it(begun):
    recipe, run = begun
    judged = [run.path / name for name in ("evaluation.json", "evaluation.md", "inference.json")]
    for path in (*judged, run.path / "notes.txt"):
        path.write_text("{}")
    again = RunDirectory(run.path)
    again.prepare(recipe, "c" * 64, resume=False, overwrite=True)
    assert all(path.exists() for path in judged)
    again.begin(recipe, "c" * 64)
    again.release()
    assert not any(path.exists() for path in judged)
    assert (run.path / "notes.txt").exists()
