"""Cached sequences -> one padded batch of tensors.

Positions follow one rule: row ``i`` of the teacher predicts token ``i + 1``. The batch keeps the rows of
all sequences end to end, in the order in which ``labels[:, 1:] != -100`` meets them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from kdcache.cache.codec import CachedSequence
from kdcache.cache.rows import RowDesign, SparseRows, concatenate
from kdcache.student.loss import SparseTeacher

IGNORED = -100
Tail = Literal["auto", "lumped", "renormalised"]


@dataclass(frozen=True)
class Collator:
    """Makes batches at one temperature.

    Args:
        pad_id: token that fills short sequences; masked.
        temperature: the T at which the teacher's log-probabilities are wanted.
        tail: the mass outside the exact entries. ``auto``: drawn entries where the rows have them, up to the largest declared temperature, otherwise one bucket;
            ``lumped``: one bucket with its exact mass; ``renormalised``: ignored.
    """

    pad_id: int
    temperature: float
    tail: Tail = "auto"

    def __call__(self, sequences: Sequence[tuple[int, CachedSequence]]) -> dict[str, torch.Tensor]:
        """Batch of ``(index, sequence)`` pairs.

        Returns:
            ``input_ids``, ``attention_mask``, ``labels`` (int64 ``[B, L]``, -100 where nothing is learnt),
            ``teacher_ids`` (int64 ``[P, K]``), ``teacher_log_probs`` (float32 ``[P, K]``),
            ``teacher_log_tail`` (float32 ``[P]``), ``teacher_log_weights`` (float32 ``[P, K]``, where entries are drawn)
            and ``sequence_index`` (int64 ``[B]``).
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
        teacher = sparse_teacher(concatenate([s.rows for _, s in sequences]), self.temperature, self.tail)
        drawn = {} if teacher.log_weights_NK is None else {"teacher_log_weights": teacher.log_weights_NK}
        return {
            "input_ids": torch.from_numpy(ids),
            "attention_mask": torch.from_numpy(mask),
            "labels": torch.from_numpy(labels),
            "teacher_ids": teacher.ids_NK,
            "teacher_log_probs": teacher.log_probs_NK,
            "teacher_log_tail": teacher.log_tail_N,
            **drawn,
            "sequence_index": torch.tensor([i for i, _ in sequences]),
        }


def sparse_teacher(rows: SparseRows, temperature: float, tail: Tail = "auto") -> SparseTeacher:
    """Teacher distributions at ``temperature`` as the loss takes them; short rows are filled up, empty ones stay empty.

    Raises:
        CacheError: the temperature is below every declared one.
    """
    design = rows.design
    sampled = tail == "auto" and uses_draws(design, temperature)
    log_z = rows.log_partition_at(temperature)
    drawn = rows.tail if sampled else np.zeros_like(rows.tail)
    width = max(1, int((rows.head + drawn).max())) if len(rows) else 1
    column = np.arange(width)
    in_head = column < rows.head[:, None]
    in_tail = (column < (rows.head + drawn)[:, None]) & ~in_head
    beta, shift = np.float32(1.0 / temperature), log_z.astype(np.float32)
    ids = np.zeros(in_head.shape, dtype=np.int64)
    log_probs = np.full(in_head.shape, -np.inf, dtype=np.float32)
    ids[in_head] = rows.head_ids
    log_probs[in_head] = rows.head_logits * beta - np.repeat(shift, rows.head)
    log_tail = np.full(len(rows), -np.inf, dtype=np.float32)
    weights = None
    if sampled:
        ids[in_tail] = rows.tail_ids
        log_probs[in_tail] = rows.tail_logits * beta - np.repeat(shift, rows.tail)
        weights = np.full(in_head.shape, -np.inf, dtype=np.float32)
        weights[in_head], weights[in_tail] = rows.log_weights_at(temperature, log_z)
    else:
        outside = rows.kept & (rows.head < design.vocab_size)
        log_tail[outside] = _log_outside(rows, temperature, log_z)[outside]
    teacher = SparseTeacher(
        ids_NK=torch.from_numpy(ids),
        log_probs_NK=torch.from_numpy(log_probs),
        log_tail_N=torch.from_numpy(log_tail),
        log_weights_NK=None if weights is None else torch.from_numpy(weights),
    )
    return teacher.renormalised() if tail == "renormalised" else teacher


def uses_draws(design: RowDesign, temperature: float) -> bool:
    """Whether drawn entries stand for the rest at this temperature.

    Above the declared temperatures they do not: entries that were hardly ever drawn would weigh too much there.
    """
    return design.sampled and temperature <= max(design.temperatures)


def _log_outside(rows: SparseRows, temperature: float, log_z: NDArray[np.float64]) -> NDArray[np.float64]:
    """float64 ``[P]``: log of the mass outside the head."""
    if temperature in rows.design.temperatures:
        rest = rows.rest[:, rows.design.temperatures.index(temperature)].astype(np.float64)
        return -np.logaddexp(0.0, -rest)
    inside = rows.head_log_sum(temperature) - log_z
    # Interpolation may leave nothing outside.
    return np.log(np.maximum(-np.expm1(inside), np.finfo(np.float32).tiny))
