"""The sparse distillation loss: lambda_CE * CE + lambda_KD * T^2 * D(teacher_T, student_T), summed over rows.

Full logits never exist at once: rows go through the head in chunks, and the gradient is worked out analytically
in the forward pass, in the memory of the chunk's logits. With ``x`` the student's logits, ``q = softmax(x / T)``,
``q1 = softmax(x)`` and ``p_hat`` the teacher's target (kept entries, and a rest spread as the student spreads it)::

    dL/dx = lambda_CE (q1 - onehot(label)) + lambda_KD T (c q - p_hat),      c = sum p_hat      (forward KL)

The other divergences have the same shape (see `divergence`). Nothing is clamped; reductions are in float32. The mass
outside the kept set is summed directly (``1 - sum q`` would be off by a percent at a mass of 1e-3). T^2 scales value
and gradient (Hinton et al. 2015, arXiv:1503.02531).

Axes: ``N`` rows, ``D`` hidden, ``V`` vocabulary, ``K`` kept entries, ``C`` rows of a chunk, ``E`` ragged entries.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from kdcache.head import Head
from kdcache.student import row_passes
from kdcache.student.divergence import Bins, Divergence, divergence_of
from kdcache.student.sparse_teacher import SparseTeacher

__all__ = ["DistillationLoss", "LossSums", "SparseTeacher", "distillation_loss"]

CHUNK_BYTES = 256 << 20


@dataclass(frozen=True)
class LossSums:
    """What a batch costs, in nats. ``total`` carries the gradient; the rest does not.

    Attributes:
        total: weighted sum over rows, scalar.
        ce_N: cross-entropy with the label, per row.
        divergence_N: divergence to the teacher at T, per row, without T^2 and weight.
    """

    total: torch.Tensor
    ce_N: torch.Tensor
    divergence_N: torch.Tensor

    @property
    def ce(self) -> torch.Tensor:
        """Cross-entropy summed over rows."""
        return self.ce_N.sum()

    @property
    def divergence(self) -> torch.Tensor:
        """Divergence summed over rows."""
        return self.divergence_N.sum()


def distillation_loss(
    hidden_ND: torch.Tensor,
    head_VD: torch.Tensor,
    labels_N: torch.Tensor,
    teacher: SparseTeacher,
    *,
    temperature: float,
    ce_weight: float,
    kd_weight: float,
    divergence: Divergence = "forward_kl",
    beta: float = 0.5,
    bias_V: torch.Tensor | None = None,
    vocab_size: int | None = None,
    chunk_rows: int | None = None,
) -> LossSums:
    """Loss sums of the rows.

    Args:
        hidden_ND: hidden states of the positions that count (drop masked ones first), any floating dtype.
        head_VD: head weight, frozen or trainable; a frozen one gets no gradient buffer.
        labels_N: int64 next tokens.
        teacher: distributions at ``temperature``.
        temperature: T.
        ce_weight: lambda_CE.
        kd_weight: lambda_KD, before T^2.
        divergence: ``forward_kl``, ``soft_ce``, ``reverse_kl`` or ``jsd``.
        beta: weight of the teacher in the generalised JSD.
        bias_V: head bias.
        vocab_size: columns that stand for tokens, the rest is padding of the head; all of them when None.
        chunk_rows: rows per chunk; by default as many as keep a chunk's float32 logits within 256 MiB.

    Returns:
        The weighted total (differentiable in hidden states, head and bias), CE and divergence per row.

    Raises:
        ValueError: an unknown divergence, a temperature or shape that cannot be.
    """
    if not temperature > 0:
        raise ValueError(f"temperature should be above 0, found {temperature}")
    if not len(hidden_ND) == len(labels_N) == len(teacher.ids_NK) == len(teacher.log_tail_N):
        raise ValueError(
            f"hidden states, labels and teacher should have one row per position, found {len(hidden_ND)}, "
            f"{len(labels_N)} and {len(teacher.ids_NK)}"
        )
    divergence_of(divergence, beta)
    width = head_VD.shape[0] if vocab_size is None else vocab_size
    settings = _Settings(
        temperature, ce_weight, kd_weight, divergence, beta, width, chunk_rows or max(1, CHUNK_BYTES // (4 * width))
    )
    total, ce, spread = _ChunkedLoss.apply(  # type: ignore[no-untyped-call]
        hidden_ND, head_VD, bias_V, labels_N, teacher, settings
    )
    return LossSums(total, ce, spread)


class DistillationLoss(torch.nn.Module):
    """`distillation_loss` with its settings, for training loops that keep losses as modules."""

    def __init__(
        self,
        *,
        temperature: float = 2.0,
        ce_weight: float = 0.5,
        kd_weight: float = 0.5,
        divergence: Divergence = "forward_kl",
        beta: float = 0.5,
        vocab_size: int | None = None,
    ) -> None:
        super().__init__()
        self.settings: dict[str, Any] = {
            "temperature": temperature,
            "ce_weight": ce_weight,
            "kd_weight": kd_weight,
            "divergence": divergence,
            "beta": beta,
            "vocab_size": vocab_size,
        }

    def forward(
        self,
        hidden_ND: torch.Tensor,
        head_VD: torch.Tensor,
        labels_N: torch.Tensor,
        teacher: SparseTeacher,
        bias_V: torch.Tensor | None = None,
    ) -> LossSums:
        """As `distillation_loss`."""
        return distillation_loss(hidden_ND, head_VD, labels_N, teacher, bias_V=bias_V, **self.settings)

    def extra_repr(self) -> str:
        """The settings."""
        return ", ".join(f"{k}={v!r}" for k, v in self.settings.items())


@dataclass(frozen=True)
class _Settings:
    temperature: float
    ce_weight: float
    kd_weight: float
    divergence: str
    beta: float
    width: int
    rows: int


class _ChunkedLoss(torch.autograd.Function):
    """Gradients are computed in the forward pass, chunk by chunk, and only scaled in the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        head_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        labels_N: torch.Tensor,
        teacher: SparseTeacher,
        settings: _Settings,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        needs_hidden, needs_head, needs_bias = ctx.needs_input_grad[:3]
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
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        scale = grad_outputs[0]
        grads = tuple(None if g is None else g * scale.to(g.dtype) for g in ctx.grads)
        return (*grads, None, None, None)


