"""What is left to chance, and to rank: the numbers behind every draw, and the positions that are kept at all.

Draws depend on the plan and the sequence alone, so any process on any day makes the same.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from kdcache.cache.codec import sequence_digest
from kdcache.cache.manifest import Plan
from kdcache.cache.rows import SparseRows
from kdcache.cache.selection import SelectionPlan
from kdcache.data.tokens import TokenRow
from kdcache.teacher.forward import Select, Thin, Uniforms
from kdcache.teacher.select import Selection, select


def uniforms(plan_digest: str, row: TokenRow, per_position: int) -> NDArray[np.float64]:
    """float64 ``[positions, per_position]`` in [0, 1): SHAKE-256 of plan digest and sequence digest, 53 bits each."""
    seed = bytes.fromhex(plan_digest) + sequence_digest(row.ids, row.targets)
    count = row.positions * per_position
    words = np.frombuffer(hashlib.shake_256(seed).digest(8 * count), dtype="<u8")
    numbers: NDArray[np.float64] = (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return numbers.reshape(row.positions, per_position)


def thin(rows: SparseRows, entropy: NDArray[np.float32], *, by: str, quantile: float) -> SparseRows:
    """One sequence's rows, those below the quantile of their own sequence left empty.

    Positions where the teacher is unsure (``entropy``) or wrong (``loss``) teach most (SE-KD, arXiv:2602.01395). The rank
    is taken within the sequence, ties by the earlier position, so that no other sequence matters.

    Args:
        rows: of one sequence.
        entropy: float32 ``[P]``, nats.
        by: ``entropy`` or ``loss`` (negative log-probability of the label).
        quantile: share of positions that is dropped, rounded down.
    """
    score = entropy if by == "entropy" else -rows.label_log_prob
    keep = np.ones(len(rows), dtype=bool)
    keep[np.argsort(-score, kind="stable")[len(rows) - math.floor(quantile * len(rows)) :]] = False
    return rows.emptied(keep)


def selection_of(plan: SelectionPlan) -> Selection:
    """The plan's selection as the value `select` takes."""
    return Selection(
        plan.method, plan.temperatures, plan.k, plan.floors, plan.draws, plan.tail_logits, plan.positions == "entropy"
    )


def chance_of(plan: Plan, split: int) -> tuple[Select, Callable[[TokenRow], Uniforms] | None, Thin | None]:
    """How rows of a split are selected, the numbers behind their draws, and which positions are left out."""
    selection = selection_of(plan.selection)
    chosen: Select = lambda logits, labels, drawn: select(logits, labels, selection, drawn)  # noqa: E731
    numbers = None
    if selection.uniforms:
        numbers = partial(uniforms, plan.digest, per_position=selection.uniforms)
    thinning = None
    if plan.design(split).some_empty:
        thinning = partial(thin, by=plan.selection.positions, quantile=plan.selection.quantile)
    return chosen, numbers, thinning
