"""Rows through the head in chunks, each chunk's logits turned into the gradient in their own memory.

Axes: ``N`` rows, ``D`` hidden, ``V`` vocabulary, ``K`` kept entries, ``C`` rows of a chunk.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from kdcache.head import Head
from kdcache.student import row_passes
from kdcache.student.divergence import Bins, controlled, divergence_of
from kdcache.student.sparse_teacher import SparseTeacher


@dataclass(frozen=True)
class Settings:
    """What `distillation_loss` was asked for: ``width`` columns of the head, ``rows`` per chunk, ``gradient`` at all,
    ``control`` whether `controlled` is."""

    temperature: float
    ce_weight: float
    kd_weight: float
    divergence: str
    beta: float
    width: int
    rows: int
    gradient: bool
    control: bool = False


class ChunkedLoss(torch.autograd.Function):
    """Gradients are computed in the forward pass, chunk by chunk, and only scaled in the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        head_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        labels_N: torch.Tensor,
        teacher: SparseTeacher,
        settings: Settings,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Weighted total, CE per row, divergence per row."""
        needs_hidden, needs_head, needs_bias = (n and settings.gradient for n in ctx.needs_input_grad[:3])
        passes = _passes(hidden_ND)
        width = settings.width
        # float64 stays float64 (gradient checks); everything else is reduced in float32.
        compute = torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32
        head = Head(head_VD.detach()[:width], None if bias_V is None else bias_V.detach()[:width], compute)
        grad_hidden = torch.empty_like(hidden_ND) if needs_hidden else None
        grad_head = torch.zeros(head_VD.shape, dtype=compute, device=head_VD.device) if needs_head else None
        grad_bias = torch.zeros(head_VD.shape[0], dtype=compute, device=head_VD.device) if needs_bias else None
        count = len(labels_N)
        ce_N = torch.empty(count, dtype=compute, device=hidden_ND.device)
        divergence_N = torch.empty_like(ce_N)
        # One buffer for all chunks; CUDA's own allocator does as well.
        buffer_CV = None if head.native else ce_N.new_empty(min(settings.rows, count), width)
        for start in range(0, count, settings.rows):
            span = slice(start, min(start + settings.rows, count))
            hidden_CD = hidden_ND[span].detach()
            chunk_CV = head.logits(hidden_CD, out=None if buffer_CV is None else buffer_CV[: len(hidden_CD)])
            ce_N[span], divergence_N[span] = _chunk(
                chunk_CV, labels_N[span], teacher.rows(span, compute), settings, passes,
                with_gradient=needs_hidden or needs_head or needs_bias,
            )  # fmt: skip
            if grad_hidden is not None:
                grad_hidden[span] = head.back(chunk_CV)
            if grad_head is not None:
                grad_head[:width].addmm_(chunk_CV.T, hidden_CD.to(compute))
            if grad_bias is not None:
                grad_bias[:width] += chunk_CV.sum(dim=0)
            del chunk_CV  # before the next is made, on devices where each is a new one
        ctx.grads = (
            grad_hidden,
            None if grad_head is None else grad_head.to(head_VD.dtype),
            None if grad_bias is None or bias_V is None else grad_bias.to(bias_V.dtype),
        )
        ctx.mark_non_differentiable(ce_N, divergence_N)
        # A weight of 0 leaves its term out: 0 * inf would be NaN.
        total = torch.zeros((), dtype=compute, device=hidden_ND.device)
        if settings.ce_weight:
            total = total + settings.ce_weight * ce_N.sum()
        if settings.kd_weight:
            total = total + settings.kd_weight * settings.temperature**2 * divergence_N.sum()
        return total, ce_N, divergence_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        """The gradients of the forward pass times the scale from above."""
        # In the scale's own precision: 1 / tokens rounded to bfloat16 would scale the whole gradient by a wrong factor.
        scale = grad_outputs[0]
        grads = tuple(None if g is None else (g.to(scale.dtype) * scale).to(g.dtype) for g in ctx.grads)
        return (*grads, None, None, None)


def _chunk(
    logits_CV: torch.Tensor,
    labels_C: torch.Tensor,
    teacher: SparseTeacher,
    settings: Settings,
    passes: ModuleType,
    *,
    with_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """CE and divergence per row; the logits become the gradient of the weighted sum."""
    temperature, log_p_CK = settings.temperature, teacher.log_probs_NK
    # Whatever id fills a short row, it is the row's first that is meant.
    ids_CK = torch.where(torch.isneginf(log_p_CK), teacher.ids_NK[:, :1], teacher.ids_NK)
    label_C = logits_CV.gather(1, labels_C[:, None]).squeeze(1)
    head_CK = logits_CV.gather(1, ids_CK)
    # A row without entries keeps nothing: its one placeholder id belongs to the outside.
    empty_C1 = torch.isneginf(log_p_CK).all(dim=1, keepdim=True)
    logits_CV.scatter_(1, ids_CK, torch.where(empty_C1, head_CK, -torch.inf))
    # Places that fill a short row repeat its first id and must not count twice in the student's sums.
    head_CK = head_CK.masked_fill(_repeats(ids_CK) | empty_C1, -torch.inf)

    sums = passes.outside_sums(logits_CV, temperature)
    log_z_T = torch.logaddexp(sums.log_sum_T_C, torch.logsumexp(head_CK / temperature, dim=1))
    log_z_1 = torch.logaddexp(sums.log_sum_1_C, torch.logsumexp(head_CK, dim=1))
    weights_CK = log_p_CK if teacher.log_weights_NK is None else teacher.log_weights_NK
    bins = Bins(
        log_p_CK=log_p_CK,
        log_q_CK=head_CK / temperature - log_z_T[:, None],
        log_rho_C=teacher.log_tail_N,
        log_sigma_C=sums.log_sum_T_C - log_z_T,
        weights_CK=weights_CK.exp(),
    )
    outcome = divergence_of(settings.divergence, settings.beta)(bins)
    if settings.control and with_gradient and teacher.log_weights_NK is not None:
        outcome = controlled(bins, outcome)
    ce_C = log_z_1 - label_C
    # A row that says nothing of the teacher, not even of a rest, costs nothing whatever the divergence.
    silent_C = empty_C1.squeeze(1) & torch.isneginf(teacher.log_tail_N)
    value_C = outcome.value_C.masked_fill(silent_C, 0.0)
    if not with_gradient:
        return ce_C, value_C
    kd = settings.kd_weight * temperature
    top_T_C, nothing = sums.top_C / temperature, torch.isneginf(sums.log_sum_T_C)

    def relative(log_C: torch.Tensor) -> torch.Tensor:
        # Where nothing lies outside there is no largest logit to be relative to, and exp may overflow.
        return torch.where(nothing, torch.zeros_like(log_C), log_C.exp())

    factor_T, factor_1 = torch.zeros_like(top_T_C), torch.zeros_like(top_T_C)
    on_kept = torch.zeros_like(head_CK)
    # A term of weight 0 is left out: what it would be multiplied with may be infinite.
    if kd:
        share_C = relative(top_T_C - sums.log_sum_T_C)
        factor_T = kd * (outcome.by_q_C * relative(top_T_C - log_z_T) + outcome.by_share_C * share_C)
        factor_T = factor_T.masked_fill(silent_C, 0.0)
        on_kept = (kd * outcome.on_kept_CK).masked_fill(silent_C[:, None], 0.0)
    if settings.ce_weight:
        factor_1 = settings.ce_weight * relative(sums.top_C - log_z_1)
        on_kept = on_kept + settings.ce_weight * (head_CK - log_z_1[:, None]).exp()
    grad_CV = passes.outside_gradient_(logits_CV, sums, factor_T, factor_1, temperature)
    grad_CV.scatter_add_(1, ids_CK, on_kept)
    grad_CV.scatter_add_(1, labels_C[:, None], torch.full_like(label_C, -settings.ce_weight)[:, None])
    return ce_C, value_C


def _passes(hidden_ND: torch.Tensor) -> ModuleType:
    """The Triton passes on CUDA where Triton is installed, the torch ones elsewhere."""
    if hidden_ND.is_cuda and hidden_ND.dtype != torch.float64:
        return _triton_passes(hidden_ND.device) or row_passes
    return row_passes


@cache
def _triton_passes(device: torch.device) -> ModuleType | None:
    """The Triton passes, tried once on the device: Triton compiles at the first launch, and may not be able to."""
    try:
        from kdcache.student import row_passes_triton

        with warnings.catch_warnings():
            # Advice about its own settings; turned into an error by who runs with -W error, it is no reason to give up.
            warnings.simplefilter("ignore")
            row_passes_triton.outside_sums(torch.zeros(1, 8, device=device), 2.0)
    except ImportError:
        return None
    except Exception as exc:
        warnings.warn(f"Triton cannot compile here ({exc}); the loss takes the slower torch passes", stacklevel=2)
        return None
    return row_passes_triton


def _repeats(ids_CK: torch.Tensor) -> torch.Tensor:
    """Where a row's first id stands again behind the first column."""
    repeats = ids_CK == ids_CK[:, :1]
    repeats[:, 0] = False
    return repeats
