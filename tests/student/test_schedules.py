"""What changes over a training: temperature and weights; evaluation, the best student, early stopping, loggers."""

import math

import pytest
import transformers

from kdcache.cache.reader import open_cache
from kdcache.errors import CacheError, DeviceError, RecipeError
from kdcache.evaluate.saved_run import score_saved_run
from kdcache.recipe import parse_recipe
from kdcache.recipe_training import Ramp
from kdcache.report import write_pages
from kdcache.student import assembly
from kdcache.student.batches import MicroBatches
from kdcache.student.collate import Collator
from kdcache.student.distill import distill
from kdcache.student.log import read_log
from kdcache.student.sampler import BatchPlan


@pytest.fixture
def training(values, shared_cache):
    values["cache"]["directory"] = str(shared_cache)
    values["student"]["lora"] = {"dropout": 0.0}
    values["training"] |= {"epochs": 2, "batch_size": 8, "logging_steps": 1, "save_steps": 4}
    return values


@pytest.mark.parametrize(
    ("ramp", "expected"),
    [
        (Ramp(start=4, end=1), [4, 3.25, 2.5, 1.75, 1]),
        (Ramp(start=0, end=1, shape="cosine"), [0, (1 - math.sqrt(0.5)) / 2, 0.5, (1 + math.sqrt(0.5)) / 2, 1]),
    ],
)
def test_ramps(ramp, expected):
    assert [ramp.at(i / 4) for i in range(5)] == pytest.approx(expected)


def test_temperature_and_weights_go_from_start_to_end_and_the_batch_is_made_at_the_same_temperature(training):
    training["loss"] = {
        "temperature": {"start": 2, "end": 1},
        "ce_weight": {"start": 0, "end": 1, "shape": "cosine"},
        "kd_weight": {"start": 1, "end": 0},
    }
    record = distill(parse_recipe(training))
    log = read_log(record.output / "log.csv")
    last = len(log) - 1
    for step, row in enumerate(log):
        share = step / last
        assert row["temperature"] == pytest.approx(2 - share)
        assert row["ce_weight"] == pytest.approx((1 - math.cos(math.pi * share)) / 2)
        assert row["kd_weight"] == pytest.approx(1 - share)
        expected = row["ce_weight"] * row["ce"] + row["kd_weight"] * row["temperature"] ** 2 * row["kl"]
        assert row["loss"] == pytest.approx(expected, rel=1e-3)
    assert "T = 2 to 1 (linear)" in (record.output / "model" / "README.md").read_text()


def test_a_schedule_that_stands_still_is_the_constant(training):
    constant = distill(parse_recipe(training))
    training["output"] += "-ramp"
    training["loss"] = {"temperature": {"start": 2, "end": 2}}
    still = distill(parse_recipe(training))
    assert still.scores["student after"] == constant.scores["student after"]


def test_micro_batches_carry_the_temperature_of_their_step(shared_cache):
    split = open_cache(shared_cache)["train"]
    plan = BatchPlan(len(split), 2, 3)
    batches = MicroBatches(split, plan, assembly.OrderOptions(), Collator(0, 2.0), lambda step: 1.0 + step / 100)
    [batch] = batches.__getitems__([(1, 4)])
    step = plan.steps + 1
    assert batch["temperature"] == 1.0 + step / 100
    again = Collator(0, 1.0 + step / 100)([(i, split[i]) for i in batch["sequence_index"].tolist()])
    assert again["teacher_log_probs"].equal(batch["teacher_log_probs"])


def test_a_schedule_below_the_declared_temperatures_is_refused(training):
    training["loss"] = {"temperature": {"start": 2, "end": 0.5}}
    with pytest.raises(CacheError, match=r"loss\.temperature 0\.5 is below"):
        distill(parse_recipe(training))


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ({"temperature": {"start": 4}}, r"recipe lacks loss\.temperature\.end"),
        (
            {"temperature": {"start": 4, "stop": 1}},
            r"key loss\.temperature\.stop; loss\.temperature takes a number, or {start",
        ),
        (
            {"temperature": {"start": 4, "end": 1, "shape": "cubic"}},
            r"loss\.temperature\.shape: .*'linear' or 'cosine'",
        ),
        ({"temperature": {"start": 4, "end": 0}}, r"loss\.temperature should be above 0 .* found 4 to 0"),
        ({"temperature": "hot"}, r"recipe key loss\.temperature: .*number.*'hot'"),
        ({"kd_weight": -1}, r"loss\.kd_weight should be at least 0, found -1"),
        ({"kd_weight": 0, "ce_weight": {"start": 0, "end": 0}}, "both 0"),
    ],
)
def test_schedules_that_make_no_sense_are_named(training, loss, message):
    training["loss"] = loss
    with pytest.raises(RecipeError, match=message):
        parse_recipe(training)


def test_evaluation_in_between_is_a_token_sum_and_changes_nothing(training):
    plain = distill(parse_recipe(training))
    training["output"] += "-evaluated"
    training["training"]["eval_steps"] = 5
    record = distill(parse_recipe(training))
    assert record.scores == plain.scores
    evaluated = [row for row in read_log(record.output / "log.csv") if "eval_loss" in row]
    assert [row["step"] for row in evaluated] == [5, 10, record.values["steps"]]
    assert evaluated[-1]["eval_loss"] == pytest.approx(record.scores["student after"]["loss"], rel=1e-6)
    assert evaluated[-1]["eval_perplexity"] == pytest.approx(math.exp(evaluated[-1]["eval_loss"]), rel=1e-6)
    assert {p.name for p in write_pages(record)} == {"table.md", "loss.png"}


