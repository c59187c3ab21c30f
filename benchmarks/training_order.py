"""Part of `training.py`: the same global batches for any number of processes and workers, resumed anywhere."""

from __future__ import annotations

import itertools
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import skip_first_batches
from training_resume import indexed_cache

from kdcache.cache.reader import Split
from kdcache.student.batches import MicroBatches, OrderOptions, micro_batch_loader
from kdcache.student.sampler import BatchPlan, EpochOrder, MicroBatchNumbers
from tests.cache.samples import VOCAB


class OrderError(Exception):
    """A sequence came twice, not at all, or in another global batch."""


# Sequences of a step, and how each number of processes shares them: per forward pass, and forward passes.
GLOBAL_BATCH = 12
SHARED = {1: (4, 3), 2: (3, 2), 3: (2, 2), 4: (3, 1)}


def indices_alone(pairs: Sequence[tuple[int, Any]], temperature: float) -> dict[str, Any]:
    """A collator: which sequences these are, by what the data set says and by their own first tokens."""
    told = [i for i, _ in pairs if i >= 0]
    if told != [int(s.token_ids[0]) * VOCAB + int(s.token_ids[1]) for i, s in pairs if i >= 0]:
        raise OrderError(f"the sequences at {told} are others")
    return {"indices": told}


def constant(step: int) -> float:
    """A temperature."""
    return 1.0


def read(batches: list[MicroBatches], numbers: MicroBatchNumbers, skipped: int) -> Iterator[dict[str, Any]]:
    """What a data loader with so many workers returns, without processes: batches are dealt out to them in turn."""
    for turn, [key] in enumerate(itertools.islice(numbers, skipped, None)):
        yield batches[turn % len(batches)][key]


def batches_between(
    split: Split, options: OrderOptions, world: int, workers: int, start: int, stop: int, *, processes: bool
) -> dict[int, list[int]]:
    """Sequences of every global batch of the steps ``start`` to ``stop``, as every process reads its own.

    Args:
        split: made by `indexed_cache`.
        options: of the order.
        world: training processes; what one of them reads is independent of the others.
        workers: of each one's data loader.
        start: first step, counted over all epochs.
        stop: step after the last.
        processes: read through a DataLoader, its workers real processes.
    """
    batch, accumulation = SHARED[world]
    found: dict[int, list[int]] = {step: [] for step in range(start, stop)}
    for rank in range(world):
        plan = BatchPlan(len(split), batch, accumulation, world, rank)
        numbers = MicroBatchNumbers(plan)
        readers = [MicroBatches(split, plan, options, indices_alone, constant) for _ in range(max(1, workers))]
        loader = micro_batch_loader(readers[0], numbers, workers=workers, pin_memory=False)
        step = start
        while step < stop:
            numbers.epoch, inside = divmod(step, plan.steps)
            skipped = inside * accumulation
            # As the Trainer resumes.
            resumed = skip_first_batches(loader, skipped) if skipped else loader
            for number, batch_read in enumerate(resumed if processes else read(readers, numbers, skipped), skipped):
                step = numbers.epoch * plan.steps + number // accumulation
                if step >= stop:
                    break
                found[step] += batch_read["indices"]
            else:
                step += 1
    return found


def order_part(
    cuts: int = 50, loader_cuts: int = 3, shards: int = 8, epochs: int = 2, trials: int = 150
) -> Iterator[str]:
    """World x workers x cut points x two resumes, and many more shapes of caches.

    Args:
        cuts: pairs of cut points.
        loader_cuts: as many of them again through real data loaders.
        shards: of the cache.
        epochs: of the training.
        trials: shapes of caches whose order alone is looked at.

    Raises:
        OrderError: one combination differs.
    """
    seen = {False: [0, 0], True: [0, 0]}
    with tempfile.TemporaryDirectory() as folder:
        sizes = (10 + np.random.default_rng(1).integers(0, 6, shards)).tolist()
        split = indexed_cache(Path(folder) / "cache", [*sizes, 4]).split("train")
        for grouped, processes in itertools.product((False, True), (False, True)):
            options = OrderOptions(group_by_length=grouped)
            whole = expected(split, options, epochs)
            pairs = list(itertools.combinations(range(1, len(whole)), 2))
            chosen = np.random.default_rng(2 + grouped).permutation(len(pairs))[: loader_cuts if processes else cuts]
            for world, workers, pair in itertools.product(SHARED, (0, 1, 2), chosen):
                first, second = pairs[pair]
                # Resumed once as it was, and once with another number of processes.
                parts = ((world, 0, first), (world, first, second), (world % 4 + 1, second, len(whole)))
                found: dict[int, list[int]] = {}
                for own, start, stop in parts:
                    found |= batches_between(split, options, own, workers, start, stop, processes=processes)
                refuse_difference(found, whole, len(split), f"{world=} {workers=} {first=} {second=} {grouped=}")
                seen[processes][0] += 1
                seen[processes][1] += len(whole)
    paper = on_paper(trials)
    rows = {
        f"world {{1, 2, 3, 4}} x workers {{0, 1, 2}} x {cuts} cut points x 2 resumes, twice (plain, grouped)": seen[
            False
        ],
        f"the same with {loader_cuts} cut points through DataLoaders with real workers": seen[True],
        "orders of random shards, windows 1 to 8, plain and grouped, world {1, 2, 3, 4}, one cut": paper,
    }
    yield "\n### Order of samples under any cut\n"
    yield "| | combinations | global batches | different | duplicates | omissions |\n|---|---:|---:|---:|---:|---:|"
    for name, (checked, batches) in rows.items():
        yield f"| {name} | {checked:,} | {batches:,} | 0 | 0 | 0 |"
    yield (
        f"\nThe first resume goes on as before, the second with another number of processes; {len(split)} sequences in "
        f"{shards} shards, {epochs} epochs of {len(whole) // epochs} steps, the last of each smaller. One difference ends this "
        "script with an error."
    )


