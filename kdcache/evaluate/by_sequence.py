"""What a score hides: how far it is sure, and how often student and teacher would say the same token.

Tokens of one text are alike, so standard errors are those of a ratio of sums over sequences, which are the clusters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from kdcache.cache.reader import Split
from kdcache.evaluate.head_inputs import HeadInputs
from kdcache.head import Head
from kdcache.models import head_of
from kdcache.paired import ratio_error
from kdcache.student.loss import CHUNK_BYTES, LossSums

_FIELDS = ("tokens", "ce", "kl", "agreed", "compared")


class SequenceSums:
    """Sums over each sequence of a split, gathered as `score_in_batches` scores it.

    Top-1: the student's most probable token is the one that the cache holds as the teacher's largest entry (which every
    row with entries keeps exactly). Rows that were left empty are not compared; nor, of a mixture, rows in which an entry
    that not all caches hold could be larger.

    Args:
        model: the student that is scored.
        vocab_size: columns of its head that stand for tokens.
        mixed: whether the teacher is a mixture.
    """

    def __init__(self, model: Any, vocab_size: int, *, mixed: bool = False) -> None:
        self._model = model
        self._mixed = mixed
        self._width = vocab_size
        self._inputs = HeadInputs(model)
        # By sequence: a pass that ran out of memory is repeated from the start.
        self._sums: dict[int, tuple[float, ...]] = {}

    @contextmanager
    def listening(self) -> Iterator[SequenceSums]:
        """While this lasts, the hidden states of each forward pass are held until they have been looked at."""
        with self._inputs.listening():
            yield self

    def __call__(self, batch: Mapping[str, torch.Tensor], sums: LossSums) -> None:
        """Take in a batch of `Collator` and its sums."""
        hidden_ND = self._inputs.take(batch["labels"])
        largest_N = batch["teacher_log_probs"].amax(dim=1)
        kept_N = largest_N > -torch.inf
        if self._mixed:
            kept_N &= largest_N >= batch["teacher_log_tail"]
        best_N = batch["teacher_ids"].gather(1, batch["teacher_log_probs"].argmax(dim=1, keepdim=True)).squeeze(1)
        agreed_N = (self._best(hidden_ND) == best_N) & kept_N
        columns = torch.stack([v.double().cpu() for v in (sums.ce_N, sums.divergence_N, agreed_N, kept_N)], dim=1)
        sizes = batch["sequence_targets"].tolist()
        for index, part in zip(batch["sequence_index"].tolist(), columns.split(sizes), strict=True):
            self._sums[index] = (float(len(part)), *part.sum(dim=0).tolist())

    def losses(self) -> dict[int, tuple[float, float]]:
        """Tokens and summed loss in nats by sequence."""
        return {index: (found[0], found[1]) for index, found in self._sums.items()}

    def _best(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        weight_VD, bias_V = head_of(self._model)
        rows = max(1, CHUNK_BYTES // (4 * self._width))
        with torch.autocast(hidden_ND.device.type, enabled=False):
            head = Head(weight_VD[: self._width], None if bias_V is None else bias_V[: self._width])
            return torch.cat([head.logits(chunk).argmax(dim=1) for chunk in hidden_ND.split(rows)])

    def as_record(self) -> dict[str, float | None]:
        """``stderr`` of the loss and ``kl_stderr`` in nats per token, ``top_1_agreement`` and ``top_1_stderr`` as shares.

        None where it cannot be said: an error of one sequence, an agreement without rows to compare.
        """
        table = dict(zip(_FIELDS, np.array([self._sums[i] for i in sorted(self._sums)]).T, strict=True))
        compared = table["compared"].sum()
        return {
            "stderr": ratio_error(table["ce"], table["tokens"]),
            "kl_stderr": ratio_error(table["kl"], table["tokens"]),
            "top_1_agreement": float(table["agreed"].sum() / compared) if compared else None,
            "top_1_stderr": ratio_error(table["agreed"], table["compared"]),
        }


def teacher_errors(split: Split, max_length: int | None) -> dict[str, float | None]:
    """The same fields for the teacher, which agrees with itself."""
    tokens, loss = np.array(list(teacher_losses(split, max_length).values())).T
    return {"stderr": ratio_error(loss, tokens), "kl_stderr": 0.0, "top_1_agreement": 1.0, "top_1_stderr": 0.0}


def teacher_losses(split: Split, max_length: int | None) -> dict[int, tuple[float, float]]:
    """The teacher's tokens and summed loss in nats by sequence, from the cache."""
    cut = ((i, sequence.cut(max_length).rows) for i, sequence in enumerate(split))
    return {i: (float(len(rows)), -float(rows.label_log_prob.sum(dtype=np.float64))) for i, rows in cut if len(rows)}
