"""Logits -> sparse rows: which vocabulary entries are kept or drawn, and what is left outside.

Four methods. ``top_k``: the k largest. ``threshold``: all whose probability reaches a floor, at most k.
``threshold_sampling``: the same head without a cap, and a tail drawn with probabilities proportional to size, each drawn
entry standing for the floor (Poisson's inclusion probabilities, drawn systematically: one uniform number per row, placed
along the cumulated tail; Madow 1949). ``random_sampling``: draws with replacement (RS-KD, Anshumann et al., ACL 2025).

Threshold sampling on the CPU is compiled and reads each row once (`threshold_sampling`). Elsewhere, per row of V logits at T and
2 T: one softmax, one sum and one sum of squares by blocks of the vocabulary, and a look at the blocks that can hold something
(`masses`); no sort. On the CPU some rows go at once, in memory that stays in the processor's cache.

Axes: ``N`` positions, ``C`` positions of a block, ``V`` vocabulary, ``B`` temperatures, ``D`` draws, ``H`` entries kept, ``M``
drawn, ``U`` distinct ones drawn with replacement.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from kdcache.cache.layout import REST_LIMIT
from kdcache.cache.rows import RowDesign, SparseRows, concatenate
from kdcache.teacher.masses import CERTAIN, Inclusion, Masses, Workspace
from kdcache.teacher.top_k import largest

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
    logits_NV, wanted = logits_NV.detach().float(), selection.uniforms
    if wanted and (uniforms_ND is None or uniforms_ND.shape != (len(labels_N), wanted)):
        raise ValueError(f"{selection.method} needs {wanted} uniform numbers per row")
    if selection.method == "threshold_sampling" and uniforms_ND is not None and _is_compiled(logits_NV):
        return _select_compiled(logits_NV, labels_N, selection, uniforms_ND[:, 0])
    parts, workspace = [], Workspace()
    for block in _blocks(logits_NV):
        uniforms = None if uniforms_ND is None else torch.from_numpy(uniforms_ND[block]).to(logits_NV.device)
        parts.append(_select_block(logits_NV[block], labels_N[block], selection, uniforms, workspace))
    return Selected(concatenate([p.rows for p in parts]), np.concatenate([p.entropy for p in parts]))


def _is_compiled(logits_NV: torch.Tensor) -> bool:
    return logits_NV.device.type == "cpu"


def _blocks(logits_NV: torch.Tensor) -> list[slice]:
    """Rows that go at once; one empty block where there are none."""
    count, width = logits_NV.shape
    size = max(1, count if logits_NV.is_cuda else _BLOCK_BYTES // (4 * width))
    return [slice(start, start + size) for start in range(0, max(1, count), size)]


def _select_compiled(
    logits_NV: torch.Tensor, labels_N: torch.Tensor, selection: Selection, uniforms_N: NDArray[np.float64]
) -> Selected:
    """Threshold sampling by the compiled pass."""
    # A GPU does without the compiler.
    from kdcache.teacher.threshold_sampling import sample

    found = sample(logits_NV, selection.temperatures, selection.floors, uniforms_N)
    maximum_N = torch.from_numpy(found.maximum)
    if 1.0 in selection.temperatures:
        partition_N = torch.from_numpy(found.partition[:, selection.temperatures.index(1.0)])
        log_partition_N = partition_N.log().float()
    else:
        log_z_N = torch.cat([torch.logsumexp(logits_NV[block], dim=1) for block in _blocks(logits_NV)])
        log_partition_N = log_z_N - maximum_N
    number_N = torch.arange(len(labels_N))
    row_H, row_M = (torch.repeat_interleave(number_N, torch.from_numpy(c)) for c in (found.head, found.tail))
    kept = _Kept(
        row_H, torch.from_numpy(found.head_ids).long(), row_M, torch.from_numpy(found.tail_ids).long(), maximum_N,
        log_partition_N, torch.from_numpy(found.left / found.inside).float(),
    )  # fmt: skip
    entropy_N = torch.zeros_like(maximum_N)
    if selection.entropy:
        parts = [_entropy(logits_NV[b], maximum_N[b], log_partition_N[b]) for b in _blocks(logits_NV)]
        entropy_N = torch.cat(parts)
    return Selected(_rows(logits_NV, labels_N, selection, kept), _numpy(entropy_N))


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
    log_partition_C = _log_partition_at_one(logits_CV, masses, row_H, id_H, maximum_C)
    entropy_C = torch.zeros_like(maximum_C)
    if selection.entropy:
        entropy_C = _entropy(logits_CV, maximum_C, log_partition_C)
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
    kept = _Kept(row_H, id_H, row_M, id_M, maximum_C, log_partition_C, rest_CB, counts_H, counts_M)
    return Selected(_rows(logits_CV, labels_C, selection, kept), _numpy(entropy_C))


class _Kept(NamedTuple):
    """What of rows is kept and drawn: rows and ids (int64 ``[H]`` and ``[M]``), how often where that counts; the largest logit
    and the log-partition at T = 1 relative to it (float32 ``[N]``); and what is left over what is kept (float32 ``[N, B]``)."""

    row_H: torch.Tensor
    id_H: torch.Tensor
    row_M: torch.Tensor
    id_M: torch.Tensor
    maximum_N: torch.Tensor
    log_partition_N: torch.Tensor
    rest_NB: torch.Tensor
    counts_H: torch.Tensor | None = None
    counts_M: torch.Tensor | None = None


def _rows(logits_NV: torch.Tensor, labels_N: torch.Tensor, selection: Selection, kept: _Kept) -> SparseRows:
    """Sparse rows of what was found."""
    head, tail = (torch.bincount(r, minlength=len(labels_N)).cpu().numpy() for r in (kept.row_H, kept.row_M))
    tail_logits = _numpy(logits_NV[kept.row_M, kept.id_M] - kept.maximum_N[kept.row_M])
    if not selection.tail_logits:
        tail_logits = mean_of_rows(tail_logits, tail).astype(np.float32)
    label_N = logits_NV.gather(1, labels_N[:, None]).squeeze(1) - kept.maximum_N - kept.log_partition_N
    return SparseRows(
        head=head,
        tail=tail,
        head_ids=kept.id_H.cpu().numpy().astype(np.uint32),
        head_logits=_numpy(logits_NV[kept.row_H, kept.id_H] - kept.maximum_N[kept.row_H]),
        tail_ids=kept.id_M.cpu().numpy().astype(np.uint32),
        tail_logits=tail_logits,
        rest=_numpy(kept.rest_NB.log().clamp(-REST_LIMIT, REST_LIMIT)),
        label_log_prob=_numpy(label_N.clamp(max=0.0)),
        design=selection.design(logits_NV.shape[1]),
        head_counts=None if kept.counts_H is None else kept.counts_H.cpu().numpy().astype(np.uint8),
        tail_counts=None if kept.counts_M is None else kept.counts_M.cpu().numpy().astype(np.uint8),
    )


def _entropy(logits_CV: torch.Tensor, maximum_C: torch.Tensor, log_partition_C: torch.Tensor) -> torch.Tensor:
    """Entropy at T = 1 in nats."""
    log_p_CV = logits_CV - (maximum_C + log_partition_C)[:, None]
    # Probabilities of 0 have logit -inf; 0 * inf is nothing here.
    return -torch.where(log_p_CV > -torch.inf, log_p_CV.exp() * log_p_CV, 0.0).sum(dim=1)


def _log_partition_at_one(
    logits_CV: torch.Tensor, masses: Masses, row_H: torch.Tensor, id_H: torch.Tensor, maximum_C: torch.Tensor
) -> torch.Tensor:
    """log sum exp of the logits less the largest; from that one's probability where T = 1 is declared."""
    log_p_H = masses.log_largest_at_one(row_H, id_H)
    if log_p_H is None:
        return torch.logsumexp(logits_CV, dim=1) - maximum_C
    return -torch.full_like(maximum_C, -torch.inf).scatter_reduce(0, row_H, log_p_H, "amax")


