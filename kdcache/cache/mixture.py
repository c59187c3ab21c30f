"""Several caches over the same sequences, read as one whose teacher is the weighted mean of theirs.

A mixture of teachers with weights ``w`` that add up to 1 has at T the distribution ``p = sum_m w_m p_m^(T)``: the mean in
probability space, as an ensemble's. Nothing of it is written: every shard of the first cache is decoded with the same rows
of the others beside it (`MixedRows`), and `kdcache.student.mixed_teacher` works out the target. The caches may be cut
into shards differently and keep different entries; they must number tokens alike and hold the same sequences in the same
order.

A mixture has an id of its own, a digest of ids and weights. It declares the temperatures that all of its caches
declare, and its samples come in the order of the first cache's, so that nothing but the target changes between a run on
the first cache and one on a mixture that begins with it.

Price: ``keep`` decoded shards of the mixture hold the rows of all its caches. Where another cache is cut as the first is, each
of its shards is decoded once as well. Where it is cut otherwise, a shard of the first needs each of the other's that it
overlaps; `_KEPT_BESIDE` of these stay decoded, and since an epoch comes to the shards in random order, a longer cache's
are decoded nearly as often as there are overlaps: `decodings` of them at worst, which the user is told.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from kdcache.cache.codec import ShardContent
from kdcache.cache.manifest import Manifest, Plan, SplitSummary
from kdcache.cache.mixable import common_temperatures, refuse_unmixable
from kdcache.cache.reader import Cache, Split
from kdcache.cache.rows import RowDesign, SparseRows, concatenate
from kdcache.cache.store import open_cache
from kdcache.cache.strict_json import canonical_sha256
from kdcache.errors import CacheError, CorruptCacheError
from kdcache.progress import Progress, Silent

# Digits of a weight that count: 1/3 is the same however it was come by.
_DIGITS = 12
# Decoded shards that are held of a cache whose shards are cut otherwise than the first's.
_KEPT_BESIDE = 4


@dataclass(frozen=True)
class MixedRows:
    """The rows of several teachers at the same positions.

    Attributes:
        parts: one `SparseRows` for each cache, all of the same length P.
        weights: theirs, adding up to 1.
        design: temperatures and draws that hold for all of them.
    """

    parts: tuple[SparseRows, ...]
    weights: tuple[float, ...]
    design: RowDesign

    def __len__(self) -> int:
        return len(self.parts[0])

    @cached_property
    def label_log_prob(self) -> NDArray[np.float32]:
        """float32 ``[P]``: log of the mixed probability of the label at T = 1. Every cache states its own for every
        position, so that it is exact up to their half precision."""
        terms = [
            part.label_log_prob.astype(np.float64) + np.log(weight)
            for part, weight in zip(self.parts, self.weights, strict=True)
        ]
        mixed: NDArray[np.float64] = np.logaddexp.reduce(terms)
        return mixed.astype(np.float32)

    def slice(self, start: int, stop: int) -> MixedRows:
        """Rows ``start:stop`` as a view."""
        return MixedRows(tuple(part.slice(start, stop) for part in self.parts), self.weights, self.design)

    @classmethod
    def concatenated(cls, several: Sequence[MixedRows]) -> MixedRows:
        """Rows of several sequences of one mixture, one after the other."""
        first = several[0]
        own = zip(*(rows.parts for rows in several), strict=True)
        return cls(tuple(concatenate(list(parts)) for parts in own), first.weights, first.design)


class Mixture(Cache):
    """Several caches as one; `open_caches` opens it. Its rows are `MixedRows`.

    Args:
        parts: caches with their weights, which are divided by their sum.
        keep: decoded shards that stay in memory.

    Raises:
        PlanMismatchError: they number tokens differently or hold other sequences, which are named.
        CacheError: a weight is not above 0, no temperature is declared by all, or one keeps some positions alone.
    """

    def __init__(self, parts: Sequence[tuple[Cache, float]], keep: int = 8) -> None:
        for cache, weight in parts:
            if not 0 < weight < float("inf"):
                raise CacheError(f"the weight of {cache.directory} in a mixture should be above 0, found {weight:g}")
        total = sum(weight for _, weight in parts)
        self.parts = tuple(cache for cache, _ in parts)
        self.weights = tuple(round(weight / total, _DIGITS) for _, weight in parts)
        refuse_unmixable(self.parts)
        described = [{"cache_id": c.id, "weight": w} for c, w in zip(self.parts, self.weights, strict=True)]
        digest = canonical_sha256({"format": "kdcache-mixture", "caches": described})
        plan = _plan(self.parts, self.weights)
        manifest = _manifest(self.parts, self.weights, plan)
        super().__init__(self.first.directory, plan, manifest, digest, keep)

    @property
    def first(self) -> Cache:
        """The cache whose order and shards the mixture has."""
        return self.parts[0]

    def described(self) -> list[dict[str, Any]]:
        """What a run records: ``cache_id``, ``weight`` and ``teacher`` of each cache."""
        return [
            {"cache_id": cache.id, "weight": weight, "teacher": cache.plan.teacher.name}
            for cache, weight in zip(self.parts, self.weights, strict=True)
        ]

    def look_over(self) -> None:
        """`Cache.look_over` of each.

        Raises:
            CorruptCacheError: a shard is damaged.
        """
        for cache in self.parts:
            cache.look_over()

    def load(self, index: int) -> ShardContent:
        """Shard ``index`` of the first cache, with rows of all; not remembered.

        Raises:
            CorruptCacheError: a shard is damaged, or holds other sequences than its plan says.
        """
        content = self.first.load(index)
        shard = self.plan.shards[index]
        name, stop = self.plan.data.splits[shard.split].name, shard.start + shard.sequences
        rows = [content.rows]
        for other in self.parts[1:]:
            pieces = list(_pieces(other.split(name), shard.start, stop))
            ids, flags = (np.concatenate([getattr(p, key) for p in pieces]) for key in ("token_ids", "targets"))
            if not (np.array_equal(ids, content.token_ids) and np.array_equal(flags, content.targets)):
                raise CorruptCacheError(
                    f"sequences {shard.start} to {stop - 1} of split {name} in {other.directory} are not those that its "
                    "plan states; kdcache verify says more"
                )
            rows.append(pieces[0].rows if len(pieces) == 1 else concatenate([p.rows for p in pieces]))
        mixed = MixedRows(tuple(rows), self.weights, self.plan.design(shard.split))
        # Whoever asks more of it than MixedRows has is to fail, and not to get the first teacher alone.
        return ShardContent(content.lengths, content.token_ids, content.targets, cast(SparseRows, mixed))


def open_caches(
    places: Sequence[tuple[str | Path, float]], *, keep: int = 8, progress: Progress | None = None
) -> Cache:
    """The cache at one place, or the mixture of those at several.

    Args:
        places: directories or URLs with their weights; with one place its weight does not matter.
        keep: decoded shards that stay in memory.
        progress: told of a cache that is brought from a URL, and what is mixed.

    Raises:
        CacheError: one cannot be opened, or they cannot be mixed; `Mixture` says why.
        TransferError: a URL cannot be read.
    """
    progress = progress or Silent()
    opened = [
        (open_cache(place, keep=_KEPT_BESIDE if number else keep, progress=progress), weight)
        for number, (place, weight) in enumerate(places)
    ]
    if len(opened) == 1:
        return opened[0][0]
    mixture = Mixture(opened, keep)
    total = sum(weight for _, weight in opened)
    shares = ", ".join(f"{m['weight']:g} of {m['cache_id'][:12]} ({m['teacher']})" for m in mixture.described())
    divided = "" if abs(total - 1) < 1e-9 else f"; the weights were divided by their sum, {total:g}"
    progress.message(f"a mixture of {len(opened)} caches: {shares}{divided}")
    for other in mixture.parts[1:]:
        if (times := decodings(mixture.first, other)) > 1:
            progress.message(
                f"{other.directory} is cut into shards otherwise than {mixture.first.directory}: an epoch decodes each of its shards "
                f"up to {times:.1f} times; caches made with the same cache.positions_per_shard are decoded once"
            )
    return mixture


def order_id(cache: Cache) -> str:
    """The id that the order of samples is a function of: a mixture has the order of its first cache."""
    return cache.first.id if isinstance(cache, Mixture) else cache.id


def decodings(first: Cache, other: Cache) -> float:
    """How many times at worst each shard of ``other`` is decoded, on average, when every shard of a mixture that begins with
    ``first`` is decoded once in any order; of the split where that is most."""
    most = 1.0
    for name in first:
        ours, theirs = first.split(name).starts, other.split(name).starts
        shards = len(theirs) - 1
        # Two rows of intervals over one line meet in as many pairs as there are intervals in the two cut together.
        overlaps = len({*ours, *theirs}) - 1
        if shards > _KEPT_BESIDE:
            most = max(most, overlaps / shards)
    return most


def _pieces(split: Split, start: int, stop: int) -> Iterator[ShardContent]:
    """Sequences ``start:stop`` of a split, shard by shard."""
    while start < stop:
        place = bisect_right(split.starts, start) - 1
        first, end = split.starts[place], min(stop, split.starts[place + 1])
        if (start, end) == (first, split.starts[place + 1]):
            yield split.cache.load(split.shards[place])
        else:
            content = split.cache.shard(split.shards[place])
            tokens = slice(*content.token_offsets[[start - first, end - first]].tolist())
            rows = content.row_offsets[[start - first, end - first]].tolist()
            yield ShardContent(
                content.lengths[start - first : end - first],
                content.token_ids[tokens],
                content.targets[tokens],
                content.rows.slice(*rows),
            )
        start = end


def _plan(parts: Sequence[Cache], weights: Sequence[float]) -> Plan:
    """The first cache's plan with what holds for all: common temperatures, and draws only if all have them."""
    first = parts[0]
    common = common_temperatures(parts)
    least = next((c for c in parts if not c.plan.design(0).sampled), first).plan.selection
    floors = tuple(f for f, t in zip(least.floors, least.temperatures, strict=False) if t in common)
    names = " + ".join(f"{w:g} {Path(c.plan.teacher.name).name}" for c, w in zip(parts, weights, strict=True))
    return first.plan.model_copy(
        update={
            "teacher": first.plan.teacher.model_copy(update={"name": f"a mixture of {names}", "revision": None}),
            "selection": least.model_copy(update={"temperatures": common, "floors": floors}),
        }
    )


def _manifest(parts: Sequence[Cache], weights: Sequence[float], plan: Plan) -> Manifest:
    """The first cache's manifest with the mean kept mass. The loss on labels is none that could be had from theirs: who
    wants it reads `MixedRows.label_log_prob`."""
    summaries = []
    for number, name in enumerate(parts[0]):
        masses = [
            np.array(c.split(name).summary.kept_mass_mean)[
                [c.temperatures.index(t) for t in plan.selection.temperatures]
            ]
            for c in parts
        ]
        mean = tuple(np.average(masses, axis=0, weights=weights).tolist())
        own: SplitSummary = parts[0].manifest.splits[number]
        changed = {"teacher_nll": float("nan"), "kept_mass_mean": mean, "kept_mass_p1": (0.0,) * len(mean)}
        summaries.append(own.model_copy(update=changed))
    return parts[0].manifest.model_copy(update={"splits": tuple(summaries)})