def expected(split: Split, options: OrderOptions, epochs: int) -> list[list[int]]:
    """The global batches as the order defines them, without any loader."""
    cache, batches = split.cache, []
    for epoch in range(epochs):
        order = EpochOrder(
            [cache.plan.shards[i].sequences for i in split.shards], cache_id=cache.id, seed=options.seed, epoch=epoch,
            window=options.window, global_batch=GLOBAL_BATCH,
            lengths=(lambda shard: cache.shard(split.shards[shard]).lengths) if options.group_by_length else None,
        )  # fmt: skip
        for start in range(0, len(split), GLOBAL_BATCH):
            batches.append(order.between(start, min(start + GLOBAL_BATCH, len(split))).tolist())
    return batches


def refuse_difference(found: dict[int, list[int]], whole: list[list[int]], sequences: int, where: str) -> None:
    """Hold global batches against the expected ones, and count every sequence of every epoch.

    Raises:
        OrderError: they differ.
    """
    steps = -(-sequences // GLOBAL_BATCH)
    for epoch in range(len(whole) // steps):
        seen = Counter(i for step in range(epoch * steps, (epoch + 1) * steps) for i in found[step])
        twice, never = sum(n > 1 for n in seen.values()), sequences - len(seen)
        if twice or never:
            raise OrderError(f"{where}: {twice} duplicates and {never} omissions in epoch {epoch}")
    different = [step for step, batch in enumerate(whole) if sorted(found[step]) != sorted(batch)]
    if different:
        raise OrderError(f"{where}: other global batches at the steps {different[:8]}")


def on_paper(trials: int) -> tuple[int, int]:
    """Orders and plans alone, for many shapes of caches: combinations and global batches checked."""
    generator = np.random.default_rng(3)
    checked = batches = 0
    for trial in range(trials):
        sizes = generator.integers(1, 60, generator.integers(1, 40))
        lengths = [generator.integers(2, 300, size) for size in sizes]
        order = EpochOrder(
            sizes.tolist(), cache_id="paper", seed=trial, epoch=trial % 3, window=trial % 8 + 1, global_batch=GLOBAL_BATCH,
            lengths=lengths.__getitem__ if trial % 2 else None,
        )  # fmt: skip
        whole = order.between(0, len(order))
        expected_batches = [whole[i : i + GLOBAL_BATCH].tolist() for i in range(0, len(whole), GLOBAL_BATCH)]
        for world, (batch, accumulation) in SHARED.items():
            cut = int(generator.integers(0, len(expected_batches) + 1))
            found: dict[int, list[int]] = {step: [] for step in range(len(expected_batches))}
            for rank in range(world):
                plan = BatchPlan(len(order), batch, accumulation, world, rank)
                for first, last in ((0, cut), (cut, plan.steps)):
                    # A process that starts at the cut knows nothing of what lies before.
                    fresh = EpochOrder(
                        sizes.tolist(), cache_id="paper", seed=trial, epoch=trial % 3, window=trial % 8 + 1,
                        global_batch=GLOBAL_BATCH, lengths=lengths.__getitem__ if trial % 2 else None,
                    )  # fmt: skip
                    for number in range(first * accumulation, min(last * accumulation, plan.micro_batches)):
                        found[number // accumulation] += fresh.between(*plan.span(number)).tolist()
            refuse_difference(found, expected_batches, len(order), f"on paper {trial=} {world=}")
            checked += 1
            batches += len(expected_batches)
    return checked, batches
