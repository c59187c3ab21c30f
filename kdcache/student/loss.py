"""The sparse distillation loss: lambda_CE * CE + lambda_KD * T^2 * KL(teacher_T || student_T), summed over rows.

Full logits never exist at once: rows go through the head in chunks, and the gradient is worked out
analytically while a chunk's logits are at hand. With ``x`` the student's logits, ``q = softmax(x / T)``,
``q1 = softmax(x)``, ``S`` the kept entries with teacher probabilities ``p`` at T, and ``rho`` / ``sigma``
the teacher's / student's mass outside ``S``::

    KL = sum_S p (log p - log q) + rho (log rho - log sigma)
    d/dx_j = lambda_CE (q1_j - [j = label])
           + lambda_KD T (c q_j - p_j)             for j in S
           + lambda_KD T (c - rho / sigma) q_j     elsewhere,      c = sum_S p + rho

``rho = 0`` gives the renormalised truncation. The KL term is Hinton et al. 2015 (arXiv:1503.02531), with
T^2 in value and gradient. Nothing is clamped. The mass outside ``S`` is summed directly (``1 - sum q``
would be off by a percent at sigma = 1e-3), relative to its own maximum, so that it never underflows.

Axes: ``N`` rows, ``D`` hidden, ``V`` vocabulary, ``K`` kept entries, ``C`` rows of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

CHUNK_BYTES = 256 << 20


@dataclass(frozen=True)
class SparseTeacher:
    """Teacher distributions at one temperature.

    Attributes:
        ids_NK: int64 vocabulary ids; a short row repeats its first id.
        log_probs_NK: float32 log-probabilities at T; ``-inf`` marks a repeated id that fills a short row.
        log_tail_N: float32 log of the mass outside the kept entries, ``-inf`` for none.
    """

    ids_NK: torch.Tensor
    log_probs_NK: torch.Tensor
    log_tail_N: torch.Tensor

    def renormalised(self) -> SparseTeacher:
        """The kept entries scaled to one and the rest dropped: the usual truncation.

        Biased: the student learns to put nothing outside the kept set.
        """
        scaled = self.log_probs_NK - torch.logsumexp(self.log_probs_NK, dim=1, keepdim=True)
        return SparseTeacher(self.ids_NK, scaled, torch.full_like(self.log_tail_N, -torch.inf))


@dataclass(frozen=True)
class LossSums:
    """Sums over rows, in nats. ``total`` carries the gradient; ``kl`` is without T^2 and weight."""

    total: torch.Tensor
    ce: torch.Tensor
    kl: torch.Tensor


def distillation_loss(
    hidden_ND: torch.Tensor,
    head_VD: torch.Tensor,
    labels_N: torch.Tensor,
    teacher: SparseTeacher,
    *,
    temperature: float,
    ce_weight: float,
    kd_weight: float,
    bias_V: torch.Tensor | None = None,
    vocab_size: int | None = None,
    chunk_rows: int | None = None,
) -> LossSums:
    """Loss sums of the rows.

    Args:
        hidden_ND: hidden states of the positions that count, any floating dtype.
        head_VD: head weight, frozen or trainable; columns from ``vocab_size`` on are padding.
        labels_N: int64 next tokens.
        teacher: distributions at ``temperature``.
        temperature: T.
        ce_weight: lambda_CE.
        kd_weight: lambda_KD, before T^2.
        bias_V: head bias.
        vocab_size: columns that stand for tokens; all of them when None.
        chunk_rows: rows per chunk; by default as many as keep a chunk's logits within 256 MiB.

    Returns:
        Sums of the weighted total (differentiable in hidden states, head and bias), CE and KL.
    """
    width = head_VD.shape[0] if vocab_size is None else vocab_size
    rows = chunk_rows or max(1, CHUNK_BYTES // (4 * width))
    weights = (temperature, ce_weight, kd_weight)
    total, ce, kl = _ChunkedLoss.apply(  # type: ignore[no-untyped-call]
        hidden_ND,
        head_VD,
        bias_V,
        labels_N,
        teacher.ids_NK,
        teacher.log_probs_NK,
        teacher.log_tail_N,
        weights,
        width,
        rows,
    )
    return LossSums(total, ce, kl)


class _ChunkedLoss(torch.autograd.Function):
    """Gradients are computed in the forward pass, chunk by chunk, and only scaled in the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        head_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        labels_N: torch.Tensor,
        ids_NK: torch.Tensor,
        log_probs_NK: torch.Tensor,
        log_tail_N: torch.Tensor,
        weights: tuple[float, float, float],
        width: int,
        rows: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        needs_hidden, needs_head, needs_bias = ctx.needs_input_grad[:3]
        # float64 stays float64 (gradient checks); everything else is reduced in float32.
        compute = torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32
        head = head_VD[:width].detach().to(compute)
        bias = None if bias_V is None else bias_V[:width].detach().to(compute)
        grad_hidden = torch.empty_like(hidden_ND) if needs_hidden else None
        grad_head = torch.zeros(head_VD.shape, dtype=compute, device=head.device) if needs_head else None
        grad_bias = torch.zeros(head_VD.shape[0], dtype=compute, device=head.device) if needs_bias else None
        ce = torch.zeros((), dtype=compute, device=head.device)
        kl = torch.zeros((), dtype=compute, device=head.device)
        for start in range(0, len(labels_N), rows):
            span = slice(start, start + rows)
            hidden_CD = hidden_ND[span].detach().to(compute)
            logits_CV = torch.nn.functional.linear(hidden_CD, head, bias)
            ce_C, kl_C, grad_CV = _chunk(
                logits_CV,
                labels_N[span],
                ids_NK[span],
                log_probs_NK[span].to(compute),
                log_tail_N[span].to(compute),
                *weights,
                with_gradient=needs_hidden or needs_head or needs_bias,
            )
            ce, kl = ce + ce_C.sum(), kl + kl_C.sum()
            if grad_hidden is not None:
                grad_hidden[span] = grad_CV @ head
            if grad_head is not None:
                grad_head[:width].addmm_(grad_CV.T, hidden_CD)
            if grad_bias is not None:
                grad_bias[:width] += grad_CV.sum(dim=0)
        ctx.grads = (
            grad_hidden,
            None if grad_head is None else grad_head.to(head_VD.dtype),
            None if grad_bias is None or bias_V is None else grad_bias.to(bias_V.dtype),
        )
        ctx.mark_non_differentiable(ce, kl)
        temperature, ce_weight, kd_weight = weights
        # A weight of 0 leaves its term out: 0 * inf would be NaN.
        total = torch.zeros_like(ce)
        if ce_weight:
            total = total + ce_weight * ce
        if kd_weight:
            total = total + kd_weight * temperature**2 * kl
        return total, ce, kl

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        scale = grad_outputs[0]
        grads = tuple(None if g is None else g * scale.to(g.dtype) for g in ctx.grads)
        return (*grads, *[None] * 7)