def _head(
    logits_CV: torch.Tensor, selection: Selection, inclusion: Inclusion | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and ids of the entries kept exactly, ids rising within a row; the largest is always among them."""
    if selection.method == "random_sampling":
        best_C = logits_CV.argmax(dim=1)
        return torch.arange(len(best_C), device=best_C.device), best_C
    if inclusion is None:
        return _rising(*largest(logits_CV, selection.k), logits_CV.shape[1])
    sampling = selection.method == "threshold_sampling"
    row_H, id_H = inclusion.at_least(CERTAIN if sampling else 1.0)
    counts_C = torch.bincount(row_H, minlength=len(logits_CV))
    bare = (counts_C == 0).nonzero().squeeze(1)
    over = counts_C > selection.k if not sampling else torch.zeros_like(counts_C, dtype=torch.bool)
    if len(bare) or bool(over.any()):
        within = ~over[row_H]
        most = over.nonzero().squeeze(1)
        row_K, id_K = largest(logits_CV[most], selection.k)
        row_H = torch.cat([row_H[within], bare, most[row_K]])
        id_H = torch.cat([id_H[within], logits_CV[bare].argmax(dim=1), id_K])
        return _rising(row_H, id_H, logits_CV.shape[1])
    return row_H, id_H


def _rising(rows: torch.Tensor, ids: torch.Tensor, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
    order = (rows * vocabulary + ids).argsort()
    return rows[order], ids[order]


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


def mean_of_rows(values: NDArray[np.floating[Any]], counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Each row's mean, once for each of its values; ``counts`` says how many values each row has."""
    filled = counts[counts > 0]
    if not len(filled):
        return values.astype(np.float64)
    return np.repeat(np.add.reduceat(values, np.cumsum(filled) - filled, dtype=np.float64) / filled, filled)


def _numpy(values: torch.Tensor) -> NDArray[np.float32]:
    return values.to(torch.float32).cpu().numpy()
