"""Cached sequences -> one batch of tensors, padded or packed.

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
from kdcache.cache.mixture import MixedRows
from kdcache.cache.rows import RowDesign, SparseRows, concatenate
from kdcache.student.loss import SparseTeacher
from kdcache.student.mixed_teacher import mixed_teacher

IGNORED = -100
Tail = Literal["auto", "lumped", "renormalised"]


@dataclass(frozen=True)
class Collator:
    """Makes batches at one temperature.

    Args:
        pad_id: token that fills what is left of a row; nothing is learnt from it, and nothing sees it.
        temperature: the T at which the teacher's log-probabilities are wanted, unless a call says otherwise.
        tail: the mass outside the exact entries. ``auto``: drawn entries where the rows have them, up to the largest declared temperature, otherwise one bucket;
            ``lumped``: one bucket with its exact mass; ``renormalised``: ignored.
        max_length: longer sequences are cut at the end, as if the cache had been made at this length. One that is left
            without a target stays in the batch and counts for nothing. (Entries drawn at random are other draws than that
            cache would hold, as good as those; a share of positions was chosen from the whole sequence.)
        packed: lay the sequences into as few rows as possible, instead of one row each. Rows are at most ``max_length``
            long, or as long as the longest sequence; see `kdcache.student.packing` for what keeps them apart.
    """

    pad_id: int
    temperature: float
    tail: Tail = "auto"
    max_length: int | None = None
    packed: bool = False

    def __call__(
        self, sequences: Sequence[tuple[int, CachedSequence]], temperature: float | None = None
    ) -> dict[str, torch.Tensor]:
        """Batch of ``(index, sequence)`` pairs. A negative index stands for a forward pass from which nothing is learnt.

        Args:
            sequences: at least one pair.
            temperature: T of this batch; the collator's when None.

        Returns:
            ``input_ids``, ``labels`` (int64 ``[R, L]``, -100 where nothing is learnt), ``attention_mask`` or, packed,
            ``position_ids`` (int64 ``[R, L]``), which start again at every sequence and at what fills the row;
            ``teacher_ids`` (int64 ``[P, K]``), ``teacher_log_probs`` (float32 ``[P, K]``), ``teacher_log_tail``
            (float32 ``[P]``), ``teacher_log_weights`` (float32 ``[P, K]``, where entries are drawn); and ``sequence_index``
            and ``sequence_targets``, the number of its targets (int64 ``[B]``, in the order of the rows ``P``).
        """
        temperature = float(self.temperature if temperature is None else temperature)
        parts = [_unlearnt(s) if index < 0 else s.cut(self.max_length) for index, s in sequences]
        lengths = [len(s.token_ids) for s in parts]
        rows = [[i] for i in range(len(parts))]
        if self.packed:
            rows = pack(lengths, self.max_length or max(lengths))
        shape = (len(rows), max(sum(lengths[i] for i in row) for row in rows))
        ids = np.full(shape, self.pad_id, dtype=np.int64)
        labels = np.full(shape, IGNORED, dtype=np.int64)
        mask, positions = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        for place, row in enumerate(rows):
            start = 0
            for i in row:
                span = slice(start, start + lengths[i])
                ids[place, span] = parts[i].token_ids
                labels[place, span][parts[i].targets] = parts[i].token_ids[parts[i].targets]
                positions[place, span] = np.arange(lengths[i])
                start = span.stop
            mask[place, :start] = 1
            positions[place, start:] = np.arange(shape[1] - start)
        order = [i for row in rows for i in row]
        teacher = sparse_teacher(_end_to_end([parts[i].rows for i in order]), temperature, self.tail)
        drawn = {} if teacher.log_weights_NK is None else {"teacher_log_weights": teacher.log_weights_NK}
        apart = {"position_ids": positions} if self.packed else {"attention_mask": mask}
        return {
            "input_ids": torch.from_numpy(ids),
            "labels": torch.from_numpy(labels),
            **{name: torch.from_numpy(array) for name, array in apart.items()},
            "teacher_ids": teacher.ids_NK,
            "teacher_log_probs": teacher.log_probs_NK,
            "teacher_log_tail": teacher.log_tail_N,
            **drawn,
            "sequence_index": torch.tensor([sequences[i][0] for i in order]),
            "sequence_targets": torch.tensor([len(parts[i].rows) for i in order]),
        }


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Numbers of the lengths in few rows of at most ``capacity``, and in that many rows short ones.

    Few by first-fit decreasing: each, longest first, goes where there is room first. That takes at most 11/9 of the fewest
    rows possible, and one more (Johnson 1973). Short by giving each, longest first, to the shortest of that many rows, where
    that is the shorter of the two. What is longer than a row has one to itself.
    """
    longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    filled: list[int] = []
    tight: list[list[int]] = []
    for i in longest_first:
        row = next((r for r, total in enumerate(filled) if total + lengths[i] <= capacity), len(tight))
        if row == len(tight):
            tight.append([])
            filled.append(0)
        tight[row].append(i)
        filled[row] += lengths[i]
    levelled = [0] * len(tight)
    level: list[list[int]] = [[] for _ in tight]
    for i in longest_first:
        row = levelled.index(min(levelled))
        level[row].append(i)
        levelled[row] += lengths[i]
    return level if max(levelled) < max(filled) else tight


