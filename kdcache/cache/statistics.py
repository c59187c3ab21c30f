"""What a manifest says of a cache's rows, summed shard by shard so that memory does not grow."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kdcache.cache.layout import KEPT_MASS_BINS
from kdcache.cache.manifest import SplitPlan, SplitSummary
from kdcache.cache.rows import SparseRows


@dataclass(frozen=True)
class RowStatistics:
    """Sums over rows: entries, teacher NLL (nats), kept mass ``[B]`` and its histogram ``[B, bins]`` (uint32)."""

    kept_positions: int
    entries: int
    teacher_nll: float
    kept_mass: NDArray[np.float64]
    kept_mass_histogram: NDArray[np.uint32]

    @classmethod
    def of(cls, rows: SparseRows) -> RowStatistics:
        """Statistics of one shard's rows, in float64."""
        mass = rows.kept_mass()[rows.kept]
        bins = np.minimum((mass * KEPT_MASS_BINS).astype(np.int64), KEPT_MASS_BINS - 1)
        histogram = [np.bincount(column, minlength=KEPT_MASS_BINS) for column in bins.T]
        return cls(
            kept_positions=len(mass),
            entries=rows.entries,
            teacher_nll=float(-rows.label_log_prob.astype(np.float64).sum()),
            kept_mass=mass.sum(axis=0),
            kept_mass_histogram=np.stack(histogram).astype(np.uint32),
        )


class SplitTotals:
    """Running totals of one split; shards are added in their order, for sums of floats depend on it."""

    def __init__(self, temperatures: int) -> None:
        self._kept = self._entries = 0
        self._nll = 0.0
        self._mass = np.zeros(temperatures)
        self._histogram = np.zeros((temperatures, KEPT_MASS_BINS), dtype=np.int64)

    def add(self, part: RowStatistics) -> None:
        """Add the split's next shard."""
        self._kept += part.kept_positions
        self._entries += part.entries
        self._nll += part.teacher_nll
        self._mass += part.kept_mass
        self._histogram += part.kept_mass_histogram

    def summary(self, split: SplitPlan) -> SplitSummary:
        """What a manifest says of the split, once all its shards have been added."""
        reached = np.cumsum(self._histogram, axis=1) >= 0.01 * self._kept
        return SplitSummary(
            name=split.name,
            sequences=split.sequences,
            tokens=split.tokens,
            positions=split.positions,
            kept_positions=self._kept,
            entries=self._entries,
            teacher_nll=round(max(0.0, self._nll), 6),
            kept_mass_mean=tuple(round(float(m), 9) for m in self._mass / max(1, self._kept)),
            kept_mass_p1=tuple(float(i) / KEPT_MASS_BINS for i in np.argmax(reached, axis=1)),
        )


def same_totals(found: SplitSummary, stated: SplitSummary) -> bool:
    """Equal counts, and sums equal up to what another processor's exponentials may differ by."""
    if any(
        getattr(found, field) != getattr(stated, field) for field in ("name", "entries", "positions", "kept_positions")
    ):
        return False
    pairs = [(found.teacher_nll, stated.teacher_nll), *zip(found.kept_mass_mean, stated.kept_mass_mean, strict=True)]
    pairs += [(a + 1.0, b + 1.0) for a, b in zip(found.kept_mass_p1, stated.kept_mass_p1, strict=True)]
    return all(
        math.isclose(a, b, rel_tol=1e-3 if i > len(found.kept_mass_mean) else 1e-6) for i, (a, b) in enumerate(pairs)
    )
