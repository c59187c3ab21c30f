"""What is left to chance, and to rank: the numbers behind every draw, and the positions that are kept at all.

Draws depend on the plan and the sequence alone, so any process on any day makes the same.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
from numpy.typing import NDArray

from kdcache.cache.codec import sequence_digest
from kdcache.cache.rows import SparseRows
from kdcache.data.tokens import TokenRow


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
