"""``kdcache subset``: part of a cache as a cache of its own, without the teacher.

The parent is read twice, shard by shard: once for what the plan has to say (lengths, digests), once to write. Memory holds
the parent's few decoded shards, one shard being written and 24 bytes per chosen sequence.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kdcache.cache.codec import ShardContent, sequence_digest
from kdcache.cache.derive import DerivedCache, cut_shards, joined, noted, refuse_too_many, write_derived
from kdcache.cache.manifest import Derivation, Plan, SplitPlan
from kdcache.cache.reader import Cache, Split
from kdcache.cache.rows import Floats, SparseRows
from kdcache.cache.selection import SelectionPlan
from kdcache.errors import CacheError
from kdcache.progress import Progress, Silent

_WITH_K = ("top_k", "threshold")


@dataclass(frozen=True)
class _Chosen:
    """Sequences taken from one split: their numbers in the parent, tokens and positions; what the plan says of them."""

    parent: Split
    origin: NDArray[np.int64]
    tokens: NDArray[np.int64]
    positions: NDArray[np.int64]
    plan: SplitPlan


def subset(
    cache: Cache,
    destination: str | Path,
    *,
    splits: Sequence[str] = (),
    sequences: tuple[int | None, int | None] = (None, None),
    max_length: int | None = None,
    k: int | None = None,
    progress: Progress | None = None,
) -> DerivedCache:
    """Write part of ``cache`` to ``destination``.

    Splits keep the parent's order. Where the parent selects positions and its first split is left out, the rest is a cache
    of all positions, as it was. Counts of examples and of what was dropped on the way from the data set stay the
    parent's; what is dropped here comes on top. Sequences cut are the parent's or those cut here, whichever are more.

    Args:
        cache: the parent.
        destination: directory of the subset; one that holds this very subset is gone on with.
        splits: names of the splits to take; all when empty.
        sequences: first and one past the last sequence, of every chosen split, counted as Python does in ``a[first:last]``.
        max_length: longer sequences are cut at the end; those left without a target are dropped.
        k: entries kept per row, the largest (of equal ones those with lower ids); the mass of the others moves into the
            rest at every declared temperature. Methods without draws only.
        progress: told of sequences read and positions written.

    Raises:
        CacheError: nothing is asked for, nothing would be left, or a smaller draw is asked for; the parent is damaged.
        PlanMismatchError: the destination holds another cache.
        StorageError: it cannot be written.
    """
    progress = progress or Silent()
    for name in splits:
        cache.split(name)
    names = [s.name for s in cache.plan.data.splits if not splits or s.name in splits]
    settings = _settings(names if splits else [], sequences, max_length, k)
    if not settings:
        raise CacheError(
            "a subset should be of some splits, sequences, max_length or k; to copy a cache, copy its files"
        )
    selection = cache.plan.selection if k is None else _with_fewer(cache.plan.selection, k)
    if cache.plan.data.splits[0].name not in names:
        # Positions are selected in the first split alone; the others hold every one.
        selection = selection.model_copy(update={"positions": "all", "quantile": 0.0})
    chosen = _read([cache.split(name) for name in names], sequences, max_length, progress)
    plan = _plan(cache, chosen, selection, max_length, settings)

    def content_of(index: int) -> ShardContent:
        shard = plan.shards[index]
        part = chosen[shard.split]
        numbers = part.origin[shard.start : shard.start + shard.sequences].tolist()
        content = joined([part.parent[i].cut(max_length) for i in numbers])
        return content if k is None else replace(content, rows=keep_largest(content.rows, k))

    return write_derived(destination, plan, cache.vocabulary(), content_of, progress)


def keep_largest(rows: SparseRows, k: int) -> SparseRows:
    """The ``k`` largest head entries of every row; the others' mass joins the rest, in float64, at each declared T.

    Args:
        rows: without drawn entries.
        k: at least 1.
    """
    owner = np.repeat(np.arange(len(rows)), rows.head)
    order = np.lexsort((rows.head_ids, -rows.head_logits, owner))
    keep = np.zeros(len(owner), dtype=np.bool_)
    keep[order[np.arange(len(owner)) - rows.head_offsets[owner] < k]] = True
    fewer = replace(
        rows,
        head=np.minimum(rows.head, k),
        head_ids=rows.head_ids[keep],
        head_logits=rows.head_logits[keep],
        design=replace(rows.design, k=k),
    )
    changed = rows.head > k
    rest = rows.rest.copy()
    for column, temperature in enumerate(rows.design.temperatures):
        outside = rows.rest[:, column] + _log_sum(rows.head_logits, owner, len(rows), temperature)
        dropped = _log_sum(rows.head_logits[~keep], owner[~keep], len(rows), temperature)
        inside = _log_sum(fewer.head_logits, owner[keep], len(rows), temperature)
        rest[changed, column] = (np.logaddexp(outside[changed], dropped[changed]) - inside[changed]).astype(np.float32)
    return replace(fewer, rest=rest)


def _log_sum(logits: NDArray[np.float32], owner: NDArray[np.int64], rows: int, temperature: float) -> Floats:
    """float64 ``[rows]``: log of the sum of ``exp(logits / T)`` by owner, ``-inf`` where there is none."""
    terms = np.exp(logits.astype(np.float64) / temperature)
    with np.errstate(divide="ignore"):
        logarithms: Floats = np.log(np.bincount(owner, weights=terms, minlength=rows))
    return logarithms


def _settings(
    splits: Sequence[str], sequences: tuple[int | None, int | None], max_length: int | None, k: int | None
) -> dict[str, str]:
    """What was asked for, as the plan records it."""
    first, last = sequences
    settings = {
        "splits": ",".join(splits),
        "sequences": "" if not first and last is None else f"{first or 0}:{'' if last is None else last}",
        "max_length": "" if max_length is None else str(max_length),
        "k": "" if k is None else str(k),
    }
    if max_length is not None and max_length < 2:
        raise CacheError(f"max_length should be at least 2, a token and the one after it; found {max_length}")
    return {key: value for key, value in settings.items() if value}


def _with_fewer(selection: SelectionPlan, k: int) -> SelectionPlan:
    """The selection with a smaller k."""
    if selection.method not in _WITH_K:
        raise CacheError(
            f"the cache keeps entries by {selection.method}: each drawn entry stands for others by the chance it was drawn "
            f"with, so that fewer of them need the teacher; k can be made smaller for {' and '.join(_WITH_K)} alone. Make a "
            "new cache with kdcache teacher-cache"
        )
    if not 1 <= k < selection.k:
        raise CacheError(
            f"k should lie between 1 and {selection.k - 1}, below the cache's own {selection.k}; found {k}"
        )
    # A budget that floors were found for is no longer met.
    return selection.model_copy(update={"k": k, "bytes_per_position": None})


def _read(
    parents: list[Split], sequences: tuple[int | None, int | None], max_length: int | None, progress: Progress
) -> list[_Chosen]:
    """Look at every sequence in the range."""
    spans = [range(len(parent))[slice(*sequences)] for parent in parents]
    progress.begin("read", sum(map(len, spans)), "sequences")
    try:
        return [_read_split(*each, max_length, progress) for each in zip(parents, spans, strict=True)]
    finally:
        progress.end()


def _read_split(parent: Split, span: range, max_length: int | None, progress: Progress) -> _Chosen:
    table = np.zeros((3, len(span)), dtype=np.int64)
    digest, shortened, kept = hashlib.sha256(), 0, 0
    for number in span:
        whole = parent[number]
        sequence = whole.cut(max_length)
        progress.advance(1)
        if not sequence.targets.any():
            continue
        shortened += sequence is not whole
        digest.update(sequence_digest(sequence.token_ids, sequence.targets))
        table[:, kept] = number, len(sequence.token_ids), len(sequence.rows)
        kept += 1
    if not kept:
        raise CacheError(
            f"nothing would be left of split {parent.name}: it has {len(parent):,} sequences, {len(span):,} of them in the "
            f"range{'' if max_length is None else f', none with a target within {max_length} tokens'}"
        )
    origin, tokens, positions = table[:, :kept]
    before = parent.cache.plan.data.splits[parent.number]
    in_part = len(span) < len(parent)
    plan = before.model_copy(
        update={
            "selected": noted(before.selected + (f" sequences {span.start}:{span.stop}" if in_part else "")),
            "dropped_no_target": before.dropped_no_target + len(span) - kept,
            # What the parent cut is, as a rule, cut again.
            "truncated": max(before.truncated, shortened),
            "sequences": kept,
            "tokens": int(tokens.sum()),
            "positions": int(positions.sum()),
            "fingerprint": digest.hexdigest(),
        }
    )
    return _Chosen(parent, origin, tokens, positions, plan)


def _plan(
    cache: Cache, chosen: list[_Chosen], selection: SelectionPlan, max_length: int | None, settings: dict[str, str]
) -> Plan:
    parents = cache.plan.shards
    limits = {"tokens_limit": max(s.tokens for s in parents), "positions_limit": max(s.positions for s in parents)}
    shards = [
        shard
        for number, part in enumerate(chosen)
        for shard in cut_shards(number, zip(part.tokens.tolist(), part.positions.tolist(), strict=True), **limits)
    ]
    refuse_too_many(shards)
    longest = cache.plan.data.max_length if max_length is None else min(max_length, cache.plan.data.max_length)
    changes = {
        "data": cache.plan.data.model_copy(update={"max_length": longest, "splits": tuple(c.plan for c in chosen)}),
        "selection": selection,
        "shards": tuple(shards),
        "derived": Derivation(operation="subset", parents=(cache.id,), settings=settings),
    }
    return Plan(**{**dict(cache.plan), **changes})
