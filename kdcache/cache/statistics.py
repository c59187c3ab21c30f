"""What a manifest says of a cache's rows, summed shard by shard so that memory does not grow."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kdcache.cache.layout import KEPT_MASS_BINS
from kdcache.cache.manifest import SplitPlan, SplitSummary
from kdcache.cache.rows import SparseRows


@dataclass(frozen=True)
class RowStatistics:
    """Sums over rows: entries, teacher NLL (nats), kept mass ``[B]`` and its histogram ``[B, bins]``."""

    kept_positions: int
    entries: int
    teacher_nll: float
    kept_mass: NDArray[np.float64]
    kept_mass_histogram: NDArray[np.int64]

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
            kept_mass_histogram=np.stack(histogram),
        )


def summarise(split: SplitPlan, parts: list[RowStatistics]) -> SplitSummary:
    """Totals of one split from its shards' statistics, in shard order."""
    mass = sum((p.kept_mass for p in parts), np.zeros_like(parts[0].kept_mass))
    histogram = sum((p.kept_mass_histogram for p in parts), np.zeros_like(parts[0].kept_mass_histogram))
    kept = sum(p.kept_positions for p in parts)
    reached = np.cumsum(histogram, axis=1) >= 0.01 * kept
    return SplitSummary(
        name=split.name,
        sequences=split.sequences,
        tokens=split.tokens,
        positions=split.positions,
        kept_positions=kept,
        entries=sum(p.entries for p in parts),
        teacher_nll=round(max(0.0, sum(p.teacher_nll for p in parts)), 6),
        kept_mass_mean=tuple(round(float(m), 9) for m in mass / max(1, kept)),
        kept_mass_p1=tuple(float(i) / KEPT_MASS_BINS for i in np.argmax(reached, axis=1)),
    )
