"""Several processes that train one student: who does what is done once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import transformers

from kdcache.errors import KdcacheError, TrainingError

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


def launched() -> int:
    """How many processes a launcher started, 1 without one.

    Raises:
        TrainingError: its variables do not make sense.
    """
    said = {name: os.environ.get(name) for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR")}
    size = said["WORLD_SIZE"]
    if size is None:
        return 1
    if not size.isascii() or not size.isdigit() or size == "0":
        raise TrainingError(
            f"WORLD_SIZE should be the number of processes, found {size!r}; let torchrun or accelerate launch set it"
        )
    missing = [name for name, value in said.items() if value is None]
    if int(size) > 1 and missing:
        raise TrainingError(
            f"WORLD_SIZE says {size} processes, but {' and '.join(missing)} is not set; start them with torchrun or accelerate "
            "launch, or unset WORLD_SIZE"
        )
    return int(size)


def turns(arguments: transformers.TrainingArguments) -> tuple[int, int]:
    """This process and their number, where processes may work on different batches; sharded models work on the same ones."""
    return (0, 1) if is_sharded() else (arguments.process_index, arguments.world_size)


def is_sharded() -> bool:
    """Whether the launcher asks for an engine that cuts the model or the optimizer: FSDP or DeepSpeed."""
    return any(os.environ.get(f"ACCELERATE_USE_{engine}") == "true" for engine in ("FSDP", "DEEPSPEED"))


@contextmanager
def loaded_whole() -> Iterator[None]:
    """Load a model whole although ZeRO-3 is on, and leave the cutting to the trainer: transformers would cut while it loads,
    which rules out placing it on a device."""
    from transformers.integrations import deepspeed

    config = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = config


def leave() -> None:
    """End the process group: left to the interpreter's exit, a thread of it that still runs may abort the process."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