def _unlearnt(sequence: CachedSequence) -> CachedSequence:
    """As little of a sequence as makes a forward pass, without targets."""
    ids = sequence.token_ids[:2]
    return CachedSequence(ids, np.zeros(len(ids), dtype=np.bool_), sequence.rows.slice(0, 0))


def _end_to_end(several: Sequence[SparseRows | MixedRows]) -> SparseRows | MixedRows:
    """Rows of all sequences, which are of one cache or of one mixture."""
    mixed = [rows for rows in several if isinstance(rows, MixedRows)]
    if mixed:
        return MixedRows.concatenated(mixed)
    return concatenate([rows for rows in several if isinstance(rows, SparseRows)])


def sparse_teacher(rows: SparseRows | MixedRows, temperature: float, tail: Tail = "auto") -> SparseTeacher:
    """Teacher distributions at ``temperature`` as the loss takes them; short rows are filled up, empty ones stay empty.

    Of a mixture of caches it is the mean of their teachers': `kdcache.student.mixed_teacher`.

    Raises:
        CacheError: the temperature is below every declared one.
    """
    sampled = tail == "auto" and uses_draws(rows.design, temperature)
    if isinstance(rows, MixedRows):
        rests = None if sampled else [_log_outside(r, temperature, r.log_partition_at(temperature)) for r in rows.parts]
        return mixed_teacher(rows, temperature, rests, renormalised=tail == "renormalised")
    log_z = rows.log_partition_at(temperature)
    drawn = rows.tail if sampled else np.zeros_like(rows.tail)
    width = max(1, int((rows.head + drawn).max())) if len(rows) else 1
    # Where entries go in the padded arrays, row after row: a row's head first, what was drawn behind it.
    first = np.arange(len(rows)) * width
    in_head = np.repeat(first - np.cumsum(rows.head) + rows.head, rows.head) + np.arange(len(rows.head_ids))
    beta, shift = np.float32(1.0 / temperature), log_z.astype(np.float32)
    ids = np.zeros((len(rows), width), dtype=np.int64)
    log_probs = np.full((len(rows), width), -np.inf, dtype=np.float32)
    ids.reshape(-1)[in_head] = rows.head_ids
    log_probs.reshape(-1)[in_head] = rows.head_logits * beta - np.repeat(shift, rows.head)
    log_tail, weights = np.full(len(rows), -np.inf, dtype=np.float32), None
    if sampled:
        behind = first + rows.head
        in_tail = np.repeat(behind - np.cumsum(rows.tail) + rows.tail, rows.tail) + np.arange(len(rows.tail_ids))
        ids.reshape(-1)[in_tail] = rows.tail_ids
        log_probs.reshape(-1)[in_tail] = rows.tail_logits * beta - np.repeat(shift, rows.tail)
        weights = np.full((len(rows), width), -np.inf, dtype=np.float32)
        weights.reshape(-1)[in_head], weights.reshape(-1)[in_tail] = rows.log_weights_at(temperature, log_z)
    else:
        log_tail = _log_outside(rows, temperature, log_z).astype(np.float32)
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
    """float64 ``[P]``: log of the mass outside the head; ``-inf`` where nothing is there, or the row is empty."""
    if temperature in rows.design.temperatures:
        rest = rows.rest[:, rows.design.temperatures.index(temperature)].astype(np.float64)
        log_rest = -np.logaddexp(0.0, -rest)
    else:
        inside = rows.head_log_sum(temperature) - log_z
        # Interpolation may leave nothing outside.
        log_rest = np.log(np.maximum(-np.expm1(inside), np.finfo(np.float32).tiny))
    return np.where(rows.kept & (rows.head < rows.design.vocab_size), log_rest, -np.inf)
