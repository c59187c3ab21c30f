"""Shards of an imported cache, one after the other, out of splits that can only be read from start to end."""

from __future__ import annotations

from collections.abc import Iterator

from kdcache.cache.codec import CachedSequence, ShardContent
from kdcache.cache.derive import joined
from kdcache.cache.manifest import Plan
from kdcache.errors import DataError
from kdcache.exchange.imported_plan import Split


class Contents:
    """Shards by their number, made from splits that are read from start to end."""

    def __init__(self, plan: Plan, found: list[Split]) -> None:
        self._plan, self._found = plan, found
        self._stream: tuple[int, int, Iterator[CachedSequence]] | None = None

    def content(self, index: int) -> ShardContent:
        """Rows of shard ``index``; shards of a split are asked for in their order."""
        shard = self._plan.shards[index]
        split, at, stream = self._stream or (-1, 0, iter(()))
        if split != shard.split or at > shard.start:
            split, at, stream = shard.split, 0, self._found[shard.split].read()
        for _ in range(shard.start - at):
            next(stream, None)
        sequences = [s for _, s in zip(range(shard.sequences), stream, strict=False)]
        if len(sequences) != shard.sequences:
            raise DataError(
                f"split {self._plan.data.splits[shard.split].name} is shorter than its plan; a line or row is missing"
            )
        at = shard.start + shard.sequences
        if at == self._plan.data.splits[split].sequences and next(stream, None) is not None:
            raise DataError(f"split {self._plan.data.splits[split].name} is longer than its plan")
        self._stream = split, at, stream
        return joined(sequences)