@pytest.fixture
def worsening(monkeypatch):
    """From the sixth step on the gradient points the wrong way."""

    class Turn(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            if state.global_step >= 5:
                for parameter in kwargs["model"].parameters():
                    if parameter.grad is not None:
                        parameter.grad.neg_()

    class Worsening(assembly.DistillationTrainer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.add_callback(Turn())

    monkeypatch.setattr(assembly, "DistillationTrainer", Worsening)


@pytest.mark.usefixtures("worsening")
def test_the_best_student_is_kept_also_by_a_resumed_run(training):
    training["training"] |= {"learning_rate": 1e-2, "schedule": "constant", "eval_steps": 1, "keep_best": True, "save_steps": 50, "keep_checkpoints": 1}  # fmt: skip
    record = distill(parse_recipe(training))
    evaluated = {row["step"]: row["eval_loss"] for row in read_log(record.output / "log.csv") if "eval_loss" in row}
    best = min(evaluated, key=lambda step: evaluated[step])
    assert best < record.values["steps"]
    assert record.values["best_step"] == best
    assert record.scores["student after"]["loss"] == pytest.approx(evaluated[best], rel=1e-6)
    assert score_saved_run(record.output, batch_size=4).scores["student after"]["loss"] == pytest.approx(
        evaluated[best], rel=1e-4
    )
    # Killed between the last step and the record: the best checkpoint is found again, wherever the run lies now.
    moved = record.output.with_name("moved")
    record.output.rename(moved)
    (moved / "run.json").unlink()
    training["output"] = str(moved)
    again = distill(parse_recipe(training), resume=True)
    assert again.scores["student after"]["loss"] == pytest.approx(evaluated[best], rel=1e-6)
    assert again.values["best_step"] == best


@pytest.mark.usefixtures("worsening")
def test_a_training_that_gets_no_better_stops_early_and_stays_stopped(training):
    training["training"] |= {"learning_rate": 1e-2, "schedule": "constant", "eval_steps": 1, "patience": 2, "save_steps": 1, "epochs": 5}  # fmt: skip
    record = distill(parse_recipe(training))
    evaluated = [row["eval_loss"] for row in read_log(record.output / "log.csv") if "eval_loss" in row]
    assert len(evaluated) == record.values["steps"] < 5 * 6
    assert min(evaluated[-2:]) >= min(evaluated[:-2])
    (record.output / "run.json").unlink()
    again = distill(parse_recipe(training), resume=True)
    assert again.values["steps"] == record.values["steps"]
    assert again.scores == record.scores


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"patience": 3}, r"training\.patience needs training\.eval_steps"),
        ({"keep_best": True}, r"training\.keep_best needs training\.eval_steps"),
        (
            {"keep_best": True, "eval_steps": 3},
            r"training\.save_steps \(4\) to be a multiple of training\.eval_steps \(3\)",
        ),
    ],
)
def test_evaluation_keys_that_contradict_are_named(training, keys, message):
    training["training"] |= keys
    with pytest.raises(RecipeError, match=message):
        parse_recipe(training)


def test_tf32_needs_a_gpu_that_has_it(training):
    training["training"]["tf32"] = True
    with pytest.raises(DeviceError, match="tf32 needs an NVIDIA GPU"):
        distill(parse_recipe(training))


@pytest.mark.parametrize("keys", [{"dora": True}, {"rslora": True}])
def test_other_kinds_of_lora_train_and_are_scored_again(training, keys):
    training["student"]["lora"] |= keys
    training["training"]["max_steps"] = 2
    record = distill(parse_recipe(training))
    again = score_saved_run(record.output)
    assert again.scores["student after"]["loss"] == pytest.approx(record.scores["student after"]["loss"], rel=1e-4)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "constant_with_warmup", "linear"])
def test_schedules_of_the_learning_rate(training, schedule):
    training["training"] |= {"schedule": schedule, "warmup": 3, "learning_rate": 1e-3}
    record = distill(parse_recipe(training))
    rates = [row["learning_rate"] for row in read_log(record.output / "log.csv")]
    assert max(rates) == pytest.approx(1e-3)
    if schedule != "constant":
        assert rates[:3] == pytest.approx([0, 1e-3 / 3, 2e-3 / 3])
    if schedule in ("linear", "cosine"):
        assert rates[-1] < 3e-4


def test_tensorboard_gets_losses_and_evaluations(training):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed; report_to is not tested")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    training["training"] |= {"report_to": ["tensorboard"], "eval_steps": 6}
    record = distill(parse_recipe(training))
    [events] = (record.output).rglob("events.out.tfevents.*")
    read = EventAccumulator(str(events.parent)).Reload()
    assert {"train/ce", "train/kl", "train/loss", "eval/perplexity", "eval/kl"} <= set(read.Tags()["scalars"])
    logged = [row["ce"] for row in read_log(record.output / "log.csv") if "ce" in row]
    assert [e.value for e in read.Scalars("train/ce")] == pytest.approx(logged, rel=1e-5)
