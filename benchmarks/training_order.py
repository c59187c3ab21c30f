"""Parts of `training.py` that look at the order of samples: resuming, cuts into processes and workers, mixing."""

from __future__ import annotations

import hashlib
import json
import shutil
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from accelerate import skip_first_batches

from kdcache.cache.codec import ShardContent
from kdcache.cache.reader import Cache, Split, open_cache
from kdcache.cache.writer import CacheWriter
from kdcache.recipe import load_recipe
from kdcache.student.batches import MicroBatches, OrderOptions, SplitDataset, micro_batch_loader
from kdcache.student.collate import Collator
from kdcache.student.sampler import BatchPlan, EpochOrder, MicroBatchNumbers
from kdcache.student.trainer import DistillationTrainer
from tests.cache.samples import TOKENS, VOCAB, sample_plan, sample_rows

HERE = Path(__file__).parent
Indices = np.ndarray[Any, np.dtype[np.int64]]


class OrderError(Exception):
    """A sequence came twice, not at all, or in another global batch."""


def indexed_cache(directory: Path, sizes: Sequence[int], *, longest: int = 10) -> Cache:
    """A cache with shards of so many sequences, whose first two tokens say which one it is; the last is validation."""
    generator = np.random.default_rng(0)
    rows = sample_rows(max(sizes) * longest)
    contents = []
    for start, size in zip(np.cumsum([0, *sizes]), sizes, strict=False):
        lengths = generator.integers(4, longest + 1, size)
        ids = generator.integers(0, VOCAB, lengths.sum()).astype(np.uint32)
        first, index = np.cumsum([0, *lengths[:-1]]), np.arange(start, start + size)
        ids[first], ids[first + 1] = index // VOCAB, index % VOCAB
        targets = np.ones(len(ids), dtype=np.bool_)
        targets[first] = False
        contents.append(ShardContent(lengths.astype(np.int64), ids, targets, rows.slice(0, int(targets.sum()))))
    writer = CacheWriter(directory, sample_plan(contents), TOKENS)
    for index, content in enumerate(contents):
        writer.commit(index, content)
    writer.finalise()
    return open_cache(directory)


class ReadCounter:
    """Counts which shards a cache reads, in the thread that wants them and in the one that reads ahead."""

    def __init__(self, cache: Cache) -> None:
        self._load = cache.load
        self.wanted: list[int] = []
        self.ahead: list[int] = []
        cache.load = self  # type: ignore[method-assign, assignment]

    def __call__(self, index: int) -> ShardContent:
        own = threading.current_thread() is threading.main_thread()
        (self.wanted if own else self.ahead).append(index)
        return self._load(index)


class FirstBatchError(Exception):
    """Ends a training whose first batch is there."""


@dataclass(frozen=True)
class Resumed:
    """Reads and seconds until the first batch after resuming at a step."""

    step: int
    wanted: int
    ahead: int
    seconds: float


