"""Threshold sampling on the CPU, compiled: each row of logits is read from memory once.

What torch does in a pass over the vocabulary for each step, each through main memory, is done here block by block while a
block is in the processor's first cache: its largest logit, and the sum of its exponentials at every declared temperature
(one exponential for two where one temperature is twice the other). No probabilities are written. A block whose largest
entry lies below the floors holds nothing that is kept, and only the others are looked at entry by entry; a draw finds its
block first, and its entry there. `masses` is the same by whole arrays, for GPUs; tests hold one against the other.

Sums of a block are float32, sums of blocks float64. Exponentials: Cephes' polynomial for float32 (Moshier 1989), good to
two units in the last place; 0 below exp(-87).

Axes: ``N`` positions, ``V`` vocabulary, ``G`` blocks of the vocabulary, ``B`` temperatures, ``H`` entries kept, ``M`` drawn.
"""

# The compiler's decorators carry no types.
# mypy: disallow-untyped-decorators=False

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray

from kdcache.teacher.masses import CERTAIN

# Entries of a block: they stay in the first cache between the two looks at them.
_WIDTH = 256
# Nats by which the bound of the blocks that are passed over is lowered, for rounding.
_MARGIN = 1e-3

# The order of sums is free and products may be fused; not-a-number and infinity are what they are.
_MATH = {"reassoc", "contract", "nsz", "arcp"}
_LOWEST = np.float32(-87.0)
_LOG2_E = np.float32(1.4426950408889634)
# log 2 in two parts, the first exact in few bits, so that k times it is exact.
_LOG_2_HIGH, _LOG_2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
_C0, _C1, _C2 = np.float32(1.9875691500e-4), np.float32(1.3981999507e-3), np.float32(8.3334519073e-3)
_C3, _C4, _C5 = np.float32(4.1665795894e-2), np.float32(1.6666665459e-1), np.float32(5.0000001201e-1)
_HALF, _ONE, _ZERO = np.float32(0.5), np.float32(1.0), np.float32(0.0)
_BIAS, _MANTISSA_BITS, _SIGN_SHIFT = np.int32(127), np.int32(23), np.int32(31)
_WITHOUT_SIGN, _INFINITY_BITS = np.int32(0x7FFFFFFF), np.int32(0x7F800000)
_LEAST_INT, _LEAST_FLOAT = np.int32(-(2**31)), np.float32(np.finfo(np.float32).min)


class Sampled(NamedTuple):
    """What is kept and drawn of rows, ids rising within a row.

    Attributes:
        head, tail: int64 ``[N]``, entries kept and drawn per row.
        head_ids, tail_ids: int32 ``[H]`` and ``[M]``.
        maximum: float32 ``[N]``, the largest logit; NaN in a row with NaN or +inf logits or nothing but -inf.
        partition: float64 ``[N, B]``, sum of exp((logit - maximum) / T).
        inside, left: float64 ``[N, B]``, the partition's part of the entries kept, and of all others, each summed.
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
        logits_NV: float32, on the CPU.
        temperatures: ascending.
        floors: one per temperature.
        uniforms_N: float64 in [0, 1).
    """
    count, width = logits_NV.shape
    logits_NV = logits_NV.detach()
    if logits_NV.stride(1) != 1 or logits_NV.dtype != torch.float32:
        logits_NV = logits_NV.to(torch.float32).contiguous()
    # No row keeps or draws more than its floors leave room for.
    room = min(width, sum(int(1.0 / (f * CERTAIN)) + 2 for f in floors))
    inverse = np.array([1.0 / t for t in temperatures], np.float32)
    floors_B = np.array(floors, np.float64)
    squared = temperatures == (temperatures[-1] / 2, temperatures[-1])

    def part(rows: slice) -> Sampled:
        chunk = logits_NV[rows]
        size = len(chunk)
        flat = chunk.as_strided(((size - 1) * chunk.stride(0) + width if size else 0,), (1,)).numpy()
        found = Sampled(
            np.empty(size, np.int64), np.empty(size, np.int64),
            np.empty(size * room, np.int32), np.empty(size * room, np.int32), np.empty(size, np.float32),
            *(np.empty((size, len(floors)), np.float64) for _ in range(3)),
        )  # fmt: skip
        _sample(flat, flat.view(np.int32), chunk.stride(0), width, inverse, floors_B, squared, uniforms_N[rows], *found)
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


