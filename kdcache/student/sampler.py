"""Order of samples = f(cache id, seed, epoch), the same on every machine, and found at any place without what lies before it.

A split of few shards is shuffled as a whole. Of a larger one the shards are permuted, each is shuffled and cut into ``window``
parts, and the parts go by like a conveyor, one shard leaving and one coming with every window (here of 3):

    window 0:  s0 part 0
    window 1:  s0 part 1, s1 part 0
    window 2:  s0 part 2, s1 part 1, s2 part 0
    window 3:             s1 part 2, s2 part 1, s3 part 0

Inside a window, chunks of at least `CHUNK` sequences of one shard (or all that a part has) come in random order. So reading stays sequential on disk,
memory holds ``window`` shards, every shard is read once per epoch, neighbouring batches come from all over the window, and a
batch no larger than a chunk needs two shards at most, wherever a run goes on. (Sequences shuffled over the window would mix
a little better, and a run that goes on would have to read the whole window first: ``benchmarks/training.py`` measures both.)

Global batch ``g`` of an epoch is ``order[g * G : (g + 1) * G]``. How many processes share it, and in how many forward
passes, is arithmetic on top (`BatchPlan`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

CHUNK = 32
# Global batches that are sorted by length together.
_POOL = 32

Indices = NDArray[np.int64]


class EpochOrder:
    """One epoch's order of a split's sequences.

    Args:
        shard_sizes: sequences of each shard of the split.
        cache_id: of the cache.
        seed: of the order.
        epoch: counted from 0.
        window: shards that are mixed at a time; a split of no more is shuffled as a whole.
        lengths: given to group by length: tokens of each sequence of a shard, by the shard's place in the split.
        global_batch: sequences of an optimizer step; only grouping by length depends on it.
    """

    def __init__(
        self,
        shard_sizes: Sequence[int],
        *,
        cache_id: str,
        seed: int,
        epoch: int,
        window: int = 8,
        lengths: Callable[[int], Indices] | None = None,
        global_batch: int = 1,
    ) -> None:
        self._key = f"{cache_id}|{seed}|{epoch}"
        self._sizes = np.asarray(shard_sizes, dtype=np.int64)
        self._first = np.concatenate(([0], np.cumsum(self._sizes)))
        self._shards = self._generator("shards").permutation(len(self._sizes))
        # So few shards are one window.
        self._parts = window if len(self._sizes) > window else 1
        self._together = 1 if len(self._sizes) > window else len(self._sizes)
        self._lengths = lengths
        self._global_batch = global_batch
        if self._together > 1:
            totals = self._sizes.sum(keepdims=True)
        else:
            sizes = self._sizes[self._shards]
            totals = np.zeros(len(sizes) + self._parts - 1, dtype=np.int64)
            for part in range(self._parts):
                totals[part : part + len(sizes)] += sizes // self._parts + (part < sizes % self._parts)
        self._starts = np.concatenate(([0], np.cumsum(totals)))
        self._window = lru_cache(maxsize=2)(self._make_window)

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def windows(self) -> int:
        """Number of windows."""
        return len(self._starts) - 1

    def window_at(self, place: int) -> int:
        """The window in which a place of the order lies."""
        return int(np.searchsorted(self._starts, place, side="right")) - 1

    def shards_of(self, window: int) -> list[int]:
        """Places in the split of the shards that a window mixes, the one that leaves first."""
        if self._together > 1:
            return [int(s) for s in self._shards]
        oldest, newest = max(0, window - self._parts + 1), min(window, len(self._shards) - 1)
        return [int(s) for s in self._shards[oldest : newest + 1]]

    def shards_wanted(self, window: int) -> list[int]:
        """As `shards_of`, without those whose sequences have all gone by: a shard of few has none left in its later windows."""
        shards = self.shards_of(window)
        if self._together > 1:
            return shards
        oldest = max(0, window - self._parts + 1)
        return [s for place, s in enumerate(shards, start=oldest) if self._sizes[s] > window - place]

    def between(self, start: int, stop: int) -> Indices:
        """int64 ``[stop - start]``: indices in the split of the sequences at these places of the order."""
        if start >= stop:
            return np.zeros(0, dtype=np.int64)
        pieces = []
        for window in range(self.window_at(start), self.window_at(stop - 1) + 1):
            low, high = int(self._starts[window]), int(self._starts[window + 1])
            pieces.append(self._window(window)[max(start, low) - low : min(stop, high) - low])
        return np.concatenate(pieces)

    def _generator(self, what: str) -> np.random.Generator:
        digest = hashlib.sha256(f"{self._key}|{what}".encode()).digest()
        return np.random.Generator(np.random.Philox(key=np.frombuffer(digest[:16], dtype="<u8")))

    def _part(self, shard: int, part: int) -> Indices:
        """A shard's sequences that lie in its ``part``-th window, each in exactly one."""
        shuffled = self._generator(f"shard {shard}").permutation(self._sizes[shard]) + self._first[shard]
        return np.asarray(np.array_split(shuffled, self._parts)[part], dtype=np.int64)

    def _make_window(self, window: int) -> Indices:
        generator, shards = self._generator(f"window {window}"), self.shards_of(window)
        if self._together > 1:
            order = generator.permutation(self._first[-1])
        else:
            # The newest of them is in its first part, unless none came with this window.
            youngest = max(0, window - len(self._shards) + 1)
            parts = [self._part(shard, youngest + age) for age, shard in enumerate(reversed(shards))]
            chunks = [chunk for part in parts for chunk in np.array_split(part, max(1, len(part) // CHUNK))]
            order = np.concatenate([chunks[i] for i in generator.permutation(len(chunks))])
        if self._lengths is None:
            return order
        return self._grouped(order, int(self._starts[window]), shards, generator)

    def _grouped(self, order: Indices, start: int, shards: list[int], generator: np.random.Generator) -> Indices:
        """Global batches of similar length, in random order; those that reach over the window's ends stay mixed."""
        size = self._global_batch
        assert self._lengths is not None
        lengths = np.empty(len(order), dtype=np.int64)
        for shard in shards:
            inside = (order >= self._first[shard]) & (order < self._first[shard + 1])
            lengths[inside] = self._lengths(shard)[order[inside] - self._first[shard]]
        head = min(-start % size, len(order))
        whole = (len(order) - head) // size * size
        batches: list[Indices] = []
        for low in range(head, head + whole, size * _POOL):
            pool = np.arange(low, min(low + size * _POOL, head + whole))
            ranked = pool[np.argsort(-lengths[pool], kind="stable")]
            batches += list(ranked.reshape(-1, size))
        mixed = [batches[i] for i in generator.permutation(len(batches))]
        chosen: Indices = order[np.concatenate([np.arange(head), *mixed, np.arange(head + whole, len(order))])]
        return chosen


@dataclass(frozen=True)
class BatchPlan:
    """Which places of an epoch's order each process takes in each forward pass.

    Global batch ``g`` is the same for every split of ``global_batch`` into processes, sequences and forward passes. Only the
    last of an epoch may be smaller; its forward passes are shared out evenly, and a process left without a sequence gets
    a filler, so that all do the same number: every sequence counts once, whatever the split.

    Attributes:
        sequences: of the split.
        batch_size: sequences per process and forward pass.
        accumulation: forward passes per optimizer step.
        world: processes.
        rank: this process.
    """

    sequences: int
    batch_size: int
    accumulation: int
    world: int = 1
    rank: int = 0

    @property
    def global_batch(self) -> int:
        """Sequences per optimizer step."""
        return self.batch_size * self.accumulation * self.world

    @property
    def steps(self) -> int:
        """Optimizer steps per epoch."""
        return -(-self.sequences // self.global_batch)

    @property
    def micro_batches(self) -> int:
        """Forward passes per epoch."""
        whole, rest = divmod(self.sequences, self.global_batch)
        return whole * self.accumulation + -(-rest // (self.batch_size * self.world))

    def span(self, number: int) -> tuple[int, int]:
        """Places ``start, stop`` of this process's forward pass ``number`` of an epoch; none: a filler is due at ``start``."""
        together = self.batch_size * self.world
        step, turn = divmod(number, self.accumulation)
        start = step * self.global_batch + turn * together
        present = min(together, self.sequences - start)
        if present == together:
            return start + self.rank * self.batch_size, start + (self.rank + 1) * self.batch_size
        share, more = divmod(present, self.world)
        low = start + self.rank * share + min(self.rank, more)
        high = low + share + (self.rank < more)
        return (low, high) if high > low else (start, start)


class MicroBatchNumbers(Sampler[list[tuple[int, int]]]):
    """Batch sampler of ``[(epoch, number)]``: which sequences that are is for the reader of the cache to work out.

    So nothing has to be drawn again to go on in the middle of an epoch: the trainer counts up to a number.
    """

    def __init__(self, plan: BatchPlan) -> None:
        self.plan = plan
        self.epoch = 0

    def __len__(self) -> int:
        return self.plan.micro_batches

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = self.epoch
        return ([(epoch, number)] for number in range(len(self)))
