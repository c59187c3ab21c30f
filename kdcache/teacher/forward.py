"""Token rows -> logits of the positions that count.

The decoder runs on right-padded batches of similar length; the head runs only on hidden states whose
successor is a target, in chunks that bound the ``[chunk, V]`` float32 logits. A batch's composition
depends on the shard alone, so a shard comes out the same whoever makes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from kdcache.cache.rows import SparseRows, concatenate
from kdcache.data.tokens import TokenRow
from kdcache.errors import ModelError
from kdcache.head import Head
from kdcache.models import head_of
from kdcache.teacher.select import Selected

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOGIT_BYTES = 256 << 20

Uniforms = NDArray[np.float64]
Select = Callable[[torch.Tensor, torch.Tensor, Uniforms | None], Selected]
Thin = Callable[[SparseRows, NDArray[np.float32]], SparseRows]
# Hidden states [P, D] of the targets of some rows, where they were kept; None where one of the rows is not known.
States = Callable[[Sequence[TokenRow]], torch.Tensor | None]


def length_buckets(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Indices grouped by length so that rows times longest row stays within ``batch_tokens``."""
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if batches and (len(batches[-1]) + 1) * lengths[index] <= batch_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


class TeacherForward:
    """A teacher ready to give sparse rows.

    Args:
        model: causal language model in evaluation mode.
        vocab_size: columns of the head that stand for tokens; padding beyond is left out of the softmax.
        pad_id: token that fills short rows; its positions are masked.
        states: hidden states that are there already; for other rows the decoder runs.
    """

    def __init__(self, model: PreTrainedModel, *, vocab_size: int, pad_id: int, states: States | None = None) -> None:
        self.decoder = model.get_decoder()
        self.device = model.device
        weight, bias = head_of(model)
        self.head = Head(weight[:vocab_size], None if bias is None else bias[:vocab_size])
        self.pad_id = pad_id
        self.states = states

    @torch.inference_mode()
    def __call__(
        self,
        rows: Sequence[TokenRow],
        select: Select,
        *,
        batch_tokens: int,
        uniforms: Callable[[TokenRow], Uniforms] | None = None,
        thin: Thin | None = None,
        on_batch: Callable[[int], None] = lambda positions: None,
    ) -> SparseRows:
        """Sparse rows of every target of ``rows``, in the order of ``rows``.

        Args:
            rows: token rows.
            select: dense logits, labels and uniform numbers -> sparse rows.
            batch_tokens: bound on padded tokens in one forward pass.
            uniforms: the numbers in [0, 1) that a token row's draws take, one row of them per target; None for no draws.
            thin: one sequence's rows and the teacher's entropies -> the same rows, some left empty.
            on_batch: called with the positions done after each batch.

        Raises:
            ModelError: out of memory (the batch is named), or logits that are not finite (the sequence is).
        """
        parts: dict[int, SparseRows] = {}
        for batch in length_buckets([len(r.ids) for r in rows], batch_tokens):
            members = [rows[i] for i in batch]
            done = self.rows_of(members, *self.hidden(members), select, uniforms=uniforms, thin=thin)
            parts |= dict(zip(batch, done, strict=True))
            on_batch(sum(map(len, done)))
        return concatenate([parts[i] for i in range(len(rows))])

    @torch.inference_mode()
    def rows_of(
        self,
        members: Sequence[TokenRow],
        hidden_PD: torch.Tensor,
        labels_P: torch.Tensor,
        select: Select,
        *,
        uniforms: Callable[[TokenRow], Uniforms] | None = None,
        thin: Thin | None = None,
    ) -> list[SparseRows]:
        """Sparse rows of each of the token rows whose hidden states and labels these are.

        Raises:
            ModelError: logits that are not finite; the sequence is named.
        """
        drawn = None if uniforms is None else np.concatenate([uniforms(m) for m in members])
        # Chunks bound the logits; they depend on the batch alone.
        chunk = max(1, LOGIT_BYTES // (4 * self.head.width))
        selected = []
        with _memory_enough_for(members):
            for start in range(0, max(1, len(labels_P)), chunk):
                span = slice(start, start + chunk)
                logits = self.head.logits(hidden_PD[span])
                selected.append(select(logits, labels_P[span], None if drawn is None else drawn[span]))
        done, entropy = concatenate([s.rows for s in selected]), np.concatenate([s.entropy for s in selected])
        parts, start = [], 0
        for member in members:
            span = slice(start, start + member.positions)
            start = span.stop
            part = done.slice(span.start, span.stop)
            self._refuse_non_finite(member, part)
            parts.append(part if thin is None else thin(part, entropy[span]))
        return parts

    @torch.inference_mode()
    def hidden(self, rows: Sequence[TokenRow]) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states ``[P, D]`` whose successor is a target, and those successors ``[P]`` (int64).

        Raises:
            ModelError: out of memory; the batch is named.
        """
        kept = None if self.states is None else self.states(rows)
        if kept is not None:
            labels = np.concatenate([row.ids[row.targets] for row in rows]).astype(np.int64)
            return kept.to(self.device), torch.from_numpy(labels).to(self.device)
        longest = max(len(r.ids) for r in rows)
        ids_BL = np.full((len(rows), longest), self.pad_id, dtype=np.int64)
        targets_BL = np.zeros((len(rows), longest), dtype=bool)
        mask_BL = np.zeros((len(rows), longest), dtype=np.int64)
        for i, row in enumerate(rows):
            ids_BL[i, : len(row.ids)] = row.ids
            targets_BL[i, : len(row.ids)] = row.targets
            mask_BL[i, : len(row.ids)] = 1
        with _memory_enough_for(rows):
            ids = torch.from_numpy(ids_BL).to(self.device)
            mask = torch.from_numpy(mask_BL).to(self.device)
            output = self.decoder(input_ids=ids, attention_mask=mask, use_cache=False)
            targets = torch.from_numpy(targets_BL).to(self.device)[:, 1:]
            return output.last_hidden_state[:, :-1][targets], ids[:, 1:][targets]

    @staticmethod
    def _refuse_non_finite(row: TokenRow, rows: SparseRows) -> None:
        finite = np.isfinite(rows.rest).all(axis=1) & np.isfinite(rows.label_log_prob)
        if not finite.all():
            position = int(np.flatnonzero(row.targets)[int(np.argmin(finite))]) - 1
            raise ModelError(
                f"the teacher gives no finite distribution for example {row.index} at token {position}; "
                "float16 overflows on some models: try teacher.dtype bfloat16 or float32"
            )


@contextmanager
def _memory_enough_for(members: Sequence[TokenRow]) -> Iterator[None]:
    """Name the batch that was too large."""
    try:
        yield
    except torch.OutOfMemoryError as exc:
        longest = max(len(r.ids) for r in members)
        raise ModelError(
            f"the teacher ran out of memory on a batch of {len(members)} sequences of at most {longest} tokens "
            f"(first: example {members[0].index}); lower teacher.batch_tokens"
        ) from exc
