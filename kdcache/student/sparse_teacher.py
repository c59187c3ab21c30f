"""The teacher as the loss takes it: padded tensors at one temperature.

Axes: ``N`` rows, ``K`` kept entries, ``E`` ragged entries.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class SparseTeacher:
    """Teacher distributions at one temperature.

    Attributes:
        ids_NK: int64 vocabulary ids; places that fill a short row hold any id.
        log_probs_NK: float32 log-probabilities at T; ``-inf`` marks a place that only fills a short row.
        log_tail_N: float32 log of the mass outside the kept entries as one bucket, ``-inf`` for none.
        log_weights_NK: float32 log of what each entry stands for, where that is not its probability: the weight of
            an entry drawn from the tail. None: the probabilities themselves.
    """

    ids_NK: torch.Tensor
    log_probs_NK: torch.Tensor
    log_tail_N: torch.Tensor
    log_weights_NK: torch.Tensor | None = None

    @classmethod
    def from_ragged(
        cls,
        ids_E: torch.Tensor,
        log_probs_E: torch.Tensor,
        counts_N: torch.Tensor,
        log_tail_N: torch.Tensor | None = None,
        log_weights_E: torch.Tensor | None = None,
    ) -> SparseTeacher:
        """Rows laid end to end, ``counts_N`` entries each (0 allowed), filled up to the longest."""
        counts = counts_N.to(torch.int64)
        width = max(1, int(counts.max())) if len(counts) else 1
        column = torch.arange(width, device=ids_E.device)
        inside = column < counts[:, None]
        starts = torch.cumsum(counts, 0) - counts
        entry = (starts[:, None] + torch.where(inside, column, 0)).clamp(max=max(0, len(ids_E) - 1))

        def spread(values_E: torch.Tensor) -> torch.Tensor:
            if len(values_E) == 0:
                return values_E.new_full(entry.shape, -torch.inf)
            return torch.where(inside, values_E[entry], -torch.inf)

        ids = ids_E.new_zeros(entry.shape) if len(ids_E) == 0 else ids_E[entry]
        tail = log_probs_E.new_full((len(counts),), -torch.inf) if log_tail_N is None else log_tail_N
        weights = None if log_weights_E is None else spread(log_weights_E)
        return cls(ids.to(torch.int64), spread(log_probs_E), tail, weights)

    def renormalised(self) -> SparseTeacher:
        """The kept entries scaled to one and the rest dropped: the usual truncation.

        Biased: the student learns to put nothing outside the kept set. Kept for comparison.
        """
        mass = torch.logsumexp(self.log_probs_NK, dim=1, keepdim=True)
        # A row without entries stays one.
        scaled = torch.where(torch.isneginf(mass), self.log_probs_NK, self.log_probs_NK - mass)
        return SparseTeacher(self.ids_NK, scaled, torch.full_like(self.log_tail_N, -torch.inf))

    def rows(self, span: slice, dtype: torch.dtype) -> SparseTeacher:
        """Some of the rows, in ``dtype``."""
        return SparseTeacher(
            self.ids_NK[span],
            self.log_probs_NK[span].to(dtype),
            self.log_tail_N[span].to(dtype),
            None if self.log_weights_NK is None else self.log_weights_NK[span].to(dtype),
        )
