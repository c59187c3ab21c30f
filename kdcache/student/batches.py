"""A split of a cache as a data set of ready micro-batches: item ``(epoch, number)`` is what this process trains on then."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, get_worker_info

from kdcache.cache.codec import CachedSequence
from kdcache.cache.mixture import order_id
from kdcache.cache.reader import Split
from kdcache.student.sampler import BatchPlan, EpochOrder, MicroBatchNumbers

Batch = dict[str, Any]


class SplitDataset(Dataset[tuple[int, CachedSequence]]):
    """A split of a cache, or its first ``fraction``, as a map-style data set of ``(index, sequence)``."""

    def __init__(self, split: Split, fraction: float = 1.0) -> None:
        self.split = split
        self._length = max(1, round(len(split) * fraction))

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> tuple[int, CachedSequence]:
        return index, self.split[index]


@dataclass(frozen=True)
class OrderOptions:
    """What besides the cache the order of samples depends on; as `EpochOrder` takes it."""

    seed: int = 0
    window: int = 8
    group_by_length: bool = False
    max_length: int | None = None


class MicroBatches(Dataset[Batch]):
    """Micro-batches of one process, each worked out from its number alone.

    Args:
        split: of the cache.
        plan: how global batches are shared out; of a split with more sequences than the plan has, the first are taken.
        order: seed and manner of the order.
        collate: makes a batch of ``(index, sequence)`` pairs at a temperature.
        temperature_at: the temperature at an optimizer step, counted from 0.
    """

    def __init__(
        self,
        split: Split,
        plan: BatchPlan,
        order: OrderOptions,
        collate: Callable[..., Batch],
        temperature_at: Callable[[int], float],
    ) -> None:
        self._split = split
        self._plan = plan
        self._options = order
        self._collate = collate
        self._temperature_at = temperature_at
        self._order: tuple[int, EpochOrder] | None = None
        self._announced = (-1, -1)

    def __len__(self) -> int:
        return self._plan.sequences

    def __getitem__(self, key: tuple[int, int]) -> Batch:
        epoch, number = key
        order = self._order_of(epoch)
        start, stop = self._plan.span(number)
        filler = start == stop
        indices = order.between(start, stop + filler).tolist()
        pairs = [(i, self._split[i]) for i in indices]
        # Only now: what is needed at once should not wait for what is needed soon.
        self._read_ahead(epoch, order, start)
        if filler:
            pairs = [(-1, pairs[0][1])]
        temperature = self._temperature_at(epoch * self._plan.steps + number // self._plan.accumulation)
        batch = {**self._collate(pairs, temperature=temperature), "temperature": temperature}
        return batch if get_worker_info() is None else _as_arrays(batch)

    def __getitems__(self, keys: list[tuple[int, int]]) -> list[Batch]:
        """What a DataLoader asks for."""
        return [self[key] for key in keys]

    def _order_of(self, epoch: int) -> EpochOrder:
        if self._order is None or self._order[0] != epoch:
            cache, options = self._split.cache, self._options
            order = EpochOrder(
                first_sizes([cache.plan.shards[i].sequences for i in self._split.shards], self._plan.sequences),
                cache_id=order_id(cache),
                seed=options.seed,
                epoch=epoch,
                window=options.window,
                lengths=self._lengths if options.group_by_length else None,
                global_batch=self._plan.global_batch,
            )
            self._order = epoch, order
        return self._order[1]

    def _lengths(self, shard: int) -> NDArray[np.int64]:
        lengths = self._split.cache.shard(self._split.shards[shard]).lengths
        return lengths if self._options.max_length is None else np.minimum(lengths, self._options.max_length)

    def _read_ahead(self, epoch: int, order: EpochOrder, start: int) -> None:
        """Once in every window: have its shards decoded meanwhile, and the one that comes with the next."""
        window = order.window_at(start)
        if (epoch, window) == self._announced:
            return
        self._announced = epoch, window
        here = order.shards_wanted(window)
        coming = order.shards_wanted(window + 1) if window + 1 < order.windows else []
        self._split.read_ahead([*here, *(s for s in coming if s not in here)])


def first_sizes(sizes: Sequence[int], sequences: int) -> list[int]:
    """How many of the first ``sequences`` lie in each shard, without the shards that hold none of them."""
    cut = []
    for size in sizes:
        if sequences <= 0:
            break
        cut.append(min(size, sequences))
        sequences -= size
    return cut


def micro_batch_loader(
    batches: MicroBatches, numbers: MicroBatchNumbers, *, workers: int, pin_memory: bool
) -> DataLoader[Batch]:
    """A DataLoader of ready micro-batches; its workers live as long as it does, and remember which shards they verified."""
    return DataLoader(
        batches,
        batch_sampler=numbers,
        collate_fn=_only,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=pin_memory,
        # Its own: drawing from the global generator would shift the student's dropout by how often workers were started.
        generator=torch.Generator(),
    )


def as_tensors(batch: Batch) -> Batch:
    """A batch as a worker sent it, with the tensors it was made of."""
    return {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in batch.items()}


def _as_arrays(batch: Batch) -> Batch:
    """Arrays go through a pipe; for every tensor torch would open a file of shared memory, which takes longer."""
    return {k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


def _only(items: list[Batch]) -> Batch:
    return items[0]
