"""Parts of `training.py`: how well windows of shards mix, and what that does to a student."""

from __future__ import annotations

import json
import math
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.cache.reader import open_cache
from kdcache.student.sampler import EpochOrder

HERE = Path(__file__).parent
# More than there are shards: one window.
FULL = 64


def mixing_part(shards: int = 48, size: int = 512, batch: int = 16, epochs: int = 4) -> Iterator[str]:
    """Global batches of a split that lies on disk sorted by topic, held against a full shuffle of the same split."""
    shuffles = [np.random.default_rng(epoch).permutation(shards * size) for epoch in range(epochs)]
    base = mixing(shuffles, size, batch)
    yield f"\n### Mixing: a split sorted by topic, {shards} shards of {size} sequences, batch {batch}, {epochs} epochs\n"
    yield (
        "| shuffle_shards (default 8) | distinct shards in a batch | of a full shuffle's | spread of the batches' mean place, x a full "
        "shuffle's | correlation of neighbouring batches |"
    )
    yield "|---|---:|---:|---:|---:|"
    for window in (1, 2, 4, 8, 16, FULL):
        orders = [
            EpochOrder([size] * shards, cache_id="mixing", seed=0, epoch=epoch, window=window)
            for epoch in range(epochs)
        ]
        own = mixing([order.between(0, len(order)) for order in orders], size, batch)
        name = f"{window}" if window < shards else f"{window} (all: full shuffle)"
        yield f"| {name} | {own[0]:.2f} | {own[0] / base[0]:.1%} | {own[1] / base[1]:.2f} | {own[2]:.2f} |"
    yield f"| full shuffle by numpy | {base[0]:.2f} | 100.0% | 1.00 | {base[2]:.2f} |"
    yield (
        f"\nA spread of 1 is as good as can be; {math.sqrt(batch):.0f} would be batches of one topic each. A split that lies on "
        "disk in random order is mixed by any window."
    )


def mixing(orders: list[NDArray[np.int64]], size: int, batch: int) -> tuple[float, float, float]:
    """Distinct shards in a batch, standard deviation of the batches' mean place on disk, and their lag-1 correlation."""
    distinct, spread, correlation = [], [], []
    for order in orders:
        whole = order[: len(order) // batch * batch].reshape(-1, batch)
        distinct.append(float(np.mean([len(set(row)) for row in (whole // size).tolist()])))
        means = whole.mean(axis=1)
        spread.append(float(means.std()))
        correlation.append(float(np.corrcoef(means[1:], means[:-1])[0, 1]))
    return statistics.mean(distinct), statistics.mean(spread), statistics.mean(correlation)


def mixing_training_part(
    models: str, *, windows: tuple[int, ...] = (1, 2, 4, 8, FULL), seeds: int = 2, changes: tuple[str, ...] = ()
) -> Iterator[str]:
    """Perplexity of the embedded student after one epoch on a cache that was sorted by topic, for several windows."""
    from kdcache.embedded.make import make_embedded
    from kdcache.progress import Silent
    from kdcache.recipe import EmbeddedSection, parse_recipe
    from kdcache.recipe_yaml import read_values
    from kdcache.student.distill import distill
    from kdcache.teacher.capture import capture

    folder = (
        make_embedded(EmbeddedSection(directory=models)) if not Path(models, "train.jsonl").exists() else Path(models)
    )
    found: dict[int, list[float]] = {window: [] for window in windows}
    with tempfile.TemporaryDirectory() as work:
        rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
        # Instructions of one task begin alike.
        rows.sort(key=lambda row: str(row["instruction"]))
        data = Path(work, "sorted.jsonl")
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))

        def recipe(window: int, seed: int) -> Any:
            values = read_values(HERE.parent / "recipes" / "embedded.yaml", [
                f"data.train.path={data}", f"data.validation.path={folder}/validation.jsonl", f"cache.directory={work}/cache",
                f"teacher.model={folder}/teacher", f"student.model={folder}/student", f"output={work}/{window}-{seed}",
                "cache.positions_per_shard=1024", "training.epochs=1", f"training.shuffle_shards={window}", f"seed={seed}",
                *changes,
            ])  # fmt: skip
            return parse_recipe({k: v for k, v in values.items() if k != "embedded"})

        cache = capture(recipe(windows[0], 0), Silent())
        shards = len(open_cache(cache.directory).split("train").shards)
        for seed in range(seeds):
            for window in windows:
                scores = distill(recipe(window, seed)).scores
                found[window].append(scores["student after"]["perplexity"])
        before = scores["student before"]["perplexity"]
    yield f"\n### A student of a cache sorted by topic ({shards} train shards, one epoch, {seeds} seeds)\n"
    yield f"| shuffle_shards | validation perplexity (before: {before:.3f}) | x the widest, same seed |\n|---|---:|---:|"
    widest = found[windows[-1]]
    for window, own in found.items():
        ratio = statistics.mean(a / b for a, b in zip(own, widest, strict=True))
        cell = ", ".join(f"{perplexity:.3f}" for perplexity in own)
        yield f"| {window if window < shards else 'all'} | {cell} | {ratio:.4f} |"
