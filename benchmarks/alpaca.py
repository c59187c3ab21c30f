"""Distillation on real text: cached KD beside CE alone, same student, same steps, one run.

    python benchmarks/alpaca.py --data DIR/alpaca/train.jsonl.gz --teacher DIR --student DIR

Prints a Markdown table with the cache's size; benchmarks/README.md quotes it.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import torch

from kdcache.console import PlainProgress
from kdcache.recipe import load_recipe
from kdcache.student.distill import distill
from kdcache.student.record import hardware
from kdcache.teacher.capture import capture

RECIPE = Path(__file__).parent / "alpaca.yaml"
ROWS = {
    "cached KD (T 2, λ .5/.5)": [],
    "CE alone": ["loss.ce_weight=1", "loss.kd_weight=0"],
    "cached KD, lr 2e-3": ["training.learning_rate=2e-3"],
    "CE alone, lr 2e-3": ["loss.ce_weight=1", "loss.kd_weight=0", "training.learning_rate=2e-3"],
}


def main() -> None:
    """Make the cache, train every row, print the table."""
    from rich.console import Console

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="Alpaca train file (.jsonl.gz)")
    parser.add_argument("--teacher", required=True, help="teacher folder")
    parser.add_argument("--student", required=True, help="student folder")
    parser.add_argument("--output", default="runs/alpaca", help="where cache and runs go")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    progress = PlainProgress(Console(stderr=True))
    paths = [
        f"data.train.path={args.data}",
        f"data.validation.path={args.data}",
        f"teacher.model={args.teacher}",
        f"student.model={args.student}",
        f"cache.directory={args.output}/cache",
    ]
    cache = capture(load_recipe(RECIPE, paths), progress)
    size = sum(s.bytes for s in cache.manifest.shards)
    positions = sum(s.positions for s in cache.manifest.splits)
    print("| student | steps | loss | perplexity | KL to teacher (T 1) | seconds |\n|---|---:|---:|---:|---:|---:|")
    for number, (name, overrides) in enumerate(ROWS.items()):
        recipe = load_recipe(RECIPE, [*paths, f"output={args.output}/student-{number}", *overrides])
        record = distill(recipe, resume=True, progress=progress)
        scores = record.scores
        if number == 0:
            for row in ("teacher", "student before"):
                s = scores[row]
                print(f"| {row} | | {s['loss']:.4f} | {s['perplexity']:.3f} | {s['kl_to_teacher']:.4f} | |")
        s = scores["student after"]
        print(
            f"| {name} | {record.values['steps']} | {s['loss']:.4f} | {s['perplexity']:.3f} | {s['kl_to_teacher']:.4f} "
            f"| {record.values['seconds']:.0f} |",
            flush=True,
        )
    mass = cache.manifest.splits[1].kept_mass_mean
    print(
        f"\nCache: {positions:,} positions, {size / positions:.1f} bytes each, kept mass on validation {mass[0]:.3f} at T = 1 "
        f"and {mass[1]:.3f} at T = 2; validation {scores['teacher']['tokens']:,.0f} tokens."
    )
    versions = ", ".join(
        f"{k} {v}"
        for k, v in record.values["versions"].items()
        if k in ("torch", "transformers", "peft", "bitsandbytes")
    )
    print(f"Machine: {hardware()['device']}, one thread; {versions}.")


if __name__ == "__main__":
    main()
