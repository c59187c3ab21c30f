"""Stopped anywhere, gone on with anywhere: the same student, or a refusal that names what changed."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
import yaml

from kdcache.cache.reader import open_cache
from kdcache.errors import TrainingError
from kdcache.recipe import parse_recipe
from kdcache.student import assembly
from kdcache.student.distill import distill
from kdcache.student.log import read_log
from kdcache.student.stopping import stop_on_request
from tests.told import Told

ROOT = Path(__file__).parent.parent.parent
ADAPTER = "model/adapter_model.safetensors"


class Stop(Exception):
    """Stands for a kill."""


@pytest.fixture
def training(values, shared_cache):
    """Two epochs of eleven steps with dropout, 8-bit optimizer, accumulation and a partial last batch."""
    values["cache"]["directory"] = str(shared_cache)
    values["training"] |= {
        "epochs": 2, "batch_size": 2, "accumulation": 2, "save_steps": 3, "logging_steps": 1,
        "optimizer": "paged_adamw_8bit", "precision": "bf16", "clip": 0.5, "schedule": "cosine", "warmup": 3,
    }  # fmt: skip
    return values


def stopped(recipe, monkeypatch, step):
    """Train up to a step and break off there, before its checkpoint is written."""

    class StoppedTrainer(assembly.DistillationTrainer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.add_callback(Stopper())

    class Stopper(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == step:
                raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(assembly, "DistillationTrainer", StoppedTrainer)
        with pytest.raises(Stop):
            distill(recipe, resume=True)


def test_a_run_stopped_three_times_ends_in_the_same_bytes(training, monkeypatch):
    training["training"]["workers"] = 1
    whole = distill(parse_recipe(training))
    steps = whole.values["steps"]
    epoch = steps // 2
    assert epoch % 3 == 0  # a checkpoint stands where an epoch ends
    training["output"] += "-stopped"
    # Another number of workers is no other run.
    for workers, step in ((1, 5), (0, epoch + 2), (2, epoch + 4), (1, steps - 1)):
        training["training"]["workers"] = workers
        stopped(parse_recipe(training), monkeypatch, step)
    parts = distill(parse_recipe(training), resume=True)
    assert parts.values["resumed_at"] > steps // 2
    assert (parts.output / ADAPTER).read_bytes() == (whole.output / ADAPTER).read_bytes()
    assert (parts.output / "log.csv").read_bytes() == (whole.output / "log.csv").read_bytes()
    assert parts.scores == whole.scores


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_the_step_and_loses_nothing(training, monkeypatch, number):
    whole = distill(parse_recipe(training))
    training["output"] += "-asked"
    told = Told()

    class Asker(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 4:
                os.kill(os.getpid(), number)

    class AskedTrainer(assembly.DistillationTrainer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.add_callback(Asker())

    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(assembly, "DistillationTrainer", AskedTrainer)
            with pytest.raises(KeyboardInterrupt):
                distill(parse_recipe(training), progress=told)
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "stopping after this step, with a checkpoint (once more: at once)" in told.messages
    # No step was lost, although a checkpoint was only due at step 6; and nothing takes it for the end.
    parts = distill(parse_recipe(training), resume=True, progress=told)
    assert parts.values["resumed_at"] == 5
    assert "going on from checkpoint-5" in told.messages
    assert (parts.output / ADAPTER).read_bytes() == (whole.output / ADAPTER).read_bytes()
    assert parts.scores == whole.scores


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("step", [7, 21])
def test_ctrl_c_keeps_the_checkpoint_that_it_made_and_is_never_swallowed(training, monkeypatch, step):
    """One checkpoint at a time, the best kept as well; and in the last step, behind which nothing is left to be saved."""
    training["training"] |= {"save_steps": 2, "eval_steps": 2, "keep_best": True, "keep_checkpoints": 1}

    class Asker(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == step:
                os.kill(os.getpid(), signal.SIGINT)

    class AskedTrainer(assembly.DistillationTrainer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.add_callback(Asker())

    with monkeypatch.context() as patch:
        patch.setattr(assembly, "DistillationTrainer", AskedTrainer)
        with pytest.raises(KeyboardInterrupt):
            distill(parse_recipe(training))
    assert distill(parse_recipe(training), resume=True).values["resumed_at"] == step + 1


def test_handlers_of_others_are_left_alone():
    def own(number, frame):
        """A worker's."""

    before = signal.signal(signal.SIGTERM, own), signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stop_on_request(Told()) as stop:
            assert signal.getsignal(signal.SIGTERM) is own
            os.kill(os.getpid(), signal.SIGINT)
            assert not stop.asked
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGINT, before[1])


def test_a_run_without_a_checkpoint_begins_again_and_says_so(training, monkeypatch):
    stopped(parse_recipe(training), monkeypatch, 2)
    told = Told()
    record = distill(parse_recipe(training), resume=True, progress=told)
    assert record.values["resumed_at"] == 0
    assert "there is no checkpoint to go on from: from the beginning" in told.messages
    training["output"] += "-new"
    told = Told()
    distill(parse_recipe(training), resume=True, progress=told)
    assert not [text for text in told.messages if "no checkpoint" in text]


