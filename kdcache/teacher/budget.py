"""From bytes per position to a probability floor, measured on a sample of the plan's own sequences.

With floor tau a position whose mass outside the head is rho draws about rho / tau entries, and what it stands for has
variance of at most tau rho. So one floor for all positions and temperatures puts the draws where the mass is, which is
where they lower the variance most. It is searched for which the rows, encoded and compressed as the cache will be, come
to the budget.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from kdcache.cache.codec import ShardContent, encode
from kdcache.cache.layout import MINIMUM_FLOOR
from kdcache.cache.reader import read_plan
from kdcache.cache.shard import pack
from kdcache.cache.writer import refuse_occupied, refuse_other_plan
from kdcache.errors import RecipeError
from kdcache.progress import Progress
from kdcache.teacher.draws import chance_of
from kdcache.teacher.planning import PlannedCache
from kdcache.teacher.sample import HiddenSample, shard_content

if TYPE_CHECKING:
    from pathlib import Path


SAMPLE_POSITIONS = 4096
_CLOSE_ENOUGH, _TRIES = 0.01, 10
# One over the highest floor that is tried.
_FEWEST = 1.1


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
    """The plan with the floor, one for all declared temperatures, that meets its bytes per position on ``sample``.

    Raises:
        RecipeError: text and labels alone take more than the budget.
    """
    budget, temperatures = planned.plan.selection.bytes_per_position, planned.plan.selection.temperatures
    if budget is None:
        return planned

    def with_floor(n: float) -> PlannedCache:
        floor = max(float(f"{1.0 / n:.3g}"), MINIMUM_FLOOR)
        return planned.with_floors((floor,) * len(temperatures))

    def tried(n: float) -> tuple[float, float]:
        return n, bytes_per_position(with_floor(n), sample)

    # Bytes grow almost linearly in 1 / floor, at least for a while: a secant is there in a few steps.
    low, high = tried(_FEWEST), tried(10.0)
    if low[1] > budget * (1 + _CLOSE_ENOUGH):
        raise RecipeError(
            f"selection.bytes_per_position {budget:g} is too small: text, labels and hardly an entry take {low[1]:.1f} "
            "bytes per position on this data"
        )

    def gap(point: tuple[float, float]) -> tuple[bool, float]:
        # Above the budget only where nothing below it has been found.
        return point[1] > budget * (1 + _CLOSE_ENOUGH), abs(point[1] - budget)

    best = min(low, high, key=gap)
    for _ in range(_TRIES):
        if abs(best[1] / budget - 1) <= _CLOSE_ENOUGH or low[0] == high[0]:
            break
        slope = max((high[1] - low[1]) / (high[0] - low[0]), 1e-4)
        n = float(np.clip(high[0] + (budget - high[1]) / slope, _FEWEST, min(1.0 / MINIMUM_FLOOR, 4 * high[0])))
        low, high = high, tried(n)
        best = min(best, high, key=gap)
    found = with_floor(best[0])
    floor = found.plan.selection.floors[0]
    progress.message(
        f"probability floor for {budget:g} bytes per position: {floor:g} ({best[1]:.1f} bytes on {len(sample):,} positions)"
    )
    if best[1] < budget * 0.95:
        lowest = floor <= MINIMUM_FLOOR
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
    chosen, numbers, thin = chance_of(planned.plan, 0)
    rows = sample.select(chosen, uniforms=numbers, thin=thin)
    return shard_content(sample.rows, replace(rows, design=planned.plan.design(0)))
