"""Parts of `training.py` that train: step time and memory, waiting for data, padding."""

from __future__ import annotations

import multiprocessing
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gpu_workers import CACHED, CONTENDERS, LIVE, SFT, Bench, Scale, prepare
from training_turns import WARMUP, ContenderError, in_turns

from kdcache.cache.reader import open_cache
from kdcache.progress import Silent
from kdcache.recipe import Recipe, load_recipe
from kdcache.student.batches import MicroBatches
from kdcache.student.collate import pack
from kdcache.student.sampler import BatchPlan

HERE = Path(__file__).parent
# Qwen2.5-0.5B, and its teacher's shape where one is in the loop: Qwen2.5-1.5B.
WIDE = Scale(
    teacher={
        "hidden_size": 1536, "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2,
        "intermediate_size": 8960, "initializer_range": 0.02,
    },
    student={
        "hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
        "intermediate_size": 4864, "initializer_range": 0.02,
    },
    vocabulary=151_936, length=64, sequences=40, batch=2, steps=10, warmup=WARMUP,
)  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """What is trained: a name for the tables, a recipe whose cache is complete, and how many steps."""

    name: str
    recipe: Recipe
    steps: int

    def changed(self, **training: Any) -> dict[str, Any]:
        """The recipe's values with other training settings."""
        section = self.recipe.training.model_copy(update=training)
        return self.recipe.model_copy(update={"training": section}).model_dump(mode="json")

    @property
    def batch(self) -> str:
        """Batch and accumulation in words."""
        assert self.recipe.data is not None
        return f"batch {self.recipe.training.batch_size}, length {self.recipe.data.max_length}"


def alpaca(data: str, teacher: str, student: str, work: Path, steps: int) -> Subject:
    """The Alpaca models with the reference recipe at batch 8, on a cache with the default selection, made if need be."""
    from kdcache.teacher.capture import capture

    recipe = load_recipe(HERE / "alpaca.yaml", [
        f"data.train.path={data}", f"data.validation.path={data}", f"teacher.model={teacher}", f"student.model={student}",
        f"cache.directory={work}/alpaca", f"output={work}/run", "selection.method=threshold_sampling",
        "cache.positions_per_shard=16384", "training.batch_size=8", "training.accumulation=1",
    ])  # fmt: skip
    capture(recipe, Silent())
    return Subject("Alpaca student (1.8 M), teacher 10.4 M", recipe, steps)


def of_scale(name: str, scale: Scale, work: Path) -> Subject:
    """Random models of a scale, and the cache that such a teacher makes, made if need be."""
    bench = Bench(work, scale, "cpu")
    # In a process of its own: what a large teacher took should be free again before anything is measured.
    maker = multiprocessing.get_context("spawn").Process(target=prepare, args=(bench,))
    maker.start()
    maker.join()
    if maker.exitcode:
        raise ContenderError(f"models and cache of {name} could not be made (exit code {maker.exitcode})")
    section = bench.recipe.training.model_copy(update={"batch_size": scale.batch})
    return Subject(name, bench.recipe.model_copy(update={"training": section}), scale.steps)


def paired(own: list[float], other: list[float]) -> float:
    """Median of the ratios step by step."""
    return statistics.median(a / b for a, b in zip(own, other, strict=True))


def steps_part(subject: Subject) -> Iterator[str]:
    """Cached KD beside CE alone and a teacher in the loop."""
    found = in_turns({n: {"recipe": subject.changed(), "contender": n} for n in CONTENDERS}, subject.steps)
    if len({tuple(m.targets) for m in found.values()}) != 1:
        raise ContenderError("the contenders were not trained on the same sequences")
    base = found[SFT]
    whole = {n: m.peak + m.workers for n, m in found.items()}
    extra = {n: whole[n] - m.loaded for n, m in found.items()}
    yield f"\n### Step: {subject.name}, QLoRA, {subject.batch}, {subject.steps} steps in turn\n"
    yield "| | median ms | x SFT, step by step | peak MiB | with its worker | x SFT | above the loaded model | x SFT |"
    yield "|---|---:|---:|---:|---:|---:|---:|---:|"
    for name, own in found.items():
        yield (
            f"| {name} | {1000 * statistics.median(own.seconds):,.0f} | {paired(own.seconds, base.seconds):.3f} "
            f"| {own.peak:,.0f} | {whole[name]:,.0f} | {whole[name] / whole[SFT]:.3f} "
            f"| {extra[name]:,.0f} | {extra[name] / extra[SFT]:.3f} |"
        )
    live = paired(found[LIVE].seconds, found[CACHED].seconds)
    yield (
        f"\nLive KD takes {live:.2f} x the time of cached KD and {whole[LIVE] / whole[CACHED]:.2f} x the memory. Targets: "
        f"time <= 1.05 x SFT {verdict(paired(found[CACHED].seconds, base.seconds) <= 1.05)}, memory <= 1.05 x SFT "
        f"{verdict(whole[CACHED] <= 1.05 * whole[SFT])}."
    )
    yield (
        "\nAll students are loaded by `kdcache.models.load_model`, which gives back what loading leaves on the heap. One process "
        "each: memory has no spread here."
    )


