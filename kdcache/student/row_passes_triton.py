"""The two passes over the vocabulary as Triton kernels: one program per row, picked on CUDA.

First kernel: one read of the row gives the largest logit outside the kept set and both sums, with the running
maximum of Milakov and Gimelshein 2018 (arXiv:1805.02867) shared by the two temperatures. Second kernel: one read
and one write turn the logits into the gradient. Values are those of `row_passes`, which is the reference.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl

from kdcache.student.row_passes import OutsideSums

_BLOCK = 4096


@triton.jit  # type: ignore[untyped-decorator]
def _sums_kernel(logits, top, log_sum_t, log_sum_1, stride, width, inverse_t, block: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    largest = -float("inf")
    sum_t = 0.0
    sum_1 = 0.0
    for start in range(0, width, block):
        columns = start + tl.arange(0, block)
        x = tl.load(logits + row * stride + columns, mask=columns < width, other=-float("inf"))
        new = tl.maximum(largest, tl.max(x, axis=0))
        # While nothing finite was met, 0 is subtracted: exp(-inf - 0) is 0, exp(-inf - (-inf)) would be NaN.
        safe = tl.where(new == -float("inf"), 0.0, new)
        fade = largest - safe
        sum_t = sum_t * tl.exp(fade * inverse_t) + tl.sum(tl.exp((x - safe) * inverse_t), axis=0)
        sum_1 = sum_1 * tl.exp(fade) + tl.sum(tl.exp(x - safe), axis=0)
        largest = new
    safe = tl.where(largest == -float("inf"), 0.0, largest)
    tl.store(top + row, safe)
    tl.store(log_sum_t + row, tl.log(sum_t) + safe * inverse_t)
    tl.store(log_sum_1 + row, tl.log(sum_1) + safe)


@triton.jit  # type: ignore[untyped-decorator]
def _gradient_kernel(logits, top, factor_t, factor_1, stride, width, inverse_t, block: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * block + tl.arange(0, block)
    inside = columns < width
    x = tl.load(logits + row * stride + columns, mask=inside, other=-float("inf")) - tl.load(top + row)
    gradient = tl.load(factor_t + row) * tl.exp(x * inverse_t) + tl.load(factor_1 + row) * tl.exp(x)
    tl.store(logits + row * stride + columns, gradient, mask=inside)


def outside_sums(logits_CV: torch.Tensor, temperature: float) -> OutsideSums:
    """As `row_passes.outside_sums`, but the logits stay as they are."""
    rows, width = logits_CV.shape
    top, log_t, log_1 = (torch.empty(rows, dtype=torch.float32, device=logits_CV.device) for _ in range(3))
    with _on(logits_CV.device):
        _sums_kernel[(rows,)](logits_CV, top, log_t, log_1, logits_CV.stride(0), width, 1 / temperature, block=_BLOCK)
    return OutsideSums(top, log_t, log_1)


def outside_gradient_(
    logits_CV: torch.Tensor,
    sums: OutsideSums,
    factor_T_C: torch.Tensor,
    factor_1_C: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    """As `row_passes.outside_gradient_`, from the logits themselves."""
    rows, width = logits_CV.shape
    grid = (rows, triton.cdiv(width, _BLOCK))
    with _on(logits_CV.device):
        _gradient_kernel[grid](
            logits_CV, sums.top_C, factor_T_C.contiguous(), factor_1_C.contiguous(), logits_CV.stride(0), width,
            1 / temperature, block=_BLOCK,
        )  # fmt: skip
    return logits_CV


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Kernels start on the current device, which need not be the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
