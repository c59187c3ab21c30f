"""From bytes per position to probability floors, measured on a sample of the plan's own sequences.

With floor tau a position keeps ``sum_v min(1, p_v / tau)`` entries on average (head and draws). Every declared temperature
is given the floor at which it alone would keep the same number ``n``; then ``n`` is searched for which the rows, encoded
and compressed as the cache will be, come to the budget. The sums come from histograms of log p, so that one pass over the
vocabulary serves every floor.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from kdcache.cache.codec import ShardContent, encode
from kdcache.cache.layout import MINIMUM_FLOOR
from kdcache.cache.reader import read_plan
from kdcache.cache.rows import SparseRows
from kdcache.cache.shard import pack
from kdcache.cache.writer import refuse_occupied, refuse_other_plan
from kdcache.data.tokens import TokenRow
from kdcache.errors import RecipeError
from kdcache.progress import Progress
from kdcache.teacher import draws
from kdcache.teacher.forward import Select, Thin, Uniforms
from kdcache.teacher.planning import PlannedCache
from kdcache.teacher.sample import HiddenSample
from kdcache.teacher.select import Selected, Selection, select

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from kdcache.cache.selection import SelectionPlan

SAMPLE_POSITIONS = 4096
_BINS_PER_E, _BINS = 16, 16 * 40
_CLOSE_ENOUGH, _TRIES = 0.01, 8
_MOST_ENTRIES = 4096.0


def selection_of(plan: SelectionPlan) -> Selection:
    """The plan's selection as the value `select` takes."""
    return Selection(
        plan.method, plan.temperatures, plan.k, plan.floors, plan.draws, plan.tail_logits, plan.positions == "entropy"
    )


def chance_of(
    planned: PlannedCache, selection: Selection, split: int
) -> tuple[Select, Callable[[TokenRow], Uniforms] | None, Thin | None]:
    """How rows of a split are selected, the numbers behind their draws, and which positions are left out."""
    plan = planned.plan
    chosen: Select = lambda logits, labels, uniforms: select(logits, labels, selection, uniforms)  # noqa: E731
    numbers = None
    if selection.uniforms:
        numbers = partial(draws.uniforms, plan.digest, per_position=selection.uniforms)
    thin = None
    if plan.design(split).some_empty:
        thin = partial(draws.thin, by=plan.selection.positions, quantile=plan.selection.quantile)
    return chosen, numbers, thin


def adopted_floors(planned: PlannedCache, directory: Path) -> PlannedCache | None:
    """The plan with the floors of the one in ``directory``, which a run goes on with; None where there is none yet.

    Raises:
        CacheError: the directory holds something else, or a plan that differs in more than its floors.
    """
    if not refuse_occupied(directory):
        return None
    same = planned.with_floors(read_plan(directory).selection.floors)
    refuse_other_plan(directory, same.plan)
    return same


def find_floors(planned: PlannedCache, sample: HiddenSample, *, progress: Progress) -> PlannedCache:
    """The plan with floors that meet its bytes per position on ``sample``.

    Raises:
        RecipeError: text and labels alone take more than the budget.
    """
    budget = planned.plan.selection.bytes_per_position
    if budget is None:
        return planned
    scale = FloorScale.of(sample, selection_of(planned.plan.selection))

    def size(n: float) -> float:
        return bytes_per_position(planned.with_floors(scale.floors(n)), sample)

    # Bytes grow almost linearly in n: a secant from two points is there in a few steps.
    low, high = (1.0, size(1.0)), (8.0, size(8.0))
    if low[1] > budget * (1 + _CLOSE_ENOUGH):
        raise RecipeError(
            f"selection.bytes_per_position {budget:g} is too small: text, labels and one entry per temperature take "
            f"{low[1]:.1f} bytes per position on this data"
        )
    best = min(low, high, key=lambda tried: abs(tried[1] - budget))
    for _ in range(_TRIES):
        if abs(best[1] / budget - 1) <= _CLOSE_ENOUGH or low[0] == high[0]:
            break
        slope = max((high[1] - low[1]) / (high[0] - low[0]), 1e-3)
        n = float(np.clip(high[0] + (budget - high[1]) / slope, 1.0, min(_MOST_ENTRIES, 4 * high[0])))
        low, high = high, (n, size(n))
        best = min(best, high, key=lambda tried: abs(tried[1] - budget))
    n, reached = best
    found = planned.with_floors(scale.floors(n))
    named = found.plan.selection.floors
    floors = ", ".join(f"{f:g} at T = {t:g}" for f, t in zip(named, scale.temperatures, strict=True))
    progress.message(
        f"probability floors for {budget:g} bytes per position: {floors} ({reached:.1f} bytes on {len(sample):,} positions)"
    )
    if reached < budget * 0.95:
        lowest = min(named) <= MINIMUM_FLOOR
        why = f"no floor below {MINIMUM_FLOOR:g} is allowed" if lowest else "selection.k, or all there is, is reached"
        progress.message(f"the budget is not used up: {why}")
    return found