@njit(inline="always", fastmath=_MATH)
def _exp(x: Any) -> Any:
    """exp of a float32 of at most about 0, as float32."""
    y = x if x > _LOWEST else _LOWEST
    whole = np.int32(y * _LOG2_E - _HALF)
    k = np.float32(whole)
    r = y - k * _LOG_2_HIGH - k * _LOG_2_LOW
    p = ((((_C0 * r + _C1) * r + _C2) * r + _C3) * r + _C4) * r + _C5
    p = p * r * r + r + _ONE
    # 2^k by its bits.
    p = p * np.int32((whole + _BIAS) << _MANTISSA_BITS).view(np.float32)
    return p if x > _LOWEST else _ZERO


@njit(inline="always")
def _in_order(bits: Any) -> Any:
    """A float's bits -> an integer that rises with the float, and back."""
    return np.int32(bits ^ ((bits >> _SIGN_SHIFT) & _WITHOUT_SIGN))


@njit
def _extremes(bits_W: Any) -> Any:
    """Largest of a block of floats, in integers: a processor compares those without asking for not-a-number first.

    Returns the largest as an ordered integer, and the largest magnitude's bits (above infinity's where one is NaN).
    """
    largest, magnitude = _LEAST_INT, np.int32(0)
    for j in range(bits_W.shape[0]):
        largest = max(largest, _in_order(bits_W[j]))
        magnitude = max(magnitude, np.int32(bits_W[j] & _WITHOUT_SIGN))
    return largest, magnitude


@njit(fastmath=_MATH)
def _sum_of_exp(logits_W: Any, reference: Any, inverse: Any) -> Any:
    """Sum of a block's exponentials, and of their squares."""
    total, squares = _ZERO, _ZERO
    for j in range(logits_W.shape[0]):
        e = _exp((logits_W[j] - reference) * inverse)
        total += e
        squares += e * e
    return total, squares


@njit(fastmath=_MATH)
def _look(
    logits_W: Any, maximum: Any, inverse: Any, scale: Any, below: Any, alone: int, reach_W: Any, sums: Any, g: int
) -> Any:
    """A block without the entries that are kept: ``below`` this logit, and not ``alone``.

    Fills ``reach_W`` with inclusion probabilities, and ``sums[:, g]``; returns the sum of the former.
    """
    count = logits_W.shape[0]
    for j in range(count):
        reach_W[j] = _ZERO
    for b in range(len(inverse)):
        total, factor, rate = _ZERO, np.float32(scale[b]), inverse[b]
        for j in range(count):
            e = _exp((logits_W[j] - maximum) * rate)
            e = e if logits_W[j] < below else _ZERO
            e = e if j != alone else _ZERO
            total += e
            reach_W[j] = max(reach_W[j], e * factor)
        sums[b, g] = total
    included = _ZERO
    for j in range(count):
        included += reach_W[j]
    return included


def _kept_compiled(function: Any) -> Any:
    """Compiled at the first call; what came out is kept for other processes where there is a place that can be written."""
    try:
        return njit(nogil=True, fastmath=_MATH, cache=True)(function)
    except RuntimeError:
        # Neither beside this file nor in the user's folder for such things: every process compiles for itself.
        return njit(nogil=True, fastmath=_MATH)(function)


