"""A cache made from other caches: its own plan, written as every cache is, with rows taken over instead of computed.

Rows that were decoded from a shard and are encoded again keep every stored number, so that deriving loses nothing. The
same call again goes on where it stopped, since the plan follows from the parents and the settings alone. What a parent
drew stays as it was drawn: the digest behind the draws is the parent's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from kdcache.cache.codec import CachedSequence, ShardContent
from kdcache.cache.layout import PLAN_FILE, SHARDS_LIMIT
from kdcache.cache.manifest import Manifest, Plan, ShardPlan
from kdcache.cache.reader import read_plan
from kdcache.cache.rows import concatenate
from kdcache.cache.writer import CacheWriter
from kdcache.errors import CacheError, PlanMismatchError
from kdcache.progress import Progress

_TEXT_LIMIT = 4096
_NAMED = 4


@dataclass(frozen=True)
class DerivedCache:
    """A finished derived cache: where it is, its plan and manifest, and how many shards this call made."""

    directory: Path
    plan: Plan
    manifest: Manifest
    shards_made: int


def write_derived(
    destination: str | Path,
    plan: Plan,
    vocabulary: list[str | None],
    content_of: Callable[[int], ShardContent],
    progress: Progress,
) -> DerivedCache:
    """Write the shards of ``plan`` that are not there yet, then the manifest.

    Args:
        destination: created if absent; otherwise empty, or holding the same plan.
        plan: of the derived cache.
        vocabulary: the parents'.
        content_of: rows of one shard of ``plan``, by its index.
        progress: told of positions written.

    Raises:
        PlanMismatchError: the destination belongs to another plan.
        CacheError: it holds something else, or a parent is damaged.
        StorageError: it cannot be written; committed shards stay.
    """
    _refuse_other_cache(Path(destination), plan)
    writer = CacheWriter(destination, plan, vocabulary)
    todo, complaints = writer.survey()
    for complaint in complaints:
        progress.warning(f"{complaint}; it is made again now")
    progress.begin("write", sum(plan.shards[i].positions for i in todo), "positions")
    try:
        for index in todo:
            content = content_of(index)
            design = plan.design(plan.shards[index].split)
            writer.commit(index, replace(content, rows=replace(content.rows, design=design)))
            progress.advance(plan.shards[index].positions)
    finally:
        progress.end()
    return DerivedCache(writer.directory, plan, writer.finalise(), len(todo))


def refuse_too_many(shards: Sequence[ShardPlan]) -> None:
    """A plan has so many shards at most.

    Raises:
        CacheError: it would have more.
    """
    if len(shards) > SHARDS_LIMIT:
        raise CacheError(f"a cache has at most {SHARDS_LIMIT:,} shards, this would have {len(shards):,}")


def noted(text: str) -> str:
    """Text within what a plan holds."""
    return text if len(text) <= _TEXT_LIMIT else text[: _TEXT_LIMIT - 1] + "…"


def joined(sequences: Sequence[CachedSequence]) -> ShardContent:
    """Sequences laid end to end; inverse of indexing a `ShardContent`."""
    return ShardContent(
        lengths=np.array([len(s.token_ids) for s in sequences], dtype=np.int64),
        token_ids=np.concatenate([s.token_ids for s in sequences]),
        targets=np.concatenate([s.targets for s in sequences]),
        rows=concatenate([s.rows for s in sequences]),
    )


def cut_shards(
    split: int, sizes: Iterable[tuple[int, int]], *, tokens_limit: int, positions_limit: int
) -> list[ShardPlan]:
    """Consecutive sequences, as many to a shard as keep it within both limits.

    Args:
        split: number of the split.
        sizes: tokens and positions of each sequence.
        tokens_limit: most tokens of a shard; a sequence that holds more is a shard of its own.
        positions_limit: most positions, likewise.
    """
    shards: list[ShardPlan] = []
    start = sequences = tokens = positions = 0

    def close() -> None:
        shards.append(ShardPlan(split=split, start=start, sequences=sequences, tokens=tokens, positions=positions))

    for own_tokens, own_positions in sizes:
        if sequences and (positions + own_positions > positions_limit or tokens + own_tokens > tokens_limit):
            close()
            start, sequences, tokens, positions = start + sequences, 0, 0, 0
        sequences, tokens, positions = sequences + 1, tokens + own_tokens, positions + own_positions
    if sequences:
        close()
    return shards


def _refuse_other_cache(destination: Path, plan: Plan) -> None:
    """A destination that holds a cache holds this one; what was asked for comes first in what is told."""
    if not (destination / PLAN_FILE).exists() or (existing := read_plan(destination)) == plan:
        return
    differing = sorted(plan.differences(existing), key=lambda field: not field.startswith("derived"))
    more = f"; and {len(differing) - _NAMED} more" if len(differing) > _NAMED else ""
    raise PlanMismatchError(
        f"{destination} holds another cache. Now asked for, against what is there: {'; '.join(differing[:_NAMED])}{more}. Give "
        "another destination"
    )
