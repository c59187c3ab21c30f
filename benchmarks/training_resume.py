"""Part of `training.py`: what a resumed training reads before its first batch is there."""

from __future__ import annotations

import json
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from kdcache.cache.codec import ShardContent
from kdcache.cache.reader import Cache, open_cache
from kdcache.cache.writer import CacheWriter
from kdcache.student.batches import OrderOptions, SplitDataset
from kdcache.student.collate import Collator
from kdcache.student.trainer import DistillationTrainer
from tests.cache.samples import TOKENS, VOCAB, sample_plan, sample_rows


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
        raise AssertionError(f"the training ended without a batch after step {step}")

    def _trainer(self) -> tuple[DistillationTrainer, ReadCounter]:
        cache = open_cache(self._directory, keep=self._order.window + 2)
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


def resume_part(shards: int = 200, size: int = 512, batch: int = 16, places: int = 12) -> Iterator[str]:
    """Shard reads and time until the first batch after a real resume, workers 0."""
    yield f"\n### First batch after resuming: {shards:,} shards of {size} sequences, batch {batch}, 3 epochs, 0 workers\n"
    yield "| order | resumed at | steps | shards read for it, median (most) | begun ahead | ms to the batch, median (most) |"
    yield "|---|---|---:|---:|---:|---:|"
    most = 0
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        indexed_cache(work / "cache", [size] * shards + [4])
        for name, order in (
            ("by default", OrderOptions()),
            ("grouped by length", OrderOptions(group_by_length=True)),
        ):
            resumable = Resumable(work / "cache", work / name, batch, order)
            total = resumable.steps
            spread = np.random.default_rng(0).integers(1, total, places).tolist()
            for label, steps in {
                "1 %": [total // 100], "99 %": [total * 99 // 100], f"{places} random places": spread
            }.items():  # fmt: skip
                found = [resumable.at(step) for step in steps]
                reads, ms = [f.wanted for f in found], [1000 * f.seconds for f in found]
                if not order.group_by_length:
                    most = max(most, *reads)
                at = f"{steps[0]:,} of {total:,}" if len(steps) == 1 else f"of {total:,}"
                yield (
                    f"| {name} | {label} | {at} | {statistics.median(reads):g} ({max(reads)}) "
                    f"| {max(f.ahead for f in found)} | {statistics.median(ms):.0f} ({max(ms):.0f}) |"
                )
    yield (
        f"\nTarget: at most 2 shard reads {'met' if most <= 2 else f'**missed** ({most})'}. Grouping needs the lengths of all "
        "sequences of a window first. What is begun ahead is read by a second thread while the first batch is trained on."
    )
