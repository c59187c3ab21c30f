"""Logits -> sparse rows: which vocabulary entries are kept, and what is left outside.

Axes: ``N`` positions, ``V`` vocabulary, ``K`` kept entries, ``B`` temperatures.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from kdcache.cache.layout import LOGIT_FLOOR
from kdcache.cache.rows import SparseRows

# How far past k the first look goes: half-precision logits tie at the border in most rows, and a
# tie that ends inside this margin is broken by id without sorting the whole row.
_TIE_MARGIN = 32


@dataclass(frozen=True)
class Selection:
    """What to keep: ``top_k`` keeps ``k`` entries; ``threshold`` those whose probability reaches ``floor``
    at any of the ``temperatures``, at most ``k``. The largest entry is always kept."""

    method: str
    k: int
    floor: float
    temperatures: tuple[float, ...]


def select(logits_NV: torch.Tensor, labels_N: torch.Tensor, selection: Selection) -> SparseRows:
    """Sparse rows of dense logits.

    Args:
        logits_NV: float32, only columns that stand for tokens.
        labels_N: int64, the token that follows each position.
        selection: what to keep.

    Returns:
        Rows on the CPU. Entries with probability zero are never kept. A row with NaN or +inf logits has
        a non-finite log-partition; the caller knows which sequence that is.
    """
    maximum_N1 = logits_NV.amax(dim=1, keepdim=True)
    relative_NV = logits_NV - maximum_N1
    partition_NB = torch.stack([torch.logsumexp(relative_NV / t, dim=1) for t in selection.temperatures], dim=1)
    label_N = relative_NV.gather(1, labels_N[:, None]).squeeze(1) - torch.logsumexp(relative_NV, dim=1)
    values_NK, ids_NK = top_k(relative_NV, min(selection.k, logits_NV.shape[1]))
    keep_NK = torch.isfinite(values_NK)
    if selection.method == "threshold":
        reach_NK = torch.zeros_like(keep_NK)
        for column, t in enumerate(selection.temperatures):
            log_prob_NK = values_NK / t - partition_NB[:, column : column + 1]
            reach_NK |= log_prob_NK >= float(np.log(selection.floor))
        keep_NK &= reach_NK
    keep_NK[:, 0] = True
    values = values_NK[keep_NK].clamp(min=LOGIT_FLOOR).to(torch.float16)
    return SparseRows(
        head=keep_NK.sum(dim=1).cpu().numpy(),
        tail=np.zeros(len(labels_N), dtype=np.int64),
        ids=ids_NK[keep_NK].cpu().numpy().astype(np.uint32),
        logits=values.cpu().numpy(),
        log_partition=partition_NB.to(torch.float32).cpu().numpy(),
        label_log_prob=label_N.to(torch.float32).cpu().numpy(),
        temperatures=selection.temperatures,
        vocab_size=logits_NV.shape[1],
    )


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
