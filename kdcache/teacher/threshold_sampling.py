"""Threshold sampling of rows of logits on the CPU, by `threshold_kernel`; `masses` is the same by whole arrays, for GPUs.

Axes: ``N`` positions, ``V`` vocabulary, ``B`` temperatures, ``H`` entries kept, ``M`` entries drawn.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray

from kdcache.teacher.masses import CERTAIN
from kdcache.teacher.threshold_kernel import MATH, sample_rows

_SIGNATURE = (
    "void(float32[::1], int32[::1], int64, int64, float32[::1], float64[::1], boolean, float64, float64[::1], int64[::1], "
    "int64[::1], int32[::1], int32[::1], float32[::1], float64[:, ::1], float64[:, ::1], float64[:, ::1])"
)


class Sampled(NamedTuple):
    """What is kept and drawn of rows, ids rising within a row.

    Attributes:
        head, tail: int64 ``[N]``, entries kept and drawn per row.
        head_ids, tail_ids: int32 ``[H]`` and ``[M]``.
        maximum: float32 ``[N]``, the largest logit.
        partition: float64 ``[N, B]``, sum of exp((logit - maximum) / T).
        inside, left: float64 ``[N, B]``, the partition's part of the entries kept, and of all others, each summed.

    A row with NaN or +inf logits, or nothing but -inf, keeps id 0, and its numbers are NaN.
    """

    head: NDArray[np.int64]
    tail: NDArray[np.int64]
    head_ids: NDArray[np.int32]
    tail_ids: NDArray[np.int32]
    maximum: NDArray[np.float32]
    partition: NDArray[np.float64]
    inside: NDArray[np.float64]
    left: NDArray[np.float64]


def sample(
    logits_NV: torch.Tensor,
    temperatures: tuple[float, ...],
    floors: tuple[float, ...],
    uniforms_N: NDArray[np.float64],
) -> Sampled:
    """Keep every entry whose probability reaches a temperature's floor, and draw from the others by size.

    An entry is included with probability ``max_b p_b / floor_b``, drawn systematically: points one apart, shifted by the
    row's uniform number, fall on the cumulated probabilities (Madow 1949). A row's largest entry is always kept. Rows are
    shared out among ``torch.get_num_threads()`` threads; the result does not depend on how many.

    Args:
        logits_NV: float32, on the CPU, without gradient.
        temperatures: ascending, no two of them equal in float32.
        floors: one per temperature.
        uniforms_N: float64 in [0, 1).
    """
    count, width = logits_NV.shape
    if logits_NV.stride(1) != 1:
        logits_NV = logits_NV.contiguous()
    # No row keeps or draws more than its floors leave room for.
    room = min(width, sum(int(1.0 / (f * CERTAIN)) + 2 for f in floors))
    inverse = np.array([1.0 / t for t in temperatures], np.float32)
    floors_B = np.array(floors, np.float64)
    squared = temperatures == (temperatures[-1] / 2, temperatures[-1])
    kernel = _compiled()

    def part(rows: slice) -> Sampled:
        chunk = logits_NV[rows]
        size = len(chunk)
        flat = chunk.as_strided(((size - 1) * chunk.stride(0) + width if size else 0,), (1,)).numpy()
        found = Sampled(
            np.empty(size, np.int64), np.empty(size, np.int64),
            np.empty(size * room, np.int32), np.empty(size * room, np.int32), np.empty(size, np.float32),
            *(np.empty((size, len(floors)), np.float64) for _ in range(3)),
        )  # fmt: skip
        kernel(
            flat, flat.view(np.int32), chunk.stride(0), width, inverse, floors_B, squared, CERTAIN,
            np.array(uniforms_N[rows], np.float64), *found,
        )  # fmt: skip
        return found._replace(
            head_ids=found.head_ids[: found.head.sum()].copy(), tail_ids=found.tail_ids[: found.tail.sum()].copy()
        )

    threads = max(1, min(torch.get_num_threads(), count))
    ranges = [slice(a, b) for a, b in pairwise(count * i // threads for i in range(threads + 1))]
    if threads == 1:
        return part(ranges[0])
    with ThreadPoolExecutor(threads) as pool:
        parts = list(pool.map(part, ranges))
    return Sampled(*(np.concatenate(column) for column in zip(*parts, strict=True)))


@cache
def _compiled() -> Any:
    """The kernel. What the compiler makes is kept for other processes, beside its source or in the user's folder for such
    things."""
    try:
        return njit(_SIGNATURE, nogil=True, fastmath=MATH, cache=True)(sample_rows)
    except Exception:
        # No place that can be written, no room there, or what was kept is damaged: this process compiles for itself.
        return njit(_SIGNATURE, nogil=True, fastmath=MATH)(sample_rows)