def test_another_cut_of_the_same_global_batch_goes_on(training, monkeypatch):
    training["student"]["lora"] = {"dropout": 0.0}
    training["training"] |= {"precision": "fp32", "optimizer": "adamw_torch"}
    whole = distill(parse_recipe(training))
    training["output"] += "-cut"
    stopped(parse_recipe(training), monkeypatch, 5)
    training["training"] |= {"batch_size": 4, "accumulation": 1}
    parts = distill(parse_recipe(training), resume=True)
    for ours, theirs in zip(*(read_log(r.output / "log.csv") for r in (parts, whole)), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    training["training"]["accumulation"] = 2
    with pytest.raises(TrainingError, match=r"processes was '4 sequences a step', now '8 sequences a step'"):
        distill(parse_recipe(training), resume=True)


def test_two_processes_go_on_with_the_run_of_one(training, tmp_path):
    """The same batches, so the same loss; a batch that one process would repeat to even out would show."""
    training["student"]["lora"] = {"dropout": 0.0}
    training["training"] |= {"precision": "fp32", "optimizer": "adamw_torch", "batch_size": 4, "accumulation": 2}
    whole = distill(parse_recipe(training))
    training["output"] += "-moved"
    recipe = tmp_path / "moved.yaml"
    recipe.write_text(yaml.safe_dump(training))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}

    def run(processes, step, *overrides):
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] * (processes > 1)
        script = str(ROOT / "tests/student/stopped_training.py")
        command = [sys.executable, *launcher, script, str(step), str(recipe), *overrides]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    assert run(1, 5).returncode != 0
    ended = run(2, 0, "training.accumulation=1")
    assert ended.returncode == 0, ended.stderr
    moved = read_log(Path(training["output"]) / "log.csv")
    for ours, theirs in zip(moved, read_log(whole.output / "log.csv"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
        assert ours["ce"] == pytest.approx(theirs["ce"], rel=1e-3)


def test_how_often_to_log_and_save_may_change(training, monkeypatch):
    stopped(parse_recipe(training), monkeypatch, 4)
    training["training"] |= {"save_steps": 2, "logging_steps": 4}
    record = distill(parse_recipe(training), resume=True)
    logged = [row["step"] for row in read_log(record.output / "log.csv")]
    assert logged[:3] == [1, 2, 3]
    assert set(logged[3:]) == {n for n in range(4, record.values["steps"] + 1) if n % 4 == 0} | {record.values["steps"]}


@pytest.mark.parametrize(
    ("name", "damage"), [("rng_state.pth", b"broken"), ("trainer_state.json", b"[]"), ("optimizer.pt", b"broken")]
)
def test_a_checkpoint_with_any_damaged_file_is_passed_over(training, monkeypatch, name, damage):
    training["training"]["keep_checkpoints"] = 5
    stopped(parse_recipe(training), monkeypatch, 8)
    (Path(training["output"]) / "checkpoints" / "checkpoint-6" / name).write_bytes(damage)
    assert distill(parse_recipe(training), resume=True).values["resumed_at"] == 3


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 5}, "seed was 0, now 5"),
        ({"loss": {"kd_weight": 0.7}}, r"loss\.kd_weight was 0\.5, now 0\.7"),
        ({"training": {"batch_size": 4}}, "processes was '4 sequences a step', now '8 sequences a step'"),
        ({"training": {"max_length": 64}}, r"training\.max_length was None, now 64"),
        ({"training": {"group_by_length": True}}, r"training\.group_by_length was False, now True"),
    ],
)
def test_what_would_silently_change_the_run_is_refused(training, monkeypatch, change, named):
    stopped(parse_recipe(training), monkeypatch, 4)
    for section, values in change.items():
        training[section] = training.get(section, {}) | values if isinstance(values, dict) else values
    with pytest.raises(TrainingError, match=named):
        distill(parse_recipe(training), resume=True)


def test_another_cache_is_refused(training, monkeypatch, tmp_path):
    from kdcache.cache.subset import subset

    stopped(parse_recipe(training), monkeypatch, 4)
    subset(open_cache(training["cache"]["directory"]), tmp_path / "other", sequences=(0, 20))
    training["cache"]["directory"] = str(tmp_path / "other")
    training |= {"data": None, "teacher": None}
    del training["selection"]
    with pytest.raises(TrainingError, match="cache id was"):
        distill(parse_recipe(training), resume=True)


def test_checkpoints_appear_whole_and_are_pruned(training, monkeypatch):
    training["training"] |= {"save_steps": 1, "keep_checkpoints": 3}
    output = Path(training["output"])
    seen = []

    class Looking(assembly.DistillationTrainer):
        def _save_optimizer_and_scheduler(self, folder):
            # In the middle of a checkpoint: nothing of it under its own name.
            seen.append(sorted(p.name for p in (output / "checkpoints").iterdir()))
            super()._save_optimizer_and_scheduler(folder)
            if self.state.global_step == 5:
                raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(assembly, "DistillationTrainer", Looking)
        with pytest.raises(Stop):
            distill(parse_recipe(training))
    assert seen[-1] == ["checkpoint-2", "checkpoint-3", "checkpoint-4", "unfinished"]
    shutil.rmtree(output / "checkpoints" / "checkpoint-4" / "optimizer.pt", ignore_errors=True)
    (output / "checkpoints" / "checkpoint-4" / "optimizer.pt").write_bytes(b"broken")
    record = distill(parse_recipe(training), resume=True)
    assert record.values["resumed_at"] == 3
    steps = record.values["steps"]
    left = sorted(p.name for p in (output / "checkpoints").iterdir())
    assert left == sorted(f"checkpoint-{n}" for n in (steps - 2, steps - 1, steps))


def test_two_trainings_cannot_share_a_directory(training, monkeypatch):
    stopped(parse_recipe(training), monkeypatch, 4)
    hold = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    command = [sys.executable, "-c", hold, str(Path(training["output"]) / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(TrainingError, match="another process is training in"):
            distill(parse_recipe(training), resume=True)
        other.communicate(b"\n")
    assert distill(parse_recipe(training), resume=True).values["resumed_at"] == 3
