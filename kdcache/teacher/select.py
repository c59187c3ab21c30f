"""Logits -> sparse rows: which vocabulary entries are kept or drawn, and what is left outside.

Four methods. ``top_k``: the k largest. ``threshold``: all whose probability reaches a floor, at most k.
``threshold_sampling``: the same head without a cap, and a tail drawn with probabilities proportional to size, each drawn
entry standing for the floor (Poisson's inclusion probabilities, drawn systematically: one uniform number per row, placed
along the cumulated tail; Madow 1949). ``random_sampling``: draws with replacement (RS-KD, Anshumann et al., ACL 2025).

Price per row of V logits, threshold sampling at T and 2 T: one softmax, one sum and one sum of squares by blocks of the
vocabulary, and a look at the blocks that can hold something (`masses`); no sort. Some rows go at once, in memory that stays in
the processor's cache.

Axes: ``N`` positions, ``C`` positions of a block, ``V`` vocabulary, ``K`` kept entries, ``B`` temperatures, ``D`` draws.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from kdcache.cache.layout import REST_LIMIT
from kdcache.cache.rows import RowDesign, SparseRows, concatenate
from kdcache.teacher.masses import Inclusion, Masses, Workspace

# How far past k the first look goes: half-precision logits tie at the border in most rows, and a
# tie that ends inside this margin is broken by id without sorting the whole row.
_TIE_MARGIN = 32
# An entry this close to certain is kept: rounding of the cumulated sum could otherwise draw it twice.
_CERTAIN = 1.0 - 2.0**-10
# Bytes of a block's logits on the CPU; several passes go over it.
_BLOCK_BYTES = 5 << 20


@dataclass(frozen=True)
class Selection:
    """What to keep. The largest entry is always kept.

    Attributes:
        method: ``top_k``, ``threshold``, ``threshold_sampling`` or ``random_sampling``.
        temperatures: declared temperatures, ascending.
        k: entries of ``top_k``; at most so many of ``threshold``.
        floors: probability floor per temperature of the two threshold methods.
        draws: draws per row of ``random_sampling``, made at the one declared temperature.
        tail_logits: whether drawn entries carry their own logits; if not, a row's share their mean.
        entropy: whether the teacher's entropy is wanted as well.
    """

    method: str
    temperatures: tuple[float, ...]
    k: int = 64
    floors: tuple[float, ...] = ()
    draws: int = 16
    tail_logits: bool = True
    entropy: bool = False

    @property
    def uniforms(self) -> int:
        """Uniform numbers a row needs."""
        return {"threshold_sampling": 1, "random_sampling": self.draws}.get(self.method, 0)

    def design(self, vocab_size: int) -> RowDesign:
        """What the rows share."""
        return RowDesign(
            self.temperatures,
            vocab_size,
            floors=self.floors if self.method == "threshold_sampling" else (),
            draws=self.draws if self.method == "random_sampling" else 0,
            tail_logits=self.tail_logits,
            k=self.k if self.method in ("top_k", "threshold") else vocab_size,
        )


class Selected(NamedTuple):
    """Rows, and the teacher's entropy at T = 1 per row in nats (float32 ``[N]``, zeros unless asked for)."""

    rows: SparseRows
    entropy: NDArray[np.float32]