def _chunk(
    logits_CV: torch.Tensor,
    labels_C: torch.Tensor,
    ids_CK: torch.Tensor,
    log_p_CK: torch.Tensor,
    log_rho_C: torch.Tensor,
    temperature: float,
    ce_weight: float,
    kd_weight: float,
    *,
    with_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """CE and KL per row, and (in the logits' own memory) the gradient of the weighted sum."""
    label_C = logits_CV.gather(1, labels_C[:, None]).squeeze(1)
    head_CK = logits_CV.gather(1, ids_CK)
    fills_CK = torch.isneginf(log_p_CK)
    # Entries that fill a short row repeat an id: they must not count twice in the student's sums.
    head_CK = head_CK.masked_fill(_repeats(ids_CK), -torch.inf)

    outside_CV = logits_CV.scatter_(1, ids_CK, -torch.inf)
    top_C1 = outside_CV.amax(dim=1, keepdim=True)
    top_C1 = torch.where(torch.isneginf(top_C1), torch.zeros_like(top_C1), top_C1)
    relative = outside_CV.sub_(top_C1)
    # One exponential serves both temperatures; the flatter one is taken first, since its power only shrinks.
    if temperature >= 1:
        outside_T = relative.div_(temperature).exp_()
        outside_1 = outside_T if temperature == 1 else outside_T**temperature
    else:
        outside_1 = relative.exp_()
        outside_T = outside_1 ** (1 / temperature)
    sum_T, sum_1 = outside_T.sum(dim=1), outside_1.sum(dim=1)
    top_C = top_C1.squeeze(1)
    log_outside_T = torch.log(sum_T) + top_C / temperature
    log_outside_1 = torch.log(sum_1) + top_C
    log_z_T = torch.logaddexp(log_outside_T, torch.logsumexp(head_CK / temperature, dim=1))
    log_z_1 = torch.logaddexp(log_outside_1, torch.logsumexp(head_CK, dim=1))

    ce_C = log_z_1 - label_C
    log_q_CK = head_CK / temperature - log_z_T[:, None]
    p_CK, rho_C = log_p_CK.exp(), log_rho_C.exp()
    # 0 * (-inf) counts as 0, for entries that only fill a row and for a tail of no mass.
    kl_CK = torch.where(fills_CK, torch.zeros_like(p_CK), p_CK * (log_p_CK - log_q_CK))
    tail_C = rho_C * (log_rho_C - (log_outside_T - log_z_T))
    kl_C = kl_CK.sum(dim=1) + torch.where(rho_C > 0, tail_C, torch.zeros_like(tail_C))
    if not with_gradient:
        return ce_C, kl_C, logits_CV

    total_C = p_CK.sum(dim=1) + rho_C
    kd = kd_weight * temperature
    spread_C = torch.where(sum_T > 0, rho_C / sum_T, torch.zeros_like(sum_T))
    slope_T = kd * (total_C * torch.exp(top_C / temperature - log_z_T) - spread_C)
    slope_1 = ce_weight * torch.exp(top_C - log_z_1)
    if outside_1 is outside_T:
        grad_CV = outside_T.mul_((slope_T + slope_1)[:, None])
    else:
        grad_CV = outside_T.mul_(slope_T[:, None]).addcmul_(outside_1, slope_1[:, None])
    student_T, student_1 = log_q_CK.exp(), (head_CK - log_z_1[:, None]).exp()
    on_kept = kd * (total_C[:, None] * student_T - p_CK) + ce_weight * student_1
    grad_CV.scatter_add_(1, ids_CK, on_kept)
    grad_CV.scatter_add_(1, labels_C[:, None], torch.full_like(label_C, -ce_weight)[:, None])
    return ce_C, kl_C, grad_CV


def _repeats(ids_CK: torch.Tensor) -> torch.Tensor:
    """Where a row's first id stands again behind the first column."""
    repeats = ids_CK == ids_CK[:, :1]
    repeats[:, 0] = False
    return repeats
