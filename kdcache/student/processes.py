"""Several processes that train one student: who does what is done once."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import transformers

from kdcache.errors import KdcacheError

T = TypeVar("T")


def once(arguments: transformers.TrainingArguments, action: Callable[[], T]) -> T:
    """What ``action`` returns or raises in the first process, in all of them; the others do not run it.

    Raises:
        KdcacheError: whatever error of ours the first process met.
    """
    if arguments.world_size == 1:
        return action()
    outcome: list[T | KdcacheError | None] = [None]
    if arguments.process_index == 0:
        try:
            outcome[0] = action()
        except KdcacheError as exc:
            outcome[0] = exc
    torch.distributed.broadcast_object_list(outcome)
    if isinstance(outcome[0], KdcacheError):
        raise outcome[0]
    return outcome[0]  # type: ignore[return-value]


def turns(arguments: transformers.TrainingArguments) -> tuple[int, int]:
    """This process and their number, where processes may work on different batches; sharded models work on the same ones."""
    sharded = bool(arguments.fsdp) or arguments.deepspeed is not None
    return (0, 1) if sharded else (arguments.process_index, arguments.world_size)


def leave() -> None:
    """End the process group: left to the interpreter's exit, a thread of it that still runs may abort the process."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
