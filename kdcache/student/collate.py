"""Cached sequences -> one padded batch of tensors.

Positions follow one rule: row ``i`` of the teacher predicts token ``i + 1``. The batch keeps the rows of
all sequences end to end, in the order in which ``labels[:, 1:] != -100`` meets them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kdcache.cache.codec import CachedSequence
from kdcache.cache.layout import HALF_ROUNDING
from kdcache.cache.rows import SparseRows, concatenate
from kdcache.student.loss import SparseTeacher

IGNORED = -100
_SINGLE_ROUNDING = 2.0**-23


@dataclass(frozen=True)
class Collator:
    """Makes batches at one temperature.

    Args:
        pad_id: token that fills short sequences; masked.
        temperature: the T at which the teacher's log-probabilities are wanted.
    """

    pad_id: int
    temperature: float

    def __call__(self, sequences: Sequence[tuple[int, CachedSequence]]) -> dict[str, torch.Tensor]:
        """Batch of ``(index, sequence)`` pairs.

        Returns:
            ``input_ids``, ``attention_mask``, ``labels`` (int64 ``[B, L]``, -100 where nothing is learnt),
            ``teacher_ids`` (int64 ``[P, K]``), ``teacher_log_probs`` (float32 ``[P, K]``),
            ``teacher_log_tail`` (float32 ``[P]``) and ``sequence_index`` (int64 ``[B]``).
        """
        longest = max(len(s.token_ids) for _, s in sequences)
        shape = (len(sequences), longest)
        ids = np.full(shape, self.pad_id, dtype=np.int64)
        mask = np.zeros(shape, dtype=np.int64)
        labels = np.full(shape, IGNORED, dtype=np.int64)
        for i, (_, s) in enumerate(sequences):
            length = len(s.token_ids)
            ids[i, :length] = s.token_ids
            mask[i, :length] = 1
            labels[i, :length][s.targets] = s.token_ids[s.targets]
        teacher = sparse_teacher(concatenate([s.rows for _, s in sequences]), self.temperature)
        return {
            "input_ids": torch.from_numpy(ids),
            "attention_mask": torch.from_numpy(mask),
            "labels": torch.from_numpy(labels),
            "teacher_ids": teacher.ids_NK,
            "teacher_log_probs": teacher.log_probs_NK,
            "teacher_log_tail": teacher.log_tail_N,
            "sequence_index": torch.tensor([i for i, _ in sequences]),
        }


def sparse_teacher(rows: SparseRows, temperature: float) -> SparseTeacher:
    """Teacher distributions at ``temperature`` as the loss takes them; short rows are filled up.

    Raises:
        CacheError: the temperature is below every declared one.
    """
    counts, starts = rows.head + rows.tail, rows.offsets[:-1]
    width = int(counts.max())
    column = np.arange(width)
    inside = column < counts[:, None]
    entry = starts[:, None] + np.where(inside, column, 0)
    log_z = rows.log_partition_at(temperature)
    log_probs = rows.logits.astype(np.float64)[entry] / temperature - log_z[:, None]
    log_probs[~inside] = -np.inf
    logits = rows.logits.astype(np.float64)[entry]
    p = np.exp(log_probs)
    # The kept logits are rounded: a tail below that rounding is no more than it, and never nothing.
    rounding = HALF_ROUNDING * (p * -logits).sum(axis=1) / temperature + _SINGLE_ROUNDING
    log_tail = np.log(np.maximum(1.0 - p.sum(axis=1), rounding))
    log_tail[rows.head >= rows.vocab_size] = -np.inf
    return SparseTeacher(
        ids_NK=torch.from_numpy(rows.ids.astype(np.int64)[entry]),
        log_probs_NK=torch.from_numpy(log_probs.astype(np.float32)),
        log_tail_N=torch.from_numpy(log_tail.astype(np.float32)),
    )
