"""Order of samples = f(cache id, seed, epoch), the same on every machine.

Shards are permuted and read a few at a time; sequences are shuffled inside such a window. Reading
stays nearly sequential on disk, and memory holds one window.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

WINDOW_SHARDS = 4


def epoch_order(
    shard_sizes: Sequence[int], *, cache_id: str, seed: int, epoch: int, window: int = WINDOW_SHARDS
) -> NDArray[np.int64]:
    """int64 ``[sum(shard_sizes)]``: every sequence index once, in this epoch's order."""
    key = hashlib.sha256(f"{cache_id}|{seed}|{epoch}".encode()).digest()
    generator = np.random.Generator(np.random.Philox(key=np.frombuffer(key[:16], dtype="<u8")))
    starts = np.concatenate(([0], np.cumsum(shard_sizes))).astype(np.int64)
    shards = generator.permutation(len(shard_sizes))
    order = []
    # Windows of equal size: a last window of one shard would be mixed less than the others.
    for members_of in np.array_split(shards, -(-len(shards) // window)):
        members = [np.arange(starts[s], starts[s + 1]) for s in members_of]
        order.append(generator.permutation(np.concatenate(members)))
    return np.concatenate(order)


class ShardSampler(Sampler[int]):
    """`epoch_order` as a torch sampler; the trainer calls `set_epoch`."""

    def __init__(self, shard_sizes: Sequence[int], *, cache_id: str, seed: int) -> None:
        self._sizes = list(shard_sizes)
        self._cache_id = cache_id
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration gives."""
        self._epoch = epoch

    def __len__(self) -> int:
        return sum(self._sizes)

    def __iter__(self) -> Iterator[int]:
        order = epoch_order(self._sizes, cache_id=self._cache_id, seed=self._seed, epoch=self._epoch)
        return iter(order.tolist())