def bytes_per_position(planned: PlannedCache, sample: HiddenSample) -> float:
    """Size of the sample's shard as this plan would write it, over its positions."""
    rows = sample_content(planned, sample)
    data = pack(encode(rows, values=planned.plan.selection.values), plan_digest=planned.plan.digest, index=0)
    return len(data) / len(rows.rows)


def sample_content(planned: PlannedCache, sample: HiddenSample) -> ShardContent:
    """The sample as a shard of this plan; positions are selected as in the first split."""
    chosen, numbers, thin = chance_of(planned, selection_of(planned.plan.selection), 0)
    rows = sample.select(chosen, uniforms=numbers, thin=thin)
    return shard_content(sample.rows, replace(rows, design=planned.plan.design(0)))


def shard_content(rows: list[TokenRow], sparse: SparseRows) -> ShardContent:
    """Token rows and their sparse rows, laid end to end."""
    return ShardContent(
        lengths=np.array([len(r.ids) for r in rows], dtype=np.int64),
        token_ids=np.concatenate([r.ids for r in rows]),
        targets=np.concatenate([r.targets for r in rows]),
        rows=sparse,
    )


@dataclass(frozen=True)
class FloorScale:
    """Entries that a position keeps on average, as a function of the floor, per temperature.

    Attributes:
        temperatures: declared temperatures.
        counts: float64 ``[B, bins]``, entries per position by their log-probability, likeliest first.
        masses: float64 ``[B, bins]``, their probability.
        drawn: whether entries below the floor are drawn, or left out.
    """

    temperatures: tuple[float, ...]
    counts: NDArray[np.float64]
    masses: NDArray[np.float64]
    drawn: bool

    @classmethod
    def of(cls, sample: HiddenSample, selection: Selection) -> FloorScale:
        """Histograms over the sample's positions."""
        counts, masses = (np.zeros((len(selection.temperatures), _BINS)) for _ in range(2))
        plain = Selection("top_k", selection.temperatures, k=1)

        def count(logits: torch.Tensor, labels: torch.Tensor, uniforms: Uniforms | None) -> Selected:
            for column, t in enumerate(selection.temperatures):
                for row in (logits / t).split(8):
                    log_p = torch.log_softmax(row, dim=1)
                    bins = (log_p * -_BINS_PER_E).clamp_(0, _BINS - 1).to(torch.int64).flatten()
                    counts[column] += torch.bincount(bins, minlength=_BINS).cpu().numpy()
                    weights = log_p.exp_().flatten()
                    masses[column] += torch.bincount(bins, weights=weights, minlength=_BINS).cpu().numpy()
            return select(logits, labels, plain)

        positions = len(sample.select(count))
        return cls(selection.temperatures, counts / positions, masses / positions, selection.uniforms > 0)

    def floors(self, n: float) -> tuple[float, ...]:
        """The floor at which each temperature alone keeps ``n`` entries on average, to three digits."""
        edges = np.exp(-np.arange(1, _BINS + 1) / _BINS_PER_E)
        found = []
        for counts, masses in zip(self.counts, self.masses, strict=True):
            kept = np.cumsum(counts)
            if self.drawn:
                kept = kept + (masses.sum() - np.cumsum(masses)) / edges
            # Rises as the floor falls.
            floor = float(np.exp(np.interp(np.log(n), np.log(np.maximum(kept, 1e-9)), np.log(edges))))
            found.append(float(f"{min(max(floor, MINIMUM_FLOOR), 0.99):.3g}"))
        return tuple(found)
