"""Trainings that are killed by SIGKILL at random moments and gone on with, until they end in the student of an undisturbed one.

    python benchmarks/robustness_training.py [--kills 50]

A QLoRA student with dropout, a 8-bit optimizer, a worker and a checkpoint every few steps; every sitting is a process of its
own, and whatever moment the kill hits (loading, a step, a checkpoint, the end) is fair. Exits with 1 if one byte differs.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ADAPTER = "model/adapter_model.safetensors"


def _values(folder: Path) -> dict[str, Any]:
    """A recipe of two epochs over tiny models, which it makes, with their cache."""
    from kdcache.embedded.make import make_embedded
    from kdcache.recipe import EmbeddedSection, parse_recipe
    from kdcache.teacher.capture import capture

    section = EmbeddedSection(
        directory=str(folder / "models"), train_examples=96, validation_examples=8, pretrain_examples=64, teacher_steps=4,
        student_steps=2,
    )  # fmt: skip
    models = make_embedded(section)
    values: dict[str, Any] = {
        "output": str(folder / "whole"),
        "cache": {"directory": str(folder / "cache"), "positions_per_shard": 200},
        "data": {name: {"path": str(models / f"{name}.jsonl")} for name in ("train", "validation")},
        "teacher": {"model": str(models / "teacher"), "device": "cpu"},
        "student": {"model": str(models / "student"), "quantization": "nf4", "device": "cpu"},
        "training": {
            "epochs": 3,
            "batch_size": 4,
            "save_steps": 5,
            "logging_steps": 1,
            "gradient_checkpointing": False,
        },
    }
    capture(parse_recipe(values))
    return values


def _sit(values: dict[str, Any]) -> None:
    import torch

    from kdcache.recipe import parse_recipe
    from kdcache.student.distill import distill

    os.setpgrp()  # a kill takes the workers along, as the end of a job does
    torch.set_num_threads(1)
    distill(parse_recipe(values), resume=True)


def run(kills: int, seed: int = 0) -> tuple[int, int, int]:
    """Kills dealt out, trainings ended, and how many of these differ from the undisturbed one."""
    chance, context = random.Random(seed), get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers", "peft", "bitsandbytes", "kdcache.student.distill"])
    dealt = ended = differing = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        values = _values(folder)
        sitting = context.Process(target=_sit, args=(values,))
        started = time.monotonic()
        sitting.start()
        sitting.join()
        longest = time.monotonic() - started
        expected = (folder / "whole" / ADAPTER).read_bytes()
        values["output"] = str(folder / "killed")
        while dealt < kills or ended == 0:
            sitting = context.Process(target=_sit, args=(values,))
            sitting.start()
            sitting.join(timeout=chance.uniform(0.1, longest) if dealt < kills else None)
            if sitting.is_alive():
                assert sitting.pid is not None
                try:
                    os.killpg(sitting.pid, signal.SIGKILL)
                except ProcessLookupError:  # not yet a group of its own
                    sitting.kill()
                sitting.join()
                dealt += 1
                continue
            assert sitting.exitcode == 0, "a training that was gone on with failed"
            ended += 1
            differing += (folder / "killed" / ADAPTER).read_bytes() != expected
            shutil.rmtree(folder / "killed")
    return dealt, ended, differing


def main() -> None:
    """Deal out the kills and say what came of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    started = time.monotonic()
    dealt, ended, differing = run(parser.parse_args().kills)
    print(f"{dealt} kills, {ended} trainings ended, {differing} of them differ ({time.monotonic() - started:.0f} s)")
    sys.exit(1 if differing else 0)


if __name__ == "__main__":
    main()