def _chunk(
    logits_CV: torch.Tensor,
    labels_C: torch.Tensor,
    teacher: SparseTeacher,
    settings: _Settings,
    passes: ModuleType,
    *,
    with_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """CE and divergence per row; the logits become the gradient of the weighted sum."""
    temperature, ids_CK, log_p_CK = settings.temperature, teacher.ids_NK, teacher.log_probs_NK
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
    ce_C = log_z_1 - label_C
    if not with_gradient:
        return ce_C, outcome.value_C
    kd = settings.kd_weight * temperature
    top_T_C, nothing = sums.top_C / temperature, torch.isneginf(sums.log_sum_T_C)
    share_C = torch.where(nothing, torch.zeros_like(top_T_C), torch.exp(top_T_C - sums.log_sum_T_C))
    factor_T = kd * (outcome.by_q_C * torch.exp(top_T_C - log_z_T) + outcome.by_share_C * share_C)
    factor_1 = settings.ce_weight * torch.exp(sums.top_C - log_z_1)
    grad_CV = passes.outside_gradient_(logits_CV, sums, factor_T, factor_1, temperature)
    on_kept = settings.ce_weight * (head_CK - log_z_1[:, None]).exp() + kd * outcome.on_kept_CK
    grad_CV.scatter_add_(1, ids_CK, on_kept)
    grad_CV.scatter_add_(1, labels_C[:, None], torch.full_like(label_C, -settings.ce_weight)[:, None])
    return ce_C, outcome.value_C


def _passes(hidden_ND: torch.Tensor) -> ModuleType:
    """The Triton passes on CUDA where Triton is installed, the torch ones elsewhere."""
    if hidden_ND.is_cuda and hidden_ND.dtype != torch.float64:
        try:
            from kdcache.student import row_passes_triton
        except ImportError:
            return row_passes
        return row_passes_triton
    return row_passes


def _repeats(ids_CK: torch.Tensor) -> torch.Tensor:
    """Where a row's first id stands again behind the first column."""
    repeats = ids_CK == ids_CK[:, :1]
    repeats[:, 0] = False
    return repeats
