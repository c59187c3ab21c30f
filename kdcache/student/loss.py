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
from typing import Any

import torch

from kdcache.student.chunked_loss import ChunkedLoss, Settings
from kdcache.student.divergence import Divergence, divergence_of
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
    control_variate: bool = False,
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
        control_variate: where entries were drawn with probability ``p / weight``, take the student's own distribution as
            a guess for what was not drawn (`divergence.controlled`), by a share that the draws of the chunk's other rows
            tell: the gradient's expectation over the draws stays, its noise falls. The values stay as they are.

    Returns:
        The weighted total (differentiable in hidden states, head and bias), CE and divergence per row.

    Raises:
        ValueError: an unknown divergence, a temperature or shape that cannot be.
    """
    width = head_VD.shape[0] if vocab_size is None else vocab_size
    if not temperature > 0:
        raise ValueError(f"temperature should be above 0, found {temperature}")
    if not 0 < width <= head_VD.shape[0]:
        raise ValueError(f"vocab_size should lie between 1 and the head's {head_VD.shape[0]} rows, found {width}")
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows should be at least 1, found {chunk_rows}")
    if teacher.log_weights_NK is not None and divergence in ("reverse_kl", "jsd"):
        raise ValueError(
            f"{divergence} is defined over kept entries and their rest; sampled entries go with forward_kl"
        )
    if not len(hidden_ND) == len(labels_N) == len(teacher.ids_NK) == len(teacher.log_tail_N):
        raise ValueError(
            f"hidden states, labels and teacher should have one row per position, found {len(hidden_ND)}, "
            f"{len(labels_N)} and {len(teacher.ids_NK)}"
        )
    divergence_of(divergence, beta)
    rows = chunk_rows or max(1, CHUNK_BYTES // (4 * width))
    # Asked for here: inside the function gradients are always off.
    gradient = torch.is_grad_enabled()
    settings = Settings(temperature, ce_weight, kd_weight, divergence, beta, width, rows, gradient, control_variate)
    # Reductions and products stay in float32 whatever the caller's autocast says.
    with torch.autocast(hidden_ND.device.type, enabled=False):
        total, ce, spread = ChunkedLoss.apply(  # type: ignore[no-untyped-call]
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
        control_variate: bool = False,
    ) -> None:
        super().__init__()
        self.settings: dict[str, Any] = {
            "temperature": temperature,
            "ce_weight": ce_weight,
            "kd_weight": kd_weight,
            "divergence": divergence,
            "beta": beta,
            "vocab_size": vocab_size,
            "control_variate": control_variate,
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
