"""One contender of `training.py`, in a process of its own: a whole ``trainer.train()`` that stops after every step until
it is given the next turn, so that several can be measured step by step beside each other.

    python benchmarks/training_workers.py '{"recipe": {...}, "contender": "cached KD", "steps": 9}'
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import transformers
from gpu_workers import CACHED, CONTENDERS, LIVE, SFT, LiveTrainer, PlainSet, plain_batch

from kdcache.cache.reader import Cache, open_cache
from kdcache.models import load_model, quiet_libraries
from kdcache.recipe import Recipe, parse_recipe
from kdcache.student.arguments import training_arguments
from kdcache.student.assembly import load_student, with_adapter
from kdcache.student.batches import OrderOptions, SplitDataset
from kdcache.student.collate import Collator
from kdcache.student.sampler import EpochOrder
from kdcache.student.trainer import DistillationTrainer

__all__ = ["CACHED", "CONTENDERS", "LIVE", "SFT", "train"]


class InOrder(PlainSet):
    """Plain sequences in the order in which the cached training takes them; to be read one after another."""

    def __init__(self, directory: str, order: Sequence[int]) -> None:
        super().__init__(directory)
        self._order = order

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return super().__getitem__(int(self._order[index]))


class Turns(transformers.TrainerCallback):
    """Tells what each step took, and waits between two steps until it may go on.

    Args:
        tell: given a dictionary for every step.
        wait: returns when the next step may begin.
    """

    def __init__(self, tell: Callable[[dict[str, Any]], None], wait: Callable[[], object]) -> None:
        self._tell, self._wait = tell, wait
        self._workers = 0
        self._fetched: dict[str, Any] = {}
        self._started = 0.0

    def watch(self, trainer: Any) -> None:
        """Time what the trainer waits for its data, and see what it gets."""
        fetch = trainer.get_batch_samples

        def timed(*args: Any) -> Any:
            started = time.perf_counter()
            samples, items = fetch(*args)
            waited = time.perf_counter() - started
            self._fetched = {
                "waited": waited,
                "targets": sum(int((s["labels"] != -100).sum()) for s in samples),
                "tokens": sum(s["input_ids"].numel() for s in samples),
            }
            return samples, items

        trainer.get_batch_samples = timed

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The model is loaded; the first batch is not."""
        gc.collect()
        self._tell({"loaded": memory("VmRSS")})
        # From here on the peak counts anew.
        Path("/proc/self/clear_refs").write_text("5")
        self._go()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell and wait."""
        seconds = time.perf_counter() - self._started
        self._workers = max(self._workers, sum(private(p.pid) for p in multiprocessing.active_children()))
        self._tell({
            "seconds": seconds, **self._fetched, "peak": memory("VmHWM"), "workers": self._workers
        })  # fmt: skip
        self._go()

    def _go(self) -> None:
        self._wait()
        self._started = time.perf_counter()


def memory(field: str, status: str = "/proc/self/status") -> float:
    """MiB of this process: ``VmRSS`` now, ``VmHWM`` at most so far."""
    line = next(line for line in Path(status).read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def private(pid: int | None) -> float:
    """MiB that a process shares with no other."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


def order_options(recipe: Recipe) -> OrderOptions:
    """As `train-student` reads them from the recipe."""
    training = recipe.training
    return OrderOptions(recipe.seed, training.shuffle_shards, training.group_by_length, training.max_length)


def trainer_class(contender: str, recipe: Recipe, cache: Cache) -> Callable[..., transformers.Trainer]:
    """The contender's trainer without model and arguments, all on the same sequences in the same order."""
    loss, training, split = recipe.loss, recipe.training, cache.split("train")
    if contender == CACHED:
        return partial(
            DistillationTrainer,
            train_dataset=SplitDataset(split),
            data_collator=Collator(cache.plan.tokenizer.pad_id, loss.temperature, packed=training.packing),
            distillation={
                "vocab_size": cache.vocab_size,
                "order": order_options(recipe),
                **loss.model_dump(include={"temperature", "ce_weight", "kd_weight"}),
            },
        )
    sizes = [cache.plan.shards[i].sequences for i in split.shards]
    order = EpochOrder(sizes, cache_id=cache.id, seed=recipe.seed, epoch=0, window=training.shuffle_shards)
    plain = {
        "train_dataset": InOrder(str(cache.directory), order.between(0, len(split)).tolist()),
        "data_collator": plain_batch,
    }
    if contender == SFT:
        return partial(transformers.Trainer, **plain)
    teacher = recipe.teacher
    assert teacher is not None
    live = load_model(teacher.model, quantization="nf4", dtype=teacher.dtype, device=teacher.device)
    return partial(LiveTrainer, teacher=live, temperature=loss.temperature, **plain)


def train(
    request: dict[str, Any], tell: Callable[[dict[str, Any]], None], wait: Callable[[], object] = lambda: None
) -> None:
    """Train for ``request["steps"]`` steps, telling of each, and waiting after each."""
    recipe = parse_recipe(request["recipe"])
    student = recipe.student
    assert student is not None
    transformers.set_seed(recipe.seed)
    made = trainer_class(request["contender"], recipe, open_cache(recipe.cache.directory))
    model = with_adapter(load_student(student), student)
    changes = {"max_steps": request["steps"], "logging_steps": 1_000_000, "save_steps": 1_000_000}
    if request["contender"] != CACHED:
        changes["workers"] = 0  # padding rows that lie in memory is not worth a process
    turns = Turns(tell, wait)
    with tempfile.TemporaryDirectory() as folder:
        arguments = training_arguments(
            recipe.training.model_copy(update=changes),
            device=student.device,
            seed=recipe.seed,
            checkpoints=Path(folder),
        )
        arguments.save_strategy = transformers.trainer_utils.SaveStrategy.NO
        arguments.train_sampling_strategy = "sequential"
        trainer = made(model=model, args=arguments, callbacks=[turns])
        trainer.remove_callback(transformers.PrinterCallback)
        turns.watch(trainer)
        trainer.train()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    quiet_libraries()
    torch.set_num_threads(1)
    # Whatever libraries print goes elsewhere.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    train(json.loads(sys.argv[1]), lambda found: print(json.dumps(found), file=answers), sys.stdin.readline)
