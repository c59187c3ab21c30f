"""The largest entries of rows, the same ones on any machine.

Axes: ``N`` rows, ``V`` vocabulary, ``K`` entries of a row.
"""

from __future__ import annotations

import torch

# How far past k the first look goes: half-precision logits tie at the border in most rows, and a
# tie that ends inside this margin is broken by id without sorting the whole row.
_TIE_MARGIN = 32


def top_k(values_NV: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``k`` largest of each row, largest first, equal values by lowest id: the same on any machine.

    float32 ``[N, V]`` -> values and int64 ids, ``[N, K]``. ``torch.topk`` breaks ties as it likes. A few more than ``k`` are taken and sorted stably; only rows
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


def largest(logits_NV: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and ids (int64 ``[K of all rows]``, largest first in a row) of the k largest entries whose probability is not 0; the
    first in any case."""
    values_NK, ids_NK = top_k(logits_NV, min(k, logits_NV.shape[1]))
    there_NK = values_NK > -torch.inf
    there_NK[:, :1] = True
    return there_NK.nonzero(as_tuple=True)[0], ids_NK[there_NK]
