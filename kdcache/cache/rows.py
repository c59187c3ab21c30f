"""``SparseRows``: the sparse picture of a teacher's next-token distributions, and its invariants.

Row ``p`` belongs to one *position*: a token whose successor is a training target. It keeps some
vocabulary entries with their logits relative to the row's largest logit, the exact log-partition of
the whole vocabulary at the declared temperatures, and the log-probability of the label. With
``y`` the teacher's logits and ``m = max(y)``::

    logits[e]           = y[ids[e]] - m                      (half precision, <= 0)
    log_partition[p, b] = log sum_v exp((y_v - m) / T_b)     (single precision, >= 0)

so that ``log p_T(v) = logits / T - log_partition(T)`` and the mass outside the kept set is known
exactly, at every declared temperature.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from kdcache.cache.layout import HALF_ROUNDING, MASS_TOLERANCE, PARTITION_TOLERANCE
from kdcache.errors import CacheError, CorruptCacheError

# What single-precision partitions of size 1 lose.
_SINGLE_ROUNDING = 2.0**-23


@dataclass(frozen=True)
class SparseRows:
    """Ragged rows of kept vocabulary entries.

    Attributes:
        head: int64 ``[P]``, exactly kept entries per row, in rank order, at least one.
        tail: int64 ``[P]``, sampled entries per row, stored behind the head.
        ids: uint32 ``[E]``, vocabulary ids, row after row.
        logits: float16 ``[E]``, logit minus the row's maximum.
        log_partition: float32 ``[P, B]``, one column per declared temperature.
        label_log_prob: float32 ``[P]``, natural logarithm, temperature 1.
        temperatures: the ``B`` declared temperatures, ascending.
        vocab_size: number of vocabulary columns the distributions range over.
    """

    head: NDArray[np.int64]
    tail: NDArray[np.int64]
    ids: NDArray[np.uint32]
    logits: NDArray[np.float16]
    log_partition: NDArray[np.float32]
    label_log_prob: NDArray[np.float32]
    temperatures: tuple[float, ...]
    vocab_size: int

    def __len__(self) -> int:
        return len(self.head)

    @cached_property
    def offsets(self) -> NDArray[np.int64]:
        """int64 ``[P + 1]``: entries of row ``p`` lie in ``offsets[p]:offsets[p + 1]``."""
        return np.concatenate(([0], np.cumsum(self.head + self.tail)))

    def slice(self, start: int, stop: int) -> SparseRows:
        """Rows ``start:stop`` as a view (no entry is copied)."""
        bounds = self.offsets[[start, stop]]
        return SparseRows(
            head=self.head[start:stop],
            tail=self.tail[start:stop],
            ids=self.ids[bounds[0] : bounds[1]],
            logits=self.logits[bounds[0] : bounds[1]],
            log_partition=self.log_partition[start:stop],
            label_log_prob=self.label_log_prob[start:stop],
            temperatures=self.temperatures,
            vocab_size=self.vocab_size,
        )

    def kept_mass(self) -> NDArray[np.float64]:
        """float64 ``[P, B]``: probability of the exactly kept entries at each declared temperature."""
        if len(self) == 0:
            return np.zeros((0, len(self.temperatures)))
        is_head, starts = self._head_mask(), self.offsets[:-1]
        logits = self.logits.astype(np.float64)
        mass = [np.add.reduceat(np.where(is_head, np.exp(logits / t), 0.0), starts) for t in self.temperatures]
        return np.stack(mass, axis=1) * np.exp(-self.log_partition.astype(np.float64))

    def log_partition_at(self, temperature: float) -> NDArray[np.float64]:
        """float64 ``[P]``: log-partition at any temperature not below the smallest declared one.

        Exact at a declared temperature. Elsewhere the kept entries are summed exactly and only the
        tail's log-partition is interpolated, as a polynomial in ``1 / T`` through the declared
        temperatures and the node that is known for free: at ``1 / T = 0`` every tail entry counts 1.

        Raises:
            CacheError: the temperature is below every declared one (extrapolation is off by nats).
        """
        if temperature in self.temperatures:
            return self.log_partition[:, self.temperatures.index(temperature)].astype(np.float64)
        if temperature < min(self.temperatures):
            raise CacheError(
                f"temperature {temperature:g} is below the cache's smallest declared temperature "
                f"{min(self.temperatures):g} and cannot be interpolated; train at {min(self.temperatures):g} "
                f"or above, or make a cache with selection.temperatures including {temperature:g}"
            )
        starts, is_head = self.offsets[:-1], self._head_mask()
        logits = self.logits.astype(np.float64)

        def head_sum(beta: float) -> NDArray[np.float64]:
            return np.add.reduceat(np.where(is_head, np.exp(logits * beta), 0.0), starts)

        outside = self.vocab_size - self.head
        betas = [0.0] + [1.0 / t for t in self.temperatures]
        nodes = [np.log(np.maximum(outside, 1))]
        for column, t in enumerate(self.temperatures):
            tail = np.exp(self.log_partition[:, column].astype(np.float64)) - head_sum(1.0 / t)
            # On peaked rows the tail drowns in the rounding of the kept logits; it is then no more than that.
            rounding = HALF_ROUNDING * np.add.reduceat(np.where(is_head, -logits * np.exp(logits / t) / t, 0.0), starts)
            nodes.append(np.minimum(np.log(np.maximum(tail, rounding + _SINGLE_ROUNDING)), nodes[0]))
        beta = 1.0 / temperature
        log_tail = np.zeros(len(self))
        for i, node in enumerate(nodes):
            others = [b for j, b in enumerate(betas) if j != i]
            log_tail += node * np.prod([(beta - b) / (betas[i] - b) for b in others])
        # The tail's log-partition falls as 1 / T rises: it lies between its neighbours, whatever the polynomial says.
        above = min((b for b in betas if b >= beta), default=betas[1])
        below = max(b for b in betas if b <= beta)
        bounds = nodes[betas.index(above)], nodes[betas.index(below)]
        log_tail = np.clip(log_tail, np.minimum(*bounds), np.maximum(*bounds))
        tail_sum = np.where(outside > 0, np.exp(log_tail), 0.0)
        return np.log(head_sum(beta) + tail_sum)

    def check(self) -> None:
        """Hold every numbered invariant of ``cache_format.md``; vectorised.

        Raises:
            CacheError: naming the invariant and the first row that breaks it.
        """
        per_row = self.head + self.tail
        rows_of_entries = np.repeat(np.arange(len(self)), per_row)
        if int(per_row.sum()) != len(self.ids) or len(self.ids) != len(self.logits):
            raise CorruptCacheError(
                f"invariant 4 (row counts add up to the entries): {int(per_row.sum())} against {len(self.ids)}"
            )
        self._refuse(5, "every row keeps at least one exact entry", self.head < 1)
        if len(self) == 0:
            return
        self._refuse(6, f"ids lie below {self.vocab_size}", self.ids >= self.vocab_size, rows_of_entries)
        keys = np.sort(rows_of_entries * np.int64(self.vocab_size) + self.ids)
        repeated = keys[1:][np.diff(keys) == 0]
        if len(repeated):
            raise CorruptCacheError(f"invariant 7 (no id twice in a row): row {int(repeated[0]) // self.vocab_size}")
        logits = self.logits.astype(np.float32)
        bad = ~np.isfinite(logits) | (logits > 0)
        self._refuse(8, "logits are finite and at most 0", bad, rows_of_entries)
        is_head = self._head_mask()
        rising = np.zeros(len(logits), dtype=bool)
        rising[1:] = (np.diff(logits) > 0) & is_head[1:] & (np.diff(rows_of_entries) == 0)
        self._refuse(9, "exact entries stand in rank order", rising, rows_of_entries)
        self._refuse(9, "the first entry is the largest logit", logits[self.offsets[:-1]] != 0)
        limit = np.log(self.vocab_size) + PARTITION_TOLERANCE
        partition = self.log_partition
        with np.errstate(invalid="ignore"):
            bad_partition = ~((partition >= -PARTITION_TOLERANCE) & (partition <= limit)).all(axis=1)
            bad_label = ~(np.isfinite(self.label_log_prob) & (self.label_log_prob <= PARTITION_TOLERANCE))
        self._refuse(10, "log-partitions lie between 0 and log V", bad_partition)
        falling = (np.diff(partition, axis=1) < -PARTITION_TOLERANCE).any(axis=1)
        self._refuse(10, "log-partitions rise with the temperature", falling)
        self._refuse(11, "label log-probabilities are finite and at most 0", bad_label)
        self._refuse(12, "kept mass is at most 1", (self.kept_mass() > 1 + MASS_TOLERANCE).any(axis=1))

    def _head_mask(self) -> NDArray[np.bool_]:
        per_row = self.head + self.tail
        rank = np.arange(len(self.ids)) - np.repeat(self.offsets[:-1], per_row)
        return rank < np.repeat(self.head, per_row)

    def _refuse(
        self, number: int, rule: str, bad: NDArray[np.bool_] | np.bool_, rows: NDArray[np.int64] | None = None
    ) -> None:
        bad = np.atleast_1d(bad)
        if bad.any():
            first = int(np.argmax(bad))
            row = first if rows is None else int(rows[first])
            raise CorruptCacheError(f"invariant {number} ({rule}): row {row}")


def concatenate(parts: list[SparseRows]) -> SparseRows:
    """Rows of several parts, one after the other. All share temperatures and vocabulary."""
    first = parts[0]
    return SparseRows(
        head=np.concatenate([p.head for p in parts]),
        tail=np.concatenate([p.tail for p in parts]),
        ids=np.concatenate([p.ids for p in parts]),
        logits=np.concatenate([p.logits for p in parts]),
        log_partition=np.concatenate([p.log_partition for p in parts]),
        label_log_prob=np.concatenate([p.label_log_prob for p in parts]),
        temperatures=first.temperatures,
        vocab_size=first.vocab_size,
    )
