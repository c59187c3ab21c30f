"""A sample of a plan's own sequences: what is measured on it is what the whole run will show."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from kdcache.cache.codec import ShardContent
from kdcache.cache.rows import SparseRows, concatenate
from kdcache.data.tokens import TokenRow
from kdcache.teacher.forward import Select, TeacherForward, Thin, Uniforms, length_buckets

if TYPE_CHECKING:
    from kdcache.teacher.planning import PlannedCache


def sample_rows(planned: PlannedCache, *, batch_tokens: int, positions: int) -> list[TokenRow]:
    """Whole batches as a run forms them, evenly spread over the lengths, with about so many positions.

    Batches of few or short sequences run at another rate, and short responses are surer than long ones.
    """
    rows = [row for split in planned.rows for row in split]
    total = sum(r.positions for r in rows)
    batches = length_buckets([len(r.ids) for r in rows], batch_tokens)
    share = min(1.0, positions / total)
    # The middle batch of each of so many equal parts of the list.
    count = max(1, round(share * len(batches)))
    chosen = [batches[int((i + 0.5) * len(batches) / count)] for i in range(count)]
    return [rows[i] for batch in chosen for i in batch]


@dataclass(frozen=True)
class HiddenSample:
    """Hidden states of sampled sequences: the head can be applied again and again without the decoder.

    Attributes:
        rows: token rows, batch after batch.
        hidden: per batch its token rows, hidden states ``[P, D]`` and labels ``[P]``.
        teacher: whose states they are.
    """

    rows: list[TokenRow]
    hidden: list[tuple[list[TokenRow], torch.Tensor, torch.Tensor]]
    teacher: TeacherForward

    def __len__(self) -> int:
        return sum(r.positions for r in self.rows)

    def select(
        self, select: Select, *, uniforms: Callable[[TokenRow], Uniforms] | None = None, thin: Thin | None = None
    ) -> SparseRows:
        """Sparse rows of every target, in the order of ``rows``."""
        parts = []
        for members, hidden, labels in self.hidden:
            parts += self.teacher.rows_of(members, hidden, labels, select, uniforms=uniforms, thin=thin)
        return concatenate(parts)


def hidden_sample(teacher: TeacherForward, rows: Sequence[TokenRow], *, batch_tokens: int) -> HiddenSample:
    """Run the decoder once over ``rows``."""
    hidden = []
    for batch in length_buckets([len(r.ids) for r in rows], batch_tokens):
        members = [rows[i] for i in batch]
        hidden.append((members, *teacher.hidden(members)))
    return HiddenSample([m for members, _, _ in hidden for m in members], hidden, teacher)


def shard_content(rows: list[TokenRow], sparse: SparseRows) -> ShardContent:
    """Token rows and their sparse rows, laid end to end."""
    return ShardContent(
        lengths=np.array([len(r.ids) for r in rows], dtype=np.int64),
        token_ids=np.concatenate([r.ids for r in rows]),
        targets=np.concatenate([r.targets for r in rows]),
        rows=sparse,
    )
