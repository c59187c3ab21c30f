"""``kdcache merge``: caches of one family, made by one teacher in one way from different data, as one cache.

Splits of one name follow each other in the order of the parents, shard by shard: every shard keeps its content and its
content hash, and only its number and plan digest are new. The parents are read twice, once for what the plan has to say
and once to write; memory holds one decoded shard and 16 bytes per sequence.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kdcache.cache.derive import DerivedCache, noted, refuse_too_many, write_derived
from kdcache.cache.layout import DIGEST_BYTES
from kdcache.cache.manifest import DataPlan, Derivation, Plan, ShardPlan, SplitPlan
from kdcache.cache.reader import Cache, Split
from kdcache.cache.selection import SelectionPlan
from kdcache.errors import CacheError, PlanMismatchError
from kdcache.progress import Progress, Silent

# What has to be the same, by section. The budget says only how the floors were found.
_FAMILY: dict[str, tuple[str, ...]] = {
    "teacher": ("fingerprint", "architecture", "quantization", "dtype"),
    "tokenizer": ("fingerprint", "vocab_size", "eos_id", "pad_id"),
    "data": ("prompt", "system", "date", "template_sha256"),
    "selection": tuple(name for name in SelectionPlan.model_fields if name != "bytes_per_position"),
}
_PARENTS_LIMIT = 1024
_SPLITS_LIMIT = 16


@dataclass(frozen=True)
class _Place:
    """Where a shard of the merged cache comes from."""

    cache: Cache
    index: int


def merge(caches: Sequence[Cache], destination: str | Path, *, progress: Progress | None = None) -> DerivedCache:
    """Write the sequences of all ``caches`` to ``destination``.

    A sequence that stands in several parents, or in a split to train on and in another, is kept, and the progress is
    warned of it with the count.

    Args:
        caches: the parents, at least two.
        destination: directory of the merged cache; one that holds this very merge is gone on with.
        progress: told of shards read and positions written.

    Raises:
        PlanMismatchError: the parents differ in teacher, tokenizer, prompt or selection, or the destination holds another cache.
        CacheError: too few or too many caches; one is damaged.
        StorageError: the destination cannot be written.
    """
    progress = progress or Silent()
    if not 2 <= len(caches) <= _PARENTS_LIMIT:
        raise CacheError(f"a merge is of 2 to {_PARENTS_LIMIT:,} caches, found {len(caches)}")
    first = caches[0]
    for other in caches[1:]:
        _refuse_stranger(first, other)
    names = list(dict.fromkeys(s.name for cache in caches for s in cache.plan.data.splits))
    if len(names) > _SPLITS_LIMIT:
        raise CacheError(f"a cache has at most {_SPLITS_LIMIT} splits, these have {len(names)} of different names")
    _refuse_mixed_positions(caches, names)
    parts = [[c.split(name) for c in caches if c.plan.split_index(name) is not None] for name in names]
    digests = _digests(parts, progress)
    _warn_of_repeats(names, digests, progress)
    splits = [_split_plan(own, d) for own, d in zip(parts, digests, strict=True)]
    places, shards = _shards(parts)
    refuse_too_many(shards)
    changes = {
        "data": _data_plan([c.plan.data for c in caches], splits),
        "shards": tuple(shards),
        "derived": Derivation(operation="merge", parents=tuple(c.id for c in caches), settings={}),
    }
    plan = Plan(**{**dict(first.plan), **changes})
    return write_derived(
        destination, plan, first.vocabulary(), lambda i: places[i].cache.load(places[i].index), progress
    )


def _refuse_stranger(first: Cache, other: Cache) -> None:
    """Caches of one family alone are merged; every field that differs is named."""
    differing = []
    for section, fields in _FAMILY.items():
        ours, theirs = getattr(first.plan, section), getattr(other.plan, section)
        for field in fields:
            a, b = getattr(ours, field), getattr(theirs, field)
            if a != b:
                differing.append(f"{section}.{field}: {a!r} against {b!r}")
    if not differing:
        return
    hint = ""
    if first.plan.selection.floors != other.plan.selection.floors:
        hint = "; floors that were found for a byte budget can be given to another recipe as selection.floors"
    raise PlanMismatchError(
        f"{first.directory} and {other.directory} cannot be merged, they should have one teacher, tokenizer, prompt and "
        f"selection: {'; '.join(differing)}{hint}"
    )


def _refuse_mixed_positions(caches: Sequence[Cache], names: list[str]) -> None:
    """Positions are selected in a cache's first split alone, so that it has to be the first of every parent."""
    if caches[0].plan.selection.positions == "all":
        return
    for cache in caches:
        own = cache.plan.data.splits[0].name
        if own != names[0]:
            raise PlanMismatchError(
                f"{cache.directory} selects positions in its first split {own}, {caches[0].directory} in {names[0]}: no cache "
                f"can hold both; merge them without it (kdcache subset --split)"
            )


