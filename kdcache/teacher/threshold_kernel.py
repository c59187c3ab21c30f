"""Threshold sampling on the CPU, compiled: what `threshold_sampling` runs on rows of logits.

A row is read from memory once, block by block while a block is in the processor's first cache: its largest logit, and the
sum of its exponentials at every declared temperature (one exponential for two where one temperature is twice the other). No
probabilities are written. A block whose largest entry lies below the floors holds nothing that is kept; only the others, and
those that a draw falls on, are looked at entry by entry. Flat rows have more of the former, and take longer.

Sums of a block are float32, sums of blocks float64. Exponentials: Cephes' polynomial for float32 (Moshier 1989), good to
3e-7; 0 below exp(-87). Logits are compared as differences to the row's largest, which are exact where it matters.

Axes: ``W`` entries of a block. Everything the compiled code depends on stands in this file or is an argument: what is kept
on disk is told by this file's date.
"""

# The compiler's decorators carry no types.
# mypy: disallow-untyped-decorators=False

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

# Entries of a block: they stay in the first cache from the largest of them to their sum.
_WIDTH = 256
# Entries that a draw goes past at a time.
_STEP = 32
# By how much lower a logit's distance from the largest has to be for its block to be passed over, for rounding.
_MARGIN = 1e-3

# The order of sums is free and products may be fused; not-a-number and infinity are what they are.
MATH = {"reassoc", "contract", "nsz", "arcp"}
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


@njit(inline="always", fastmath=MATH)
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


@njit(fastmath=MATH)
def _sum_of_exp(logits_W: Any, reference: Any, inverse: Any) -> Any:
    """Sum of a block's exponentials, and of their squares."""
    total, squares = _ZERO, _ZERO
    for j in range(logits_W.shape[0]):
        e = _exp((logits_W[j] - reference) * inverse)
        total += e
        squares += e * e
    return total, squares


@njit(fastmath=MATH)
def _look(
    logits_W: Any, maximum: Any, inverse: Any, squared: bool, scale: Any, below: Any, alone: int, reach_W: Any,
    sums: Any, g: int,
) -> Any:  # fmt: skip
    """A block without the entries that are kept: those whose logit less the maximum is below ``below``, but not ``alone``.

    Fills ``reach_W`` with inclusion probabilities, and ``sums[:, g]``; returns the sum of the former.
    """
    included = _ZERO
    if squared:
        total, squares, factor, factor_0 = _ZERO, _ZERO, np.float32(scale[1]), np.float32(scale[0])
        for j in range(logits_W.shape[0]):
            distance = logits_W[j] - maximum
            e = _exp(distance * inverse[1])
            e = e if distance < below and j != alone else _ZERO
            total += e
            squares += e * e
            reach_W[j] = e * max(factor, e * factor_0)
            included += reach_W[j]
        sums[0, g], sums[1, g] = squares, total
        return included
    for j in range(logits_W.shape[0]):
        reach_W[j] = _ZERO
    for b in range(len(inverse)):
        total, factor = _ZERO, np.float32(scale[b])
        for j in range(logits_W.shape[0]):
            distance = logits_W[j] - maximum
            e = _exp(distance * inverse[b])
            e = e if distance < below and j != alone else _ZERO
            total += e
            reach_W[j] = max(reach_W[j], e * factor)
        sums[b, g] = total
    for j in range(logits_W.shape[0]):
        included += reach_W[j]
    return included


@njit(fastmath=MATH)
def _next(reach_W: Any, first: int, count: int, cumulated: float, point: float) -> Any:
    """Place of the entry on which the point falls, from ``first`` on, or ``count`` where it falls on none; and the sum so far."""
    j = first
    while j < count:
        if j % _STEP == 0 and j + _STEP <= count:
            step: Any = _ZERO
            for k in range(j, j + _STEP):
                step += reach_W[k]
            if cumulated + step < point:
                cumulated += step
                j += _STEP
                continue
        cumulated += reach_W[j]
        if reach_W[j] > 0.0 and point <= cumulated:
            return j, cumulated
        j += 1
    return count, cumulated


def sample_rows(
    flat: Any, bits: Any, stride: int, width: int, inverse: Any, floors: Any, squared: bool, certain: float,
    uniforms: Any, head: Any, tail: Any, head_ids: Any, tail_ids: Any, maxima: Any, partition: Any, inside: Any, left: Any,
) -> None:  # fmt: skip
    """Threshold sampling of rows, to be compiled as `threshold_sampling` does; fills what follows ``uniforms``.

    Args:
        flat: float32, the logits; row ``i`` starts at ``i * stride`` and has ``width`` of them. ``bits``: the same memory as int32.
        inverse: float32, one over each temperature, falling; ``floors``: float64, one for each.
        squared: whether there are two temperatures, the second twice the first.
        certain: an entry of this inclusion probability is kept.
        uniforms: float64, one per row.
        head, tail, head_ids, tail_ids, maxima, partition, inside, left: as `threshold_sampling.Sampled` names them.

    Raises:
        IndexError: a row has more entries than ``head_ids`` or ``tail_ids`` has room for.
    """
    temperatures, blocks = len(inverse), (width + _WIDTH - 1) // _WIDTH
    top = temperatures - 1
    sums = np.empty((temperatures, blocks), np.float32)
    largest, reference = np.empty(blocks, np.float32), np.empty(blocks, np.float32)
    included, scale = np.empty(blocks, np.float32), np.empty(temperatures, np.float64)
    # Of the blocks that have been looked at.
    reach, looked = np.empty((blocks, _WIDTH), np.float32), np.empty(blocks, np.bool_)
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
            kept_above = min(kept_above, np.log(certain / scale[b]) / inverse[b])
            if b < top:
                simple_below = min(simple_below, np.log(scale[top] / scale[b]) / (inverse[b] - inverse[top]))
        simple, keep = np.float32(min(simple_below, kept_above) - _MARGIN), np.float32(kept_above)
        first_head, alone = heads, -1
        if keep > _ZERO:
            # Not even the largest is likely enough; it is kept alone.
            for j in range(width):
                if row[j] == maximum:
                    alone = j
                    break
            simple = min(simple, _ZERO)
        for g in range(blocks):
            looked[g] = largest[g] - maximum >= simple
            if not looked[g]:
                included[g] = sums[top, g] * scale[top]
                continue
            start, stop = g * _WIDTH, min((g + 1) * _WIDTH, width)
            included[g] = _look(
                row[start:stop], maximum, inverse, squared, scale, keep, alone - start, reach[g], sums, g
            )
            if largest[g] - maximum < keep and not start <= alone < stop:
                continue
            for j in range(start, stop):
                if row[j] - maximum >= keep or j == alone:
                    if heads == len(head_ids):
                        raise IndexError("more entries are kept than there is room for")
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
                if not looked[g]:
                    _look(row[start:stop], maximum, inverse, squared, scale, keep, alone - start, reach[g], sums, g)
                j, cumulated = 0, before
                while point <= after:
                    j, cumulated = _next(reach[g], j, stop - start, cumulated, point)
                    if j == stop - start:
                        # What rounding leaves over falls on the block's last entry that has any probability.
                        j -= 1
                        while j >= 0 and reach[g, j] == 0.0:
                            j -= 1
                        if j < 0:
                            break
                    if tails == len(tail_ids):
                        raise IndexError("more entries are drawn than there is room for")
                    tail_ids[tails] = start + j
                    tails += 1
                    point += 1.0
                    j += 1
            before = after
        head[i], tail[i] = heads - first_head, tails - first_tail
