"""The two passes over the vocabulary that every divergence shares, in torch.

First pass: one exponential per logit gives the sums outside the kept set at T and at 1, relative to the
largest logit outside, so that they never underflow. Second pass: those exponentials become the gradient, in the
logits' own memory. Both work through a few rows at a time, so that what one operation wrote is still in the
processor's cache when the next reads it, and no second ``[C, V]`` buffer exists.

``max(x / T) = max(x) / T``, and ``exp(x) = exp(x / T)**T``: the flatter of the two temperatures is
exponentiated, since raising it to a power above 1 only loses what is negligible at both.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

_BLOCK_BYTES = 4 << 20


@dataclass(frozen=True)
class OutsideSums:
    """Per row: the largest logit outside the kept set, and log sum exp(x / T) and log sum exp(x) over the outside."""

    top_C: torch.Tensor
    log_sum_T_C: torch.Tensor
    log_sum_1_C: torch.Tensor


def outside_sums(logits_CV: torch.Tensor, temperature: float) -> OutsideSums:
    """First pass. ``logits_CV`` holds ``-inf`` at the kept entries and is overwritten with exponentials."""
    flat, power = max(temperature, 1.0), max(temperature, 1 / temperature)
    rows = len(logits_CV)
    top = logits_CV.new_empty(rows)
    sum_flat, sum_sharp = logits_CV.new_empty(rows), logits_CV.new_empty(rows)
    for span in _blocks(logits_CV):
        block = logits_CV[span]
        largest = block.amax(dim=1)
        # A row without anything outside: exp(-inf - 0) is the 0 that is wanted.
        largest = torch.where(torch.isneginf(largest), torch.zeros_like(largest), largest)
        block.sub_(largest[:, None])
        if flat != 1.0:
            block.mul_(1 / flat)
        block.exp_()
        top[span], sum_flat[span] = largest, block.sum(dim=1)
        sum_sharp[span] = sum_flat[span] if power == 1.0 else _power(block, power).sum(dim=1)
    log_flat, log_sharp = sum_flat.log() + top / flat, sum_sharp.log() + top * (power / flat)
    if temperature >= 1:
        return OutsideSums(top, log_flat, log_sharp)
    return OutsideSums(top, log_sharp, log_flat)


def outside_gradient_(
    exponentials_CV: torch.Tensor,
    sums: OutsideSums,
    factor_T_C: torch.Tensor,
    factor_1_C: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    """Second pass, in place: ``factor_T * exp(x / T) + factor_1 * exp(x)`` outside, 0 at the kept entries.

    Args:
        exponentials_CV: what the first pass left.
        sums: what the first pass returned.
        factor_T_C: factor of ``exp((x - top) / T)``.
        factor_1_C: factor of ``exp(x - top)``.
        temperature: T.
    """
    power = max(temperature, 1 / temperature)
    flat, sharp = (factor_T_C, factor_1_C) if temperature >= 1 else (factor_1_C, factor_T_C)
    if power == 1.0:
        return exponentials_CV.mul_((flat + sharp)[:, None])
    for span in _blocks(exponentials_CV):
        block = exponentials_CV[span]
        slope = block.clone() if power == 2.0 else _power(block, power - 1)
        block.mul_(slope.mul_(sharp[span][:, None]).add_(flat[span][:, None]))
    return exponentials_CV


def _power(values: torch.Tensor, exponent: float) -> torch.Tensor:
    return values * values if exponent == 2.0 else values**exponent


def _blocks(logits_CV: torch.Tensor) -> Iterator[slice]:
    if logits_CV.is_cuda:
        yield slice(0, len(logits_CV))
        return
    step = max(1, _BLOCK_BYTES // max(1, logits_CV.element_size() * logits_CV.shape[1]))
    for start in range(0, len(logits_CV), step):
        yield slice(start, start + step)