def _digests(parts: list[list[Split]], progress: Progress) -> list[NDArray[np.uint8]]:
    """uint8 ``[S, 16]`` for each merged split: the sequences' digests in order."""
    progress.begin("read", sum(len(split.shards) for own in parts for split in own), "shards")
    try:
        digests = []
        for own in parts:
            found = [np.zeros((0, DIGEST_BYTES), dtype=np.uint8)]
            for split in own:
                for index in split.shards:
                    found.append(split.cache.load(index).digests)
                    progress.advance(1)
            digests.append(np.concatenate(found))
    finally:
        progress.end()
    return digests


def _warn_of_repeats(names: list[str], digests: list[NDArray[np.uint8]], progress: Progress) -> None:
    different = [np.unique(d, axis=0) for d in digests]
    for name, every, once in zip(names, digests, different, strict=True):
        if len(once) < len(every):
            progress.warning(
                f"{len(every) - len(once):,} of {len(every):,} sequences of split {name} repeat another one of it; all are kept"
            )
    across = np.concatenate(different)
    shared = len(across) - len(np.unique(across, axis=0))
    if shared:
        progress.warning(
            f"{shared:,} sequences stand in more than one of the splits {', '.join(names)}: scores on a split that was also "
            "trained on say little"
        )


def _split_plan(own: list[Split], digests: NDArray[np.uint8]) -> SplitPlan:
    plans = [split.cache.plan.data.splits[split.number] for split in own]
    counts = (
        "examples", "dropped_empty", "dropped_no_target", "truncated", "sequences", "tokens", "positions",
    )  # fmt: skip
    return plans[0].model_copy(
        update={
            "source": _all_of(p.source for p in plans),
            "revision": None if all(p.revision is None for p in plans) else _all_of(str(p.revision) for p in plans),
            "selected": _all_of(p.selected for p in plans),
            **{name: sum(getattr(p, name) for p in plans) for name in counts},
            "fingerprint": hashlib.sha256(digests.tobytes()).hexdigest(),
        }
    )


def _data_plan(plans: list[DataPlan], splits: list[SplitPlan]) -> DataPlan:
    columns = {
        column: _all_of(p.columns[column] for p in plans if column in p.columns) for p in plans for column in p.columns
    }
    return plans[0].model_copy(
        update={
            "shape": "+".join(sorted({shape for p in plans for shape in p.shape.split("+")})),
            "columns": columns,
            "max_length": max(p.max_length for p in plans),
            "splits": tuple(splits),
        }
    )


def _shards(parts: list[list[Split]]) -> tuple[list[_Place], list[ShardPlan]]:
    """The parents' shards, split by split, each starting where the one before ends."""
    places, shards = [], []
    for number, own in enumerate(parts):
        start = 0
        for split in own:
            for index in split.shards:
                shard = split.cache.plan.shards[index]
                places.append(_Place(split.cache, index))
                shards.append(shard.model_copy(update={"split": number, "start": start}))
                start += shard.sequences
    return places, shards


def _all_of(texts: Iterable[str]) -> str:
    """Different texts in order, joined."""
    return noted("+".join(dict.fromkeys(texts)))
