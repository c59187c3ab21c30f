"""Which share of the shards this process makes: one of ``count`` workers that know nothing of each other.

Worker i of n makes the shards whose number leaves i when divided by n. There is no process group and nothing is sent:
workers meet in the cache directory alone, so they may start and end at any time, on any machine that sees it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from kdcache.errors import RecipeError

_WAY_OUT = "give --worker i/n, such as --worker 0/1 for a process that makes every shard"


@dataclass(frozen=True)
class Worker:
    """Worker ``index`` of ``count``, from 0; ``local`` numbers the workers of one machine where that is known."""

    index: int
    count: int
    local: int | None = None

    def __str__(self) -> str:
        return f"worker {self.index} of {self.count} (counted from 0)"

    def shards(self, total: int) -> range:
        """The numbers of its shards, of ``total``."""
        return range(self.index, total, self.count)

    def device(self, device: str) -> str:
        """The device for this worker: its own GPU where the machine has several and ``device`` leaves it open."""
        if self.local is None or device not in ("auto", "cuda"):
            return device
        import torch

        # Some launchers show each process one GPU only, others all of them.
        visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
        return f"cuda:{self.local % visible}" if visible > 1 else device


ALONE = Worker(0, 1)


def which_worker(option: str | None, environment: Mapping[str, str]) -> Worker:
    """The worker that ``--worker i/n`` names, or else torchrun's variables, or else Slurm's, or else the only one.

    Slurm: a job array's task, a task of ``srun``, or a task of ``srun`` within an array's task. ``SLURM_NTASKS`` does not
    count, for it is set in a batch script too, which runs once.

    Raises:
        RecipeError: a value is no number, or values contradict each other.
    """
    local = _number(environment, "LOCAL_RANK", default=_number(environment, "SLURM_LOCALID"))
    if option is not None:
        match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", option)
        if match is None:
            raise RecipeError(f"--worker should be i/n with 0 <= i < n, found {option!r}; {_WAY_OUT}")
        return _worker(int(match[1]), int(match[2]), local, f"--worker {option}")
    rank, size = _number(environment, "RANK"), _number(environment, "WORLD_SIZE")
    if rank is not None and size is not None:
        return _worker(rank, size, local, f"RANK {rank} of WORLD_SIZE {size}")
    if rank is not None or size is not None:
        raise RecipeError(f"of the variables RANK and WORLD_SIZE one is set and the other is not; {_WAY_OUT}")
    task, tasks = _array_task(environment)
    step, steps = _step_task(environment)
    return _worker(task * steps + step, tasks * steps, local, "Slurm's variables")


def _array_task(environment: Mapping[str, str]) -> tuple[int, int]:
    """Place in a job array and its size; (0, 1) outside of one."""
    task = _number(environment, "SLURM_ARRAY_TASK_ID")
    if task is None:
        return 0, 1
    count = _number(environment, "SLURM_ARRAY_TASK_COUNT")
    first = _number(environment, "SLURM_ARRAY_TASK_MIN")
    stride = _number(environment, "SLURM_ARRAY_TASK_STEP", default=1)
    if count is None or first is None or not stride:
        raise RecipeError(
            f"SLURM_ARRAY_TASK_ID is set, but SLURM_ARRAY_TASK_COUNT, _MIN or _STEP is not or is 0; {_WAY_OUT}"
        )
    last = _number(environment, "SLURM_ARRAY_TASK_MAX", default=first + (count - 1) * stride)
    place, odd = divmod(task - first, stride)
    if odd or not 0 <= place < count or last != first + (count - 1) * stride:
        raise RecipeError(
            f"the array's task {task} is not one of {count} numbers from {first} in steps of {stride}; a list with gaps has "
            f"no places: {_WAY_OUT}"
        )
    return place, count


def _step_task(environment: Mapping[str, str]) -> tuple[int, int]:
    """Place among the tasks that one ``srun`` started, and their number; (0, 1) outside of it."""
    steps = _number(environment, "SLURM_STEP_NUM_TASKS")
    step = _number(environment, "SLURM_PROCID")
    return (0, 1) if steps is None or step is None else (step, steps)


def _worker(index: int, count: int, local: int | None, said: str) -> Worker:
    if not 0 <= index < count:
        raise RecipeError(f"{said}: there is no worker {index} of {count}, counted from 0; {_WAY_OUT}")
    return Worker(index, count, local)


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int | None:
    text = environment.get(name)
    if text is None or text == "":
        return default
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise RecipeError(f"the variable {name} should be a number, found {text!r}; {_WAY_OUT}")
    return int(text)