def wait_part(subjects: list[Subject]) -> Iterator[str]:
    """What the trainer waits for its data, alone on the machine as far as this script goes."""
    yield "\n### Waiting for data, as a share of the training time\n"
    yield "| | 0 workers | 1 worker | 2 workers | steps |\n|---|---:|---:|---:|---:|"
    good = True
    for subject in subjects:
        cells = []
        for workers in (0, 1, 2):
            request = {"recipe": subject.changed(workers=workers), "contender": CACHED}
            own = in_turns({CACHED: request}, subject.steps)[CACHED]
            share = sum(own.waited) / sum(own.seconds)
            good &= workers != 1 or share < 0.01
            cells.append(f"{share:.2%} ({1000 * statistics.mean(own.waited):.1f} ms)")
        yield f"| {subject.name}, {subject.batch} | " + " | ".join(cells) + f" | {subject.steps} |"
    yield f"\nTarget: below 1 % with one worker {verdict(good)}."


def padding_part(subject: Subject) -> Iterator[str]:
    """Padding, packing and grouping by length beside each other."""
    ways = {
        "padded": {},
        "packed": {"packing": True},
        "grouped by length": {"group_by_length": True},
        "grouped and packed": {"group_by_length": True, "packing": True},
    }
    requests = {n: {"recipe": subject.changed(**w), "contender": CACHED} for n, w in ways.items()}
    found = in_turns(requests, subject.steps)
    yield f"\n### Padding: {subject.name}, {subject.batch}\n"
    yield "| | padding, whole epoch | median ms | microseconds per token | x padded |\n|---|---:|---:|---:|---:|"
    cost: dict[str, float] = {}
    for name, way in ways.items():
        epoch = lengths_of(subject, way)
        packed = "packing" in way
        shapes = [shape(list(batch), packed=packed) for batch in epoch]
        padding = 1 - sum(int(b.sum()) for b in epoch) / sum(shapes)
        timed = epoch[WARMUP : WARMUP + subject.steps]
        cost[name] = sum(found[name].seconds) / sum(int(b.sum()) for b in timed)
        yield (
            f"| {name} | {padding:.1%} | {1000 * statistics.median(found[name].seconds):,.0f} | {1e6 * cost[name]:,.1f} "
            f"| {cost[name] / cost['padded']:.3f} |"
        )


def lengths_of(subject: Subject, way: dict[str, Any]) -> list[np.ndarray]:
    """Lengths of every batch of the first epoch, in the order in which it is trained."""
    from training_workers import order_options

    recipe = subject.recipe.model_copy(update={"training": subject.recipe.training.model_copy(update=way)})
    split = open_cache(recipe.cache.directory, keep=64).split("train")
    plan = BatchPlan(len(split), recipe.training.batch_size, recipe.training.accumulation)

    def collate(pairs: list[Any], temperature: float) -> dict[str, Any]:
        return {"lengths": np.array([len(s.token_ids) for _, s in pairs])}

    batches = MicroBatches(split, plan, order_options(recipe), collate, lambda step: 1.0)
    return [batches[0, number]["lengths"] for number in range(plan.micro_batches)]


def shape(lengths: list[int], *, packed: bool) -> int:
    """Tokens of a batch with its padding."""
    rows = pack(lengths, max(lengths)) if packed else [[i] for i in range(len(lengths))]
    return len(rows) * max(sum(lengths[i] for i in row) for row in rows)


def verdict(met: bool) -> str:
    """In words."""
    return "met" if met else "**missed**"
