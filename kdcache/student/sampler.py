"""Order of samples = f(cache id, seed, epoch), the same on every machine.

Shards are permuted and read a few at a time; sequences are shuffled inside such a window. Reading
stays nearly sequential on disk, and memory holds one window.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

WINDOW_SHARDS = 4


def epoch_order(
    shard_sizes: Sequence[int], *, cache_id: str, seed: int, epoch: int, window: int = WINDOW_SHARDS
) -> NDArray[np.int64]:
    """int64 ``[sum(shard_sizes)]``: every sequence index once, in this epoch's order."""
    windows = epoch_windows(shard_sizes, cache_id=cache_id, seed=seed, epoch=epoch, window=window)
    return np.concatenate([order for _, order in windows])


def epoch_windows(
    shard_sizes: Sequence[int], *, cache_id: str, seed: int, epoch: int, window: int = WINDOW_SHARDS
) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """The same in its windows: the shards (numbers within the split) and the order of their sequences."""
    key = hashlib.sha256(f"{cache_id}|{seed}|{epoch}".encode()).digest()
    generator = np.random.Generator(np.random.Philox(key=np.frombuffer(key[:16], dtype="<u8")))
    starts = np.concatenate(([0], np.cumsum(shard_sizes))).astype(np.int64)
    shards = generator.permutation(len(shard_sizes))
    windows = []
    # Windows of equal size: a last window of one shard would be mixed less than the others.
    for members_of in np.array_split(shards, -(-len(shards) // window)):
        members = [np.arange(starts[s], starts[s + 1]) for s in members_of]
        windows.append((members_of, generator.permutation(np.concatenate(members))))
    return windows


class ShardSampler(Sampler[int]):
    """`epoch_order` as a torch sampler; the trainer calls `set_epoch`.

    Args:
        shard_sizes: sequences of each shard of the split.
        cache_id: of the cache.
        seed: of the order.
        upcoming: told the shards of the window after the one that begins, so that they can be read ahead.
    """

    def __init__(
        self,
        shard_sizes: Sequence[int],
        *,
        cache_id: str,
        seed: int,
        upcoming: Callable[[Sequence[int]], None] | None = None,
    ) -> None:
        self._sizes = list(shard_sizes)
        self._cache_id = cache_id
        self._seed = seed
        self._upcoming = upcoming
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration gives."""
        self._epoch = epoch

    def __len__(self) -> int:
        return sum(self._sizes)

    def __iter__(self) -> Iterator[int]:
        windows = epoch_windows(self._sizes, cache_id=self._cache_id, seed=self._seed, epoch=self._epoch)
        for number, (_, order) in enumerate(windows):
            if self._upcoming is not None and number + 1 < len(windows):
                self._upcoming(windows[number + 1][0].tolist())
            yield from order.tolist()
