"""``SparseRows``: the sparse picture of a teacher's next-token distributions, and its invariants.

Row ``p`` belongs to one *position*: a token whose successor is a training target. Its **head** are entries kept
exactly; its **tail** are entries drawn at random from the rest of the vocabulary, each standing for many. With ``y`` the
teacher's logits and ``m = max(y)``::

    logits[e]  = y[ids[e]] - m                                                       (<= 0)
    rest[p, b] = log(mass outside the head / mass of the head) at temperature T_b    (log-odds)

so that the head's probabilities and the rest add up to 1 at every declared temperature, however coarsely the logits are
stored. With ``L = log sum_head exp(logits / T)`` the log-partition is ``L + log(1 + exp(rest))``, and
``log p_T(v) = logits / T - log_partition(T)``.

**Draws** (`RowDesign`): with ``floors`` an entry is in the head where its probability reaches the floor tau_b at any
declared T_b (or is the row's largest), and otherwise drawn with probability ``pi = max_b p_b / tau_b``; at T it then stands for ``p_T / pi``, which
is tau where one temperature is declared (threshold sampling; Horvitz & Thompson 1952). With ``draws`` it stands for its
share of that many draws with replacement (random sampling, Anshumann et al., ACL 2025).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from kdcache.errors import CacheError

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class RowDesign:
    """What all rows of a cache share.

    Attributes:
        temperatures: declared temperatures, ascending.
        vocab_size: number of vocabulary columns the distributions range over.
        floors: probability floor per declared temperature where a tail is drawn by threshold sampling; else empty.
        draws: draws per row where the row is drawn with replacement at the only declared temperature; else 0.
        tail_logits: whether each drawn entry carries its own logit; if not, a row's share their mean.
        some_empty: whether rows may be left empty (positions that were not selected).
        k: entries of a row at most, where neither floors nor draws bound them.
    """

    temperatures: tuple[float, ...]
    vocab_size: int
    floors: tuple[float, ...] = ()
    draws: int = 0
    tail_logits: bool = True
    some_empty: bool = False
    k: int = (1 << 16) - 1

    @property
    def entry_limit(self) -> int:
        """Entries that a row can hold at most."""
        if self.floors:
            # At most 1 / tau entries reach tau, and a tail of that much mass is drawn at most once per tau, and once more.
            return min(2 * sum(math.ceil(1.0 / tau) + 1 for tau in self.floors), 2 * self.vocab_size)
        return min(self.draws + 1 if self.draws else self.k, self.vocab_size)

    @property
    def sampled(self) -> bool:
        """Whether rows hold drawn entries."""
        return bool(self.floors) or self.draws > 0


@dataclass(frozen=True)
class SparseRows:
    """Ragged rows of kept vocabulary entries; ids rise within a row's head and within its tail.

    Attributes:
        head: int64 ``[P]``, exactly kept entries per row; 0 for a row that is left empty.
        tail: int64 ``[P]``, drawn entries per row.
        head_ids: uint32 ``[H]``, vocabulary ids, row after row.
        head_logits: float32 ``[H]``, logit minus the row's maximum.
        tail_ids: uint32 ``[M]``.
        tail_logits: float32 ``[M]``.
        rest: float32 ``[P, B]``, log-odds of the mass outside the head, one column per declared temperature.
        label_log_prob: float32 ``[P]``, natural logarithm, temperature 1.
        design: what all rows share.
        head_counts: uint8 ``[H]``, how often each entry was drawn; None unless ``design.draws``.
        tail_counts: uint8 ``[M]``.
    """

    head: NDArray[np.int64]
    tail: NDArray[np.int64]
    head_ids: NDArray[np.uint32]
    head_logits: NDArray[np.float32]
    tail_ids: NDArray[np.uint32]
    tail_logits: NDArray[np.float32]
    rest: NDArray[np.float32]
    label_log_prob: NDArray[np.float32]
    design: RowDesign
    head_counts: NDArray[np.uint8] | None = None
    tail_counts: NDArray[np.uint8] | None = None

    def __len__(self) -> int:
        return len(self.head)

    @property
    def entries(self) -> int:
        """Entries of all rows."""
        return len(self.head_ids) + len(self.tail_ids)

    @cached_property
    def head_offsets(self) -> NDArray[np.int64]:
        """int64 ``[P + 1]``: head entries of row ``p`` lie in ``head_offsets[p]:head_offsets[p + 1]``."""
        return np.concatenate(([0], np.cumsum(self.head)))

    @cached_property
    def tail_offsets(self) -> NDArray[np.int64]:
        """int64 ``[P + 1]``: drawn entries of row ``p`` lie in ``tail_offsets[p]:tail_offsets[p + 1]``."""
        return np.concatenate(([0], np.cumsum(self.tail)))

    @cached_property
    def kept(self) -> NDArray[np.bool_]:
        """bool ``[P]``: rows that are not left empty."""
        return self.head > 0

    def slice(self, start: int, stop: int) -> SparseRows:
        """Rows ``start:stop`` as a view (no entry is copied)."""
        head = slice(*self.head_offsets[[start, stop]].tolist())
        tail = slice(*self.tail_offsets[[start, stop]].tolist())
        return replace(
            self,
            head=self.head[start:stop],
            tail=self.tail[start:stop],
            head_ids=self.head_ids[head],
            head_logits=self.head_logits[head],
            tail_ids=self.tail_ids[tail],
            tail_logits=self.tail_logits[tail],
            rest=self.rest[start:stop],
            label_log_prob=self.label_log_prob[start:stop],
            head_counts=None if self.head_counts is None else self.head_counts[head],
            tail_counts=None if self.tail_counts is None else self.tail_counts[tail],
        )

    def emptied(self, keep: NDArray[np.bool_]) -> SparseRows:
        """The same rows with those where ``keep`` (bool ``[P]``) is false left empty; labels stay."""
        heads, tails = np.repeat(keep, self.head), np.repeat(keep, self.tail)
        return replace(
            self,
            head=np.where(keep, self.head, 0),
            tail=np.where(keep, self.tail, 0),
            head_ids=self.head_ids[heads],
            head_logits=self.head_logits[heads],
            tail_ids=self.tail_ids[tails],
            tail_logits=self.tail_logits[tails],
            rest=np.where(keep[:, None], self.rest, np.float32(0)),
            head_counts=None if self.head_counts is None else self.head_counts[heads],
            tail_counts=None if self.tail_counts is None else self.tail_counts[tails],
        )

    def kept_mass(self) -> Floats:
        """float64 ``[P, B]``: probability of the exactly kept entries at each declared temperature."""
        with np.errstate(over="ignore"):
            return self.kept[:, None] / (1.0 + np.exp(self.rest.astype(np.float64)))

    def head_log_sum(self, temperature: float) -> Floats:
        """float64 ``[P]``: log of the head's sum of ``exp(logits / T)``; 0 for an empty row."""
        sums = np.ones(len(self))
        if len(self.head_ids):
            terms = np.exp(self.head_logits * np.float32(1.0 / temperature))
            sums[self.kept] = np.add.reduceat(terms, self.head_offsets[:-1][self.kept], dtype=np.float64)
        return np.log(sums)

    def log_partition_at(self, temperature: float) -> Floats:
        """float64 ``[P]``: log-partition at any temperature not below the smallest declared one.

        Exact at a declared temperature. Elsewhere the head is summed exactly and only the log-sum of what lies outside
        is interpolated, as a polynomial in ``1 / T`` through the declared temperatures and the node that is known for
        free: at ``1 / T = 0`` every entry outside counts 1.

        Raises:
            CacheError: the temperature is below every declared one (extrapolation is off by nats).
        """
        declared = self.design.temperatures
        head = self.head_log_sum(temperature)
        if temperature in declared:
            return head + np.logaddexp(0.0, self.rest[:, declared.index(temperature)].astype(np.float64))
        if temperature < min(declared):
            raise CacheError(
                f"temperature {temperature:g} is below the cache's smallest declared temperature "
                f"{min(declared):g} and cannot be interpolated; train at {min(declared):g} "
                f"or above, or make a cache with selection.temperatures including {temperature:g}"
            )
        outside = self.design.vocab_size - self.head
        betas = [0.0] + [1.0 / t for t in declared]
        nodes = [np.log(np.maximum(outside, 1))]
        for column, t in enumerate(declared):
            nodes.append(np.minimum(self.rest[:, column] + self.head_log_sum(t), nodes[0]))
        beta = 1.0 / temperature
        log_tail = np.zeros(len(self))
        for i, node in enumerate(nodes):
            others = [b for j, b in enumerate(betas) if j != i]
            log_tail += node * np.prod([(beta - b) / (betas[i] - b) for b in others])
        # The tail's log-sum falls as 1 / T rises: it lies between its neighbours, whatever the polynomial says.
        above = min((b for b in betas if b >= beta), default=betas[1])
        below = max(b for b in betas if b <= beta)
        bounds = nodes[betas.index(above)], nodes[betas.index(below)]
        log_tail = np.clip(log_tail, np.minimum(*bounds), np.maximum(*bounds))
        return np.where(outside > 0, np.logaddexp(head, log_tail), head)

    def log_weights_at(self, temperature: float, log_partition: Floats) -> tuple[NDArray[np.float32], ...]:
        """What entries stand for at ``temperature``: float32 ``[H]`` and ``[M]``, logarithms.

        Args:
            temperature: T; the declared one where rows were drawn with replacement or carry no tail logits.
            log_partition: float64 ``[P]``, as `log_partition_at` gives it at T.
        """
        beta = np.float32(1.0 / temperature)
        log_z = log_partition.astype(np.float32)
        head = self.head_logits * beta - np.repeat(log_z, self.head)
        tail = self.tail_logits * beta - np.repeat(log_z, self.tail)
        design = self.design
        if design.floors:
            reach = np.full(len(tail), -np.inf, dtype=np.float32)
            for floor, t in zip(design.floors, design.temperatures, strict=True):
                own = log_partition if t == temperature else self.log_partition_at(t)
                shift = np.repeat((own + np.log(floor)).astype(np.float32), self.tail)
                np.maximum(reach, self.tail_logits * np.float32(1.0 / t) - shift, out=reach)
            tail -= reach
        if design.draws and self.head_counts is not None and self.tail_counts is not None:
            with np.errstate(divide="ignore"):
                return tuple(np.log(c.astype(np.float32) / design.draws) for c in (self.head_counts, self.tail_counts))
        return head, tail


def concatenate(parts: list[SparseRows]) -> SparseRows:
    """Rows of several parts, one after the other. All share one design."""
    first = parts[0]
    counted = first.head_counts is not None
    return SparseRows(
        head=np.concatenate([p.head for p in parts]),
        tail=np.concatenate([p.tail for p in parts]),
        head_ids=np.concatenate([p.head_ids for p in parts]),
        head_logits=np.concatenate([p.head_logits for p in parts]),
        tail_ids=np.concatenate([p.tail_ids for p in parts]),
        tail_logits=np.concatenate([p.tail_logits for p in parts]),
        rest=np.concatenate([p.rest for p in parts]),
        label_log_prob=np.concatenate([p.label_log_prob for p in parts]),
        design=first.design,
        head_counts=np.concatenate([p.head_counts for p in parts if p.head_counts is not None]) if counted else None,
        tail_counts=np.concatenate([p.tail_counts for p in parts if p.tail_counts is not None]) if counted else None,
    )