def select(
    logits_NV: torch.Tensor,
    labels_N: torch.Tensor,
    selection: Selection,
    uniforms_ND: NDArray[np.float64] | None = None,
) -> Selected:
    """Sparse rows of dense logits.

    Args:
        logits_NV: float32, only columns that stand for tokens.
        labels_N: int64, the token that follows each position.
        selection: what to keep.
        uniforms_ND: float64 in [0, 1), ``selection.uniforms`` per row; None where none are needed.

    Returns:
        Rows on the CPU. Entries with probability zero are never kept. A row with NaN or +inf logits has
        non-finite numbers; the caller knows which sequence that is.
    """
    width = logits_NV.shape[1]
    wanted = selection.uniforms
    if wanted and (uniforms_ND is None or uniforms_ND.shape != (len(labels_N), wanted)):
        raise ValueError(f"{selection.method} needs {wanted} uniform numbers per row")
    size = len(labels_N) if logits_NV.is_cuda else max(1, _BLOCK_BYTES // (4 * width))
    parts, workspace = [], Workspace()
    for start in range(0, max(1, len(labels_N)), max(1, size)):
        block = slice(start, start + size)
        uniforms = None if uniforms_ND is None else torch.from_numpy(uniforms_ND[block]).to(logits_NV.device)
        parts.append(_select_block(logits_NV[block], labels_N[block], selection, uniforms, workspace))
    return Selected(concatenate([p.rows for p in parts]), np.concatenate([p.entropy for p in parts]))


def _select_block(
    logits_CV: torch.Tensor,
    labels_C: torch.Tensor,
    selection: Selection,
    uniforms_CD: torch.Tensor | None,
    workspace: Workspace,
) -> Selected:
    masses = Masses(logits_CV, selection.temperatures, workspace)
    inclusion = Inclusion(masses, selection.floors) if selection.floors else None
    row_H, id_H = _head(logits_CV, selection, inclusion)
    logit_H = logits_CV[row_H, id_H]
    minimum_C = logits_CV.new_full((len(labels_C),), -torch.inf)
    maximum_C = minimum_C.scatter_reduce(0, row_H, logit_H, "amax")
    # A not-a-number must not be lost among the others.
    maximum_C = torch.where(torch.isnan(logits_CV[:, 0]), torch.nan, maximum_C)
    log_z_C = _log_partition_at_one(logits_CV, masses, row_H, id_H, maximum_C)
    entropy_C = torch.zeros_like(maximum_C)
    if selection.entropy:
        log_p_CV = logits_CV - log_z_C[:, None]
        # Probabilities of 0 have logit -inf; 0 * inf is nothing here.
        entropy_C = -torch.where(log_p_CV > -torch.inf, log_p_CV.exp() * log_p_CV, 0.0).sum(dim=1)
    inside_CB = torch.stack(
        [
            # In double precision the order of adding, which a GPU leaves open, leaves no trace.
            torch.zeros_like(maximum_C, dtype=torch.float64).index_add_(0, row_H, p_H.double()).float()
            for p_H in masses.of(row_H, id_H)
        ],
        dim=1,
    )
    counts_H = counts_M = None
    row_M = id_M = row_H[:0]
    if selection.method == "random_sampling" and uniforms_CD is not None:
        row_M, id_M, counts_M, counts_H = _with_replacement(masses.full(0), uniforms_CD, id_H)
    masses.take_out(row_H, id_H)
    rest_CB = masses.left() / inside_CB
    if selection.method == "threshold_sampling" and inclusion is not None and uniforms_CD is not None:
        row_M, id_M = inclusion.draw(uniforms_CD[:, 0], (row_H, id_H))
    head, tail = (torch.bincount(r, minlength=len(labels_C)).cpu().numpy() for r in (row_H, row_M))
    tail_logits = _numpy(logits_CV[row_M, id_M] - maximum_C[row_M])
    if not selection.tail_logits:
        tail_logits = mean_of_rows(tail_logits, tail).astype(np.float32)
    label_C = logits_CV.gather(1, labels_C[:, None]).squeeze(1) - log_z_C
    rows = SparseRows(
        head=head,
        tail=tail,
        head_ids=id_H.cpu().numpy().astype(np.uint32),
        head_logits=_numpy(logit_H - maximum_C[row_H]),
        tail_ids=id_M.cpu().numpy().astype(np.uint32),
        tail_logits=tail_logits,
        rest=_numpy(rest_CB.log().clamp(-REST_LIMIT, REST_LIMIT)),
        label_log_prob=_numpy(label_C.clamp(max=0.0)),
        design=selection.design(logits_CV.shape[1]),
        head_counts=None if counts_H is None else counts_H.cpu().numpy().astype(np.uint8),
        tail_counts=None if counts_M is None else counts_M.cpu().numpy().astype(np.uint8),
    )
    return Selected(rows, _numpy(entropy_C))


def _log_partition_at_one(
    logits_CV: torch.Tensor, masses: Masses, row_H: torch.Tensor, id_H: torch.Tensor, maximum_C: torch.Tensor
) -> torch.Tensor:
    """log sum exp of the logits; from the largest entry's probability where T = 1 is declared."""
    log_p_H = masses.log_largest_at_one(row_H, id_H)
    if log_p_H is None:
        return torch.logsumexp(logits_CV, dim=1)
    return maximum_C - torch.full_like(maximum_C, -torch.inf).scatter_reduce(0, row_H, log_p_H, "amax")


def _head(
    logits_CV: torch.Tensor, selection: Selection, inclusion: Inclusion | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and ids of the entries kept exactly, ids rising within a row; the largest is always among them."""
    if selection.method == "random_sampling":
        best_C = logits_CV.argmax(dim=1)
        return torch.arange(len(best_C), device=best_C.device), best_C
    if inclusion is None:
        return _rising(*_largest(logits_CV, selection.k), logits_CV.shape[1])
    sampling = selection.method == "threshold_sampling"
    row_H, id_H = inclusion.at_least(_CERTAIN if sampling else 1.0)
    counts_C = torch.bincount(row_H, minlength=len(logits_CV))
    bare = (counts_C == 0).nonzero().squeeze(1)
    over = counts_C > selection.k if not sampling else torch.zeros_like(counts_C, dtype=torch.bool)
    if len(bare) or bool(over.any()):
        within = ~over[row_H]
        most = over.nonzero().squeeze(1)
        row_K, id_K = _largest(logits_CV[most], selection.k)
        row_H = torch.cat([row_H[within], bare, most[row_K]])
        id_H = torch.cat([id_H[within], logits_CV[bare].argmax(dim=1), id_K])
        return _rising(row_H, id_H, logits_CV.shape[1])
    return row_H, id_H


def _rising(rows: torch.Tensor, ids: torch.Tensor, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
    order = (rows * vocabulary + ids).argsort()
    return rows[order], ids[order]


def _largest(logits_CV: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and ids of the k largest entries whose probability is not 0; the first in any case."""
    values_CK, ids_CK = top_k(logits_CV, min(k, logits_CV.shape[1]))
    there_CK = values_CK > -torch.inf
    there_CK[:, :1] = True
    return there_CK.nonzero(as_tuple=True)[0], ids_CK[there_CK]


def _with_replacement(
    p_CV: torch.Tensor, uniforms_CD: torch.Tensor, best_C: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows, ids and counts of distinct entries drawn, other than the largest; and how often that one was."""
    cumulated_CV = p_CV.double().cumsum(dim=1)
    points_CD = uniforms_CD * cumulated_CV[:, -1:]
    # right=True: an entry of probability zero has no room for a point.
    ids_CD = torch.searchsorted(cumulated_CV, points_CD, right=True).clamp_(max=p_CV.shape[1] - 1)
    ids_CD = ids_CD.sort(dim=1).values
    first_CD = torch.ones_like(ids_CD, dtype=torch.bool)
    first_CD[:, 1:] = ids_CD[:, 1:] != ids_CD[:, :-1]
    row_U, ids_U = first_CD.nonzero(as_tuple=True)[0], ids_CD[first_CD]
    starts_U = first_CD.flatten().nonzero().squeeze(1)
    counts_U = torch.diff(starts_U, append=starts_U.new_tensor([ids_CD.numel()]))
    is_best_U = ids_U == best_C[row_U]
    best_counts_C = torch.zeros_like(best_C).index_add_(0, row_U[is_best_U], counts_U[is_best_U])
    return row_U[~is_best_U], ids_U[~is_best_U], counts_U[~is_best_U], best_counts_C


def top_k(values_NV: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``k`` largest of each row, largest first, equal values by lowest id: the same on any machine.

    ``torch.topk`` breaks ties as it likes. A few more than ``k`` are taken and sorted stably; only rows
    whose tie reaches past those are sorted whole.
    """
    width = values_NV.shape[1]
    taken = min(width, k + _TIE_MARGIN)
    values, ids = torch.topk(values_NV, taken, dim=1)
    by_id = ids.argsort(dim=1)
    values, ids = values.gather(1, by_id), ids.gather(1, by_id)
    by_value = values.argsort(dim=1, descending=True, stable=True)
    values, ids = values.gather(1, by_value), ids.gather(1, by_value)
    if taken < width:
        open_ended = values[:, k - 1] == values[:, -1]
        if bool(open_ended.any()):
            order = values_NV[open_ended].argsort(dim=1, descending=True, stable=True)[:, :taken]
            ids[open_ended] = order
            values[open_ended] = values_NV[open_ended].gather(1, order)
    return values[:, :k], ids[:, :k]


def mean_of_rows(values: NDArray[np.floating[Any]], counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Each row's mean, once for each of its values; ``counts`` says how many values each row has."""
    filled = counts[counts > 0]
    if not len(filled):
        return values.astype(np.float64)
    return np.repeat(np.add.reduceat(values, np.cumsum(filled) - filled, dtype=np.float64) / filled, filled)


def _numpy(values: torch.Tensor) -> NDArray[np.float32]:
    return values.to(torch.float32).cpu().numpy()