class Resumable:
    """A tiny student on a cache, and a checkpoint that says it stands anywhere.

    Args:
        directory: of the cache.
        work: where the checkpoint lies.
        batch: sequences of a step.
        order: of the samples.
    """

    def __init__(self, directory: Path, work: Path, batch: int, order: OrderOptions, epochs: int = 3) -> None:
        self._directory, self._work, self._batch, self._order, self._epochs = directory, work, batch, order, epochs
        trainer, _ = self._trainer()
        trainer.add_callback(_StopAtOnce())
        trainer.train()
        self._checkpoint = work / "checkpoint-1"
        self.steps = int(trainer.state.max_steps)

    def at(self, step: int) -> Resumed:
        """Resume at a step, until the first batch is there."""
        state = self._checkpoint / "trainer_state.json"
        state.write_text(json.dumps({**json.loads(state.read_text()), "global_step": step}))
        trainer, counter = self._trainer()
        fetch, started = trainer.get_batch_samples, 0.0

        def until_there(*args: Any) -> Any:
            nonlocal started
            started = time.perf_counter()
            fetch(*args)
            raise FirstBatchError

        trainer.get_batch_samples = until_there  # type: ignore[method-assign]
        try:
            trainer.train(resume_from_checkpoint=str(self._checkpoint))
        except FirstBatchError:
            return Resumed(step, len(counter.wanted), len(counter.ahead), time.perf_counter() - started)
        raise OrderError(f"the training ended without a batch after step {step}")

    def _trainer(self) -> tuple[DistillationTrainer, ReadCounter]:
        cache = open_cache(self._directory)
        counter = ReadCounter(cache)
        torch.manual_seed(0)
        config = transformers.Qwen2Config(
            vocab_size=VOCAB, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, use_cache=False,
        )  # fmt: skip
        arguments = transformers.TrainingArguments(
            output_dir=str(self._work), per_device_train_batch_size=self._batch, num_train_epochs=self._epochs, save_steps=1,
            use_cpu=True, report_to=[], disable_tqdm=True, remove_unused_columns=False, label_names=["labels"],
            dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = DistillationTrainer(
            model=transformers.AutoModelForCausalLM.from_config(config), args=arguments, data_collator=Collator(0, 1.0),
            train_dataset=SplitDataset(cache.split("train")),
            distillation={
                "vocab_size": VOCAB, "temperature": 1.0, "ce_weight": 0.5, "kd_weight": 0.5, "order": self._order
            },
        )  # fmt: skip
        trainer.remove_callback(transformers.PrinterCallback)
        return trainer, counter


class _StopAtOnce(transformers.TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save = control.should_training_stop = True


def resume_part(shards: int = 200, size: int = 96, batch: int = 16, places: int = 12) -> Iterator[str]:
    """Shard reads and time until the first batch after a real resume, workers 0."""
    yield f"\n### First batch after resuming: {shards:,} shards of {size} sequences, batch {batch}, 3 epochs, 0 workers\n"
    yield "| order | resumed at | steps | shards read for it, median (most) | begun ahead | ms to the batch, median (most) |"
    yield "|---|---|---:|---:|---:|---:|"
    most = 0
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        indexed_cache(work / "cache", [size] * shards + [4])
        for name, order in (
            ("window 2", OrderOptions()),
            ("window 2, grouped by length", OrderOptions(group_by_length=True)),
        ):
            resumable = Resumable(work / "cache", work / name, batch, order)
            total = resumable.steps
            spread = np.random.default_rng(0).integers(1, total, places).tolist()
            for label, steps in {
                "1 %": [total // 100], "99 %": [total * 99 // 100], f"{places} random places": spread
            }.items():  # fmt: skip
                found = [resumable.at(step) for step in steps]
                reads, ms = [f.wanted for f in found], [1000 * f.seconds for f in found]
                most = max(most, *reads)
                at = f"{steps[0]:,} of {total:,}" if len(steps) == 1 else f"of {total:,}"
                yield (
                    f"| {name} | {label} | {at} | {statistics.median(reads):g} ({max(reads)}) "
                    f"| {max(f.ahead for f in found)} | {statistics.median(ms):.0f} ({max(ms):.0f}) |"
                )
    yield f"\nTarget: at most 2 shard reads {'met' if most <= 2 else f'**missed** ({most})'}."


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


def batches_between(
    split: Split, options: OrderOptions, world: int, workers: int, start: int, stop: int
) -> dict[int, list[int]]:
    """Sequences of every global batch of the steps ``start`` to ``stop``, read by every process's own data loader."""
    batch, accumulation = SHARED[world]
    found: dict[int, list[int]] = {step: [] for step in range(start, stop)}
    for rank in range(world):
        plan = BatchPlan(len(split), batch, accumulation, world, rank)
        numbers = MicroBatchNumbers(plan)
        loader = micro_batch_loader(
            MicroBatches(split, plan, options, indices_alone, constant), numbers, workers=workers, pin_memory=False
        )
        step = start
        while step < stop:
            numbers.epoch, inside = divmod(step, plan.steps)
            # As the Trainer resumes.
            skipped = inside * accumulation
            current = skip_first_batches(loader, skipped) if skipped else loader
            for number, read in enumerate(current, skipped):
                step = numbers.epoch * plan.steps + number // accumulation
                if step >= stop:
                    break
                found[step] += read["indices"]
            else:
                step += 1
    return found


def order_part(cuts: int = 50, shards: int = 8, epochs: int = 2, *, loaders: Sequence[int] = (0, 1, 2)) -> Iterator[str]:
    """World x workers x cut points x two resumes, through real data loaders, then many more on paper.

    Raises:
        OrderError: one combination differs.
    """
    combinations_seen = batches_seen = 0
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        sizes = (10 + np.random.default_rng(1).integers(0, 6, shards)).tolist()
        split = indexed_cache(Path(folder) / "cache", [*sizes, 4]).split("train")
        for grouped in (False, True):
            options = OrderOptions(group_by_length=grouped)
            whole = expected(split, options, epochs)
            pairs = list(combinations(range(1, len(whole)), 2))
            chosen = np.random.default_rng(2 + grouped).permutation(len(pairs))[:cuts]
            for world in SHARED:
                for workers in loaders:
                    for first, second in (pairs[i] for i in chosen):
                        # Resumed once as it was, and once with another number of processes.
                        found = {
                            **batches_between(split, options, world, workers, 0, first),
                            **batches_between(split, options, world, workers, first, second),
                            **batches_between(split, options, world % 4 + 1, workers, second, len(whole)),
                        }
                        refuse_difference(found, whole, len(split), f"{world=} {workers=} {first=} {second=} {grouped=}")
                        combinations_seen += 1
                        batches_seen += len(whole)
    papers = on_paper()
    yield "\n### Order of samples under any cut\n"
    yield "| | combinations | global batches | different | duplicates | omissions |\n|---|---:|---:|---:|---:|---:|"
    yield (
        f"| data loaders: world {{1, 2, 3, 4}} x workers {{{', '.join(map(str, loaders))}}} x {cuts} cut points x 2 resumes, "
        f"plain and grouped by length | {combinations_seen:,} | {batches_seen:,} | 0 | 0 | 0 |"
    )
    yield (
        f"| indices alone: random shards, windows 1-8, world {{1, 2, 3, 4}}, plain and grouped | {papers[0]:,} "
        f"| {papers[1]:,} | 0 | 0 | 0 |"
    )
    yield (
        f"\nThe first resume goes on as before, the second with another number of processes; {split.cache.id[:8]}: "
        f"{len(split)} sequences, {epochs} epochs of {len(whole) // epochs} steps, the last of each smaller; "
        f"{time.perf_counter() - started:.0f} s. One difference would have ended this script."
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


def on_paper(trials: int = 400) -> tuple[int, int]:
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