@_kept_compiled
def _sample(
    flat: Any, bits: Any, stride: int, width: int, inverse: Any, floors: Any, squared: bool, uniforms: Any,
    head: Any, tail: Any, head_ids: Any, tail_ids: Any, maxima: Any, partition: Any, inside: Any, left: Any,
) -> None:  # fmt: skip
    """`sample` on rows ``stride`` apart in ``flat``; ``bits`` is the same memory as integers. Fills what follows ``uniforms``."""
    temperatures, blocks = len(inverse), (width + _WIDTH - 1) // _WIDTH
    top = temperatures - 1
    sums = np.empty((temperatures, blocks), np.float32)
    largest, reference = np.empty(blocks, np.float32), np.empty(blocks, np.float32)
    included, scale = np.empty(blocks, np.float32), np.empty(temperatures, np.float64)
    reach_W = np.empty(_WIDTH, np.float32)
    heads = tails = 0
    for i in range(len(uniforms)):
        row = flat[i * stride : i * stride + width]
        row_bits = bits[i * stride : i * stride + width]
        # Exponentials are taken against the largest logit so far.
        maximum, magnitude = _LEAST_FLOAT, np.int32(0)
        for g in range(blocks):
            start, stop = g * _WIDTH, min((g + 1) * _WIDTH, width)
            ordered, size = _extremes(row_bits[start:stop])
            magnitude = max(magnitude, size)
            largest[g] = _in_order(ordered).view(np.float32)
            maximum = max(maximum, largest[g])
            reference[g] = maximum
            if squared:
                sums[1, g], sums[0, g] = _sum_of_exp(row[start:stop], maximum, inverse[1])
            else:
                for b in range(temperatures):
                    sums[b, g], _ = _sum_of_exp(row[start:stop], maximum, inverse[b])
        if magnitude > _INFINITY_BITS or maximum == np.inf or largest.max() == -np.inf:
            head[i], tail[i], head_ids[heads], maxima[i] = 1, 0, 0, np.nan
            partition[i], inside[i], left[i] = np.nan, np.nan, np.nan
            heads += 1
            continue
        maxima[i] = maximum
        for b in range(temperatures):
            total = 0.0
            for g in range(blocks):
                if reference[g] < maximum:
                    sums[b, g] *= np.float32(np.exp((reference[g] - maximum) * np.float64(inverse[b])))
                total += sums[b, g]
            partition[i, b], scale[b] = total, 1.0 / (total * floors[b])
            inside[i, b] = 0.0
        # Inclusion rises with the logit: kept is what lies above one bound. Below another, the largest temperature is the one
        # that includes (its share falls beside the others' as the logit rises), and a block's sum there is all there is to know.
        kept_above, simple_below = np.inf, np.inf
        for b in range(temperatures):
            kept_above = min(kept_above, np.log(CERTAIN / scale[b]) / inverse[b])
            if b < top:
                simple_below = min(simple_below, np.log(scale[top] / scale[b]) / (inverse[b] - inverse[top]))
        simple = np.float32(maximum + min(simple_below, kept_above) - _MARGIN)
        keep = np.float32(maximum + kept_above)
        first_head, alone = heads, -1
        if maximum < keep:
            for j in range(width):
                if row[j] == maximum:
                    alone = j
                    break
            simple = min(simple, maximum)
        for g in range(blocks):
            if largest[g] < simple:
                included[g] = sums[top, g] * scale[top]
                continue
            start, stop = g * _WIDTH, min((g + 1) * _WIDTH, width)
            included[g] = _look(row[start:stop], maximum, inverse, scale, keep, alone - start, reach_W, sums, g)
            for j in range(start, stop):
                if row[j] >= keep or j == alone:
                    head_ids[heads] = j
                    heads += 1
                    for b in range(temperatures):
                        inside[i, b] += _exp((row[j] - maximum) * inverse[b])
        for b in range(temperatures):
            left[i, b] = 0.0
            for g in range(blocks):
                left[i, b] += sums[b, g]
        first_tail, before, point = tails, 0.0, 1.0 - uniforms[i]
        for g in range(blocks):
            after = before + included[g]
            if point <= after:
                start, stop = g * _WIDTH, min((g + 1) * _WIDTH, width)
                _look(row[start:stop], maximum, inverse, scale, keep, alone - start, reach_W, sums, g)
                cumulated, last = before, -1
                for j in range(stop - start):
                    if reach_W[j] > 0.0:
                        cumulated += reach_W[j]
                        last = start + j
                        if point <= min(cumulated, after):
                            tail_ids[tails] = last
                            tails += 1
                            point += 1.0
                # What rounding leaves over falls on the block's last entry that has any probability.
                if point <= after and last >= 0 and (tails == first_tail or tail_ids[tails - 1] != last):
                    tail_ids[tails] = last
                    tails += 1
                    point += 1.0
            before = after
        head[i], tail[i] = heads - first_head, tails - first_tail
