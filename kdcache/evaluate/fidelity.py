"""How faithful sparse rows are to the teacher's full distributions, measured on dense logits.

For each temperature T, with ``p`` the teacher's distribution over the whole vocabulary:

- **kept mass**: probability of the exactly kept entries;
- **KL(full || rebuilt)** and **total variation**: the rebuilt distribution has the head as stored and spreads what is
  left evenly over the rest of the vocabulary. What was drawn is not used: one position's draws say little, their average
  over positions says much, which the gradient shows;
- **top-1**: positions whose likeliest token is the rebuilt one's;
- **gradient**: of T^2 KL(teacher_T || student_T) in the student's head, summed over the sample, against that of the full
  vocabulary: cosine, and norm of the difference over norm.

Axes: ``C`` positions of a chunk, ``V`` vocabulary, ``D`` the student's hidden size, ``K`` kept entries.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from kdcache.student.collate import sparse_teacher

if TYPE_CHECKING:
    from kdcache.cache.rows import SparseRows
    from kdcache.head import Head

TEMPERATURES = (0.5, 1.0, 1.5, 2.0, 4.0)
# Hidden sizes above this are projected onto so many random directions: the gradient of a real head has too many numbers
# to be kept for every setting, and its norms and angles survive (Johnson & Lindenstrauss 1984).
_DIRECTIONS = 256


@dataclass(frozen=True)
class Fidelity:
    """Figures of one setting at one temperature; nats, shares, and None where there is no student."""

    temperature: float
    kept_mass: float
    kept_mass_p1: float
    kl: float
    kl_p99: float
    total_variation: float
    top_1: float
    gradient_cosine: float | None
    gradient_error: float | None


@dataclass
class _Sums:
    """What is added up over chunks."""

    mass: list[torch.Tensor] = field(default_factory=list)
    kl: list[torch.Tensor] = field(default_factory=list)
    variation: float = 0.0
    same: int = 0
    difference_VD: torch.Tensor | None = None


class FidelityMeter:
    """Measures several settings on the same chunks of dense logits.

    Args:
        temperatures: those wanted; one below a setting's smallest declared temperature is left out for it.
        student: head of a student, for the gradient; None leaves it out.
    """

    def __init__(self, temperatures: tuple[float, ...] = TEMPERATURES, student: Head | None = None) -> None:
        self.temperatures = temperatures
        self._student = student
        self._sums: dict[tuple[str, float], _Sums] = {}
        self._full_VD: dict[float, torch.Tensor] = {}
        self.positions = 0

    def add(
        self,
        logits_CV: torch.Tensor,
        settings: dict[str, SparseRows],
        student_hidden_CD: torch.Tensor | None = None,
        *,
        only: dict[str, tuple[float, ...]] | None = None,
    ) -> None:
        """One chunk.

        Args:
            logits_CV: the teacher's full logits, float32.
            settings: by name, the rows of these positions as they come back from a cache.
            student_hidden_CD: the student's hidden states at these positions.
            only: temperatures of settings that are not wanted at all of them.
        """
        self.positions += len(logits_CV)
        best_C = logits_CV.argmax(dim=1)
        student_CV = None
        if self._student is not None and student_hidden_CD is not None:
            student_CV = self._student.logits(student_hidden_CD)
            student_hidden_CD = _projected(student_hidden_CD.float())
        for t in self.temperatures:
            log_p_CV = torch.log_softmax(logits_CV / t, dim=1)
            q_CV = None
            if student_CV is not None and student_hidden_CD is not None:
                q_CV = torch.softmax(student_CV / t, dim=1)
                full = t * (q_CV - log_p_CV.exp()).T @ student_hidden_CD
                self._full_VD[t] = self._full_VD[t] + full if t in self._full_VD else full
            for name, rows in settings.items():
                wanted = t in (only or {}).get(name, self.temperatures)
                if wanted and t >= rows.design.temperatures[0]:
                    sums = self._sums.setdefault((name, t), _Sums())
                    _add(sums, log_p_CV, best_C, rows, t, q_CV, student_hidden_CD)

    def results(self, name: str) -> list[Fidelity]:
        """Figures of a setting, one for each temperature it can give."""
        found = []
        for t in self.temperatures:
            sums = self._sums.get((name, t))
            if sums is None:
                continue
            mass, kl = torch.cat(sums.mass), torch.cat(sums.kl)
            cosine = error = None
            if sums.difference_VD is not None:
                full, difference = self._full_VD[t], sums.difference_VD
                ours = full + difference
                cosine = float((full * ours).sum() / (full.norm() * ours.norm()).clamp(min=1e-30))
                error = float(difference.norm() / full.norm().clamp(min=1e-30))
            found.append(
                Fidelity(
                    temperature=t,
                    kept_mass=float(mass.mean()),
                    kept_mass_p1=float(mass.quantile(0.01)),
                    kl=float(kl.mean()),
                    kl_p99=float(kl.quantile(0.99)),
                    total_variation=sums.variation / len(mass),
                    top_1=sums.same / len(mass),
                    gradient_cosine=cosine,
                    gradient_error=error,
                )
            )
        return found


def _projected(hidden_CD: torch.Tensor) -> torch.Tensor:
    size = hidden_CD.shape[1]
    if size <= _DIRECTIONS:
        return hidden_CD
    directions = torch.randn(size, _DIRECTIONS, generator=torch.Generator().manual_seed(0)) * _DIRECTIONS**-0.5
    projected: torch.Tensor = hidden_CD @ directions.to(hidden_CD.device)
    return projected


def _add(
    sums: _Sums,
    log_p_CV: torch.Tensor,
    best_C: torch.Tensor,
    rows: SparseRows,
    t: float,
    q_CV: torch.Tensor | None,
    hidden_CD: torch.Tensor | None,
) -> None:
    device, width = log_p_CV.device, log_p_CV.shape[1]
    kept = torch.from_numpy(rows.kept).to(device)
    row_H = torch.from_numpy(np.repeat(np.arange(len(rows)), rows.head)).to(device)
    id_H = torch.from_numpy(rows.head_ids.astype(np.int64)).to(device)
    log_z = rows.log_partition_at(t)
    log_head = rows.head_logits.astype(np.float64) / t - np.repeat(log_z, rows.head)
    log_head_H = torch.from_numpy(log_head.astype(np.float32)).to(device)
    p_H = log_p_CV[row_H, id_H].exp()
    zeros_C = torch.zeros(len(rows), device=device)

    def total(values_H: torch.Tensor) -> torch.Tensor:
        return zeros_C.index_add(0, row_H, values_H)

    mass_C = total(p_H)
    outside_C = torch.from_numpy(rows.design.vocab_size - rows.head).to(device).clamp(min=1)
    even_C = (1.0 - total(log_head_H.exp())).clamp(min=1e-12) / outside_C
    entropy_C = -torch.where(log_p_CV > -torch.inf, log_p_CV.exp() * log_p_CV, 0.0).sum(dim=1)
    kl_C = -entropy_C - total(p_H * log_head_H) - (1.0 - mass_C).clamp(min=0) * even_C.log()
    # sum over the whole vocabulary of |p - even|, and then the head's entries put right
    spread_C = (log_p_CV.exp() - even_C[:, None]).abs().sum(dim=1)
    variation_C = spread_C + total((p_H - log_head_H.exp()).abs() - (p_H - even_C[row_H]).abs())
    top_C = torch.full_like(zeros_C, -torch.inf).scatter_reduce(0, row_H, log_head_H, "amax")
    same_C = total(((id_H == best_C[row_H]) & (log_head_H >= top_C[row_H])).float())
    sums.mass.append(mass_C[kept].cpu())
    sums.kl.append(kl_C[kept].clamp(min=0).cpu())
    sums.variation += 0.5 * float(variation_C[kept].sum())
    sums.same += int(same_C[kept].sum())
    if q_CV is None or hidden_CD is None:
        return
    teacher = sparse_teacher(rows, t)
    log_weights = teacher.log_probs_NK if teacher.log_weights_NK is None else teacher.log_weights_NK
    target_CV = torch.zeros_like(log_p_CV).scatter_add_(1, teacher.ids_NK.to(device), log_weights.exp().to(device))
    there_CV = torch.zeros(len(rows), width, dtype=torch.bool, device=device)
    there_CV[row_H, id_H] = True
    rest_C = teacher.log_tail_N.exp().to(device)
    if bool((rest_C > 0).any()):
        tail_CV = torch.where(there_CV, 0.0, q_CV)
        target_CV += tail_CV * (rest_C / tail_CV.sum(dim=1).clamp(min=1e-30))[:, None]
    # T (c q - p_hat) - T (q - p). A position that is left empty gives no gradient: all of it is missing.
    difference_CV = t * ((target_CV.sum(dim=1, keepdim=True) - 1.0) * q_CV - target_CV + log_p_CV.exp())
    difference_VD = difference_CV.T @ hidden_CD
    sums.difference_VD = difference_VD if sums.difference_VD is None else sums.difference_VD + difference_VD
