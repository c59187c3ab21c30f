"""The numbered invariants of ``cache_format.md`` that rows have to hold."""

from __future__ import annotations

from functools import partial

import numpy as np
from numpy.typing import NDArray

from kdcache.cache.layout import REST_LIMIT
from kdcache.cache.rows import SparseRows
from kdcache.errors import CorruptCacheError

# Entries checked at once: what is made on the way stays in the processor's cache, and in memory that is there already.
_BLOCK = 1 << 17


def check_rows(rows: SparseRows) -> None:
    """Hold every numbered invariant of ``cache_format.md`` that concerns rows; vectorised.

    Raises:
        CorruptCacheError: naming the invariant and the first row that breaks it.
    """
    for what, counts, ids, logits in (
        ("head", rows.head, rows.head_ids, rows.head_logits),
        ("tail", rows.tail, rows.tail_ids, rows.tail_logits),
    ):
        if int(counts.sum()) != len(ids) or len(ids) != len(logits):
            raise CorruptCacheError(
                f"invariant 4 (row counts add up to the entries): {what}, {int(counts.sum())} against {len(ids)}"
            )
    size = max(1, _BLOCK * len(rows) // max(1, rows.entries))
    for first in range(0, len(rows), size):
        _check_block(rows.slice(first, min(first + size, len(rows))), first)


def _check_block(rows: SparseRows, first: int) -> None:
    """Hold rows, of which the first has this number."""
    design, refuse = rows.design, partial(_refuse, first=first)
    if not design.some_empty:
        refuse(5, "every row keeps at least one exact entry", rows.head < 1)
    refuse(5, "a row without exact entries is empty", (rows.head < 1) & (rows.tail > 0))
    if not design.sampled:
        refuse(5, "no entry is drawn", rows.tail > 0)
    refuse(14, f"a row holds at most {design.entry_limit} entries", rows.head + rows.tail > design.entry_limit)
    _check_entries(rows, first)
    kept, limit = rows.kept, np.float32(REST_LIMIT)
    # A not-a-number is neither above nor below.
    if not (rows.rest.min() >= -limit and rows.rest.max() <= limit):
        with np.errstate(invalid="ignore"):
            bad_rest = ~((rows.rest >= -limit) & (rows.rest <= limit)).all(axis=1)
        refuse(10, "log-odds of the rest lie within 32", bad_rest)
    with np.errstate(invalid="ignore"):
        bad_label = ~(np.isfinite(rows.label_log_prob) & (rows.label_log_prob <= 0))
    refuse(11, "label log-probabilities are finite and at most 0", bad_label)
    largest = np.zeros(len(rows), dtype=np.float32)
    if len(rows.head_ids):
        largest[kept] = np.maximum.reduceat(rows.head_logits, rows.head_offsets[:-1][kept])
    refuse(9, "the largest exact entry has logit 0", largest != 0)
    if design.draws and rows.head_counts is not None and rows.tail_counts is not None:
        drawn = np.zeros(len(rows), dtype=np.int64)
        for times, bounds in ((rows.head_counts, rows.head_offsets), (rows.tail_counts, rows.tail_offsets)):
            total = np.concatenate(([0], np.cumsum(times, dtype=np.int64)))
            drawn += total[bounds[1:]] - total[bounds[:-1]]
        refuse(12, f"counts add up to {design.draws} draws", kept & (drawn != design.draws))


def _check_entries(rows: SparseRows, first: int) -> None:
    refuse = partial(_refuse, first=first)
    keys, vocabulary = [], rows.design.vocab_size

    def owners(counts: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.repeat(np.arange(len(rows)), counts)

    for counts, ids, logits in (
        (rows.head, rows.head_ids, rows.head_logits),
        (rows.tail, rows.tail_ids, rows.tail_logits),
    ):
        if not len(ids):
            continue
        if int(ids.max()) >= vocabulary:
            refuse(6, f"ids lie below {vocabulary}", ids >= vocabulary, owners(counts))
        # Ids rise within a row, so that row and id together rise over all of them.
        base = np.arange(len(rows), dtype=np.uint64) * np.uint64(vocabulary)
        key = np.repeat(base, counts) + ids
        falling = key[1:] <= key[:-1]
        if falling.any():
            refuse(7, "ids rise within a row", falling, owners(counts)[1:])
        keys.append(key)
        if not (logits <= 0).all() or not np.isfinite(logits.min()):
            bad = ~(np.isfinite(logits) & (logits <= 0))
            refuse(8, "logits are finite and at most 0", bad, owners(counts))
    if len(keys) == 2:
        both = np.sort(np.concatenate(keys), kind="stable")  # two rising runs: merged, not sorted
        twice = both[1:] == both[:-1]
        if twice.any():
            row = first + int(both[1:][twice][0]) // vocabulary
            raise CorruptCacheError(f"invariant 7 (no id twice in a row): row {row}")


def _refuse(
    number: int,
    rule: str,
    bad: NDArray[np.bool_] | np.bool_,
    rows: NDArray[np.int64] | None = None,
    *,
    first: int,
) -> None:
    """Name the first bad row, counted from ``first``; ``rows`` says whose entry each flag is."""
    bad = np.atleast_1d(bad)
    if bad.any():
        place = int(np.argmax(bad))
        row = first + (place if rows is None else int(rows[place]))
        raise CorruptCacheError(f"invariant {number} ({rule}): row {row}")
