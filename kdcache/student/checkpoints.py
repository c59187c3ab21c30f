"""Checkpoints that appear whole or not at all, and how many of them stay."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import TrainerState
from transformers.trainer_pt_utils import safe_globals

from kdcache.cache.files import flush, sync_directory
from kdcache.models import first_line

_CHECKPOINT = re.compile(r"checkpoint-\d+")
_UNFINISHED = "unfinished"
# What DeepSpeed and FSDP put into a checkpoint in the place of optimizer.pt.
_ENGINES = ("global_step*", "optimizer_*", "optimizer.bin", "pytorch_model_fsdp*")


@contextmanager
def saved_whole(trainer: Any) -> Iterator[None]:
    """Around `Trainer._save_checkpoint`: written aside, made durable, renamed, and only then are older ones removed."""
    args, state = trainer.args, trainer.state
    folder = Path(args.output_dir)
    aside = folder / _UNFINISHED
    name = f"checkpoint-{state.global_step}"
    if args.should_save:
        shutil.rmtree(aside, ignore_errors=True)
    _together(args)
    args.output_dir = str(aside)
    try:
        yield
    finally:
        args.output_dir = str(folder)
    # Every process has written its own random state.
    _together(args)
    if args.should_save:
        for path in sorted((aside / name).rglob("*")):
            (sync_directory if path.is_dir() else flush)(path)
        sync_directory(aside / name)
        # One that could not be read, or that a run from an older one has come to again.
        shutil.rmtree(folder / name, ignore_errors=True)
        (aside / name).rename(folder / name)
        sync_directory(folder)
        shutil.rmtree(aside, ignore_errors=True)
    _together(args)
    state.best_model_checkpoint = best_checkpoint(folder, state.best_global_step)
    if args.should_save and args.save_total_limit:
        kept = {name, *([] if state.best_model_checkpoint is None else [Path(state.best_model_checkpoint).name])}
        for old in checkpoints(folder)[: -args.save_total_limit]:
            if old.name not in kept:
                shutil.rmtree(old, ignore_errors=True)


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest step first."""
    named = [p for p in folder.glob("checkpoint-*") if _CHECKPOINT.fullmatch(p.name)]
    return sorted(named, key=lambda p: int(p.name.rpartition("-")[2]))


def best_checkpoint(folder: Path, step: int | None) -> str | None:
    """Where the checkpoint of the best evaluation lies now; a run directory may have been moved since it was saved."""
    path = folder / f"checkpoint-{step}"
    return str(path) if step and path.is_dir() else None


def problem_of(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be resumed from, or None."""
    state = checkpoint / "trainer_state.json"
    try:
        TrainerState.load_from_json(str(state))
        if any(list(checkpoint.glob(pattern)) for pattern in _ENGINES):
            return None  # its own format, which it checks itself
        weights = list(checkpoint.glob("*.safetensors"))
        if not weights:
            return "no weights"
        for path in weights:
            with safe_open(path, framework="pt"):
                continue
        for name in ("optimizer.pt", "scheduler.pt"):
            torch.load(checkpoint / name, map_location="cpu", weights_only=True)
        with safe_globals():
            for path in checkpoint.glob("rng_state*.pth"):
                torch.load(path, weights_only=True)
    except Exception as exc:  # there is no end to what a damaged file makes its reader raise
        return first_line(exc)
    return None


def _together(args: Any) -> None:
    if args.world_size > 1:
        torch.distributed.barrier()
