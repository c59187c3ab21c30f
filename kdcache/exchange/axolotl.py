"""axolotl's prepared data for its KD plugin: what its collator pads and its loss compares, as Parquet.

Read at source (axolotl-ai-cloud/axolotl): ``integrations/kd/collator.py`` at commit 0399aefc (columns ``target_logprobs``,
``target_token_ids``, ``target_mask``, each a list over positions of lists over entries, padded by the collator),
``integrations/kd/kernels/liger.py`` at 00bfeb42 (row ``i`` is compared with the logits at ``i``, under the label at ``i + 1``;
log-probabilities are at ``kd_temperature`` and normalised over the entries), and ``utils/data/wrappers.py`` at 0ca4645a (a data set with ``input_ids``,
``attention_mask`` and ``labels`` is taken as tokenised).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kdcache.errors import DataError
from kdcache.exchange.columns import Shape
from kdcache.exchange.plain import PlainSequence, lists

IGNORED = -100
COLUMNS = ("input_ids", "attention_mask", "labels", "target_logprobs", "target_token_ids", "target_mask")
_TEACHER = dict(zip(COLUMNS[3:], (Shape(2, whole=False), Shape(2, whole=True), Shape(2, whole=True)), strict=True))
SHAPES = {name: Shape(1, whole=True) for name in COLUMNS[:3]} | _TEACHER
# As the collator marks a place that only fills a row.
_FILL = -1e9
_BATCH = 64


def write(path: Path, sequences: Iterable[PlainSequence]) -> int:
    """Write one split as Parquet; returns its rows.

    Positions without a teacher have one masked entry, so that no list is empty.

    Raises:
        OSError: it cannot be written.
    """
    import pyarrow.parquet as parquet  # type: ignore[import-untyped]

    schema, rows = _schema(), 0
    with parquet.ParquetWriter(path, schema) as writer:
        for batch in _batches(sequences):
            writer.write_table(_table(batch, schema))
            rows += len(batch)
    return rows


def read(rows: Iterable[tuple[str, Mapping[str, Any]]]) -> Iterator[tuple[str, PlainSequence]]:
    """Rows of axolotl's columns, checked, as sequences; learnt tokens without a row that is not masked keep no entries.

    Raises:
        DataError: naming the row.
    """
    for where, row in rows:
        yield where, _sequence(where, row)


def _schema() -> Any:
    import pyarrow as pa

    ids, small, numbers = pa.list_(pa.int32()), pa.list_(pa.int8()), pa.list_(pa.float32())
    kinds = (ids, small, ids, pa.list_(numbers), pa.list_(ids), pa.list_(small))
    return pa.schema(list(zip(COLUMNS, kinds, strict=True)))


def _table(batch: Sequence[PlainSequence], schema: Any) -> Any:
    import pyarrow as pa

    lengths = np.array([len(s.token_ids) for s in batch], dtype=np.int64)
    ids, targets = (np.concatenate([getattr(s, name) for s in batch]) for name in ("token_ids", "targets"))
    labels = np.where(targets, ids.astype(np.int64), IGNORED)
    counts, entries, log_probs, mask = _rows(batch, lengths)
    inner = [
        lists(lists(log_probs, counts, pa.float32()), lengths, None),
        lists(lists(entries, counts, pa.int32()), lengths, None),
        lists(lists(mask, counts, pa.int8()), lengths, None),
    ]
    outer = [
        lists(ids.astype(np.int32), lengths, pa.int32()),
        lists(np.ones(len(ids), dtype=np.int8), lengths, pa.int8()),
        lists(labels.astype(np.int32), lengths, pa.int32()),
    ]
    return pa.Table.from_arrays(
        [column.cast(f.type) for column, f in zip([*outer, *inner], schema, strict=True)], schema=schema
    )


def _rows(batch: Sequence[PlainSequence], lengths: Any) -> tuple[Any, Any, Any, Any]:
    """Entries at every position of a batch: counts, ids, log-probabilities and mask."""
    starts = np.cumsum(lengths) - lengths
    places = np.concatenate([start + np.flatnonzero(s.targets) - 1 for start, s in zip(starts, batch, strict=True)])
    own = np.zeros(int(lengths.sum()), dtype=np.int64)
    own[places] = np.concatenate([s.counts for s in batch])
    counts = np.maximum(own, 1)
    owner = np.repeat(np.arange(len(counts)), counts)
    taught = own[owner] > 0
    entries = np.zeros(len(owner), dtype=np.int32)
    log_probs = np.full(len(owner), _FILL, dtype=np.float32)
    entries[taught] = np.concatenate([s.ids for s in batch])
    log_probs[taught] = np.concatenate([s.log_probs for s in batch])
    return counts, entries, log_probs, taught.astype(np.int8)


def _sequence(where: str, row: Mapping[str, Any]) -> PlainSequence:
    lacking = [name for name in COLUMNS if row.get(name) is None]
    if lacking:
        raise DataError(
            f"{where} lacks {', '.join(lacking)}; expected axolotl's prepared KD columns {', '.join(COLUMNS)}"
        )
    length = len(row["input_ids"])
    seen = whole(where, "attention_mask", row["attention_mask"], length)
    used = int(seen.sum())
    if not np.array_equal(seen, np.arange(length) < used) or used < 2:
        raise DataError(
            f"{where}: expected an attention_mask of ones, then of zeros that only fill; of two ones at least"
        )
    ids = token_ids(where, row["input_ids"])[:used]
    labels = whole(where, "labels", row["labels"], length)[:used]
    targets = refuse_other_labels(where, ids, labels)
    teacher = [row[name] for name in COLUMNS[3:]]
    if len({len(column) for column in teacher}) != 1 or len(teacher[0]) not in (used - 1, used, length):
        raise DataError(
            f"{where}: expected {used} rows in {', '.join(COLUMNS[3:])}, found {', '.join(str(len(c)) for c in teacher)}"
        )
    counts, kept_ids, kept = [], [], []
    for place in np.flatnonzero(targets):
        log_probs, entries, mask = (column[place - 1] for column in teacher)
        if not len(log_probs) == len(entries) == len(mask):
            raise DataError(f"{where}: row {place - 1} has log-probabilities, ids and mask of different lengths")
        taught = whole(where, f"target_mask[{place - 1}]", mask, len(mask))
        if not np.isin(taught, (0, 1)).all():
            raise DataError(f"{where}: the mask of row {place - 1} should be of 0 and 1")
        counts.append(int(taught.sum()))
        kept_ids.append(whole(where, f"target_token_ids[{place - 1}]", entries, len(entries))[taught == 1])
        kept.append(np.asarray(log_probs, dtype=np.float64)[taught == 1])
    return PlainSequence(ids.astype(np.uint32), targets, np.array(counts, dtype=np.int64), *_joined(kept_ids, kept))


def _joined(ids: list[Any], log_probs: list[Any]) -> tuple[Any, Any]:
    if not ids:
        return np.zeros(0, dtype=np.int64), np.zeros(0)
    return np.concatenate(ids).astype(np.int64), np.concatenate(log_probs)


def whole(where: str, name: str, values: Any, length: int) -> Any:
    """A column of whole numbers, int64 ``[length]``.

    Raises:
        DataError: another length, or something else in it.
    """
    try:
        found = np.asarray(values)
    except ValueError as exc:
        raise DataError(f"{where}: {name} is no list of whole numbers") from exc
    if found.shape != (length,) or (length and found.dtype.kind not in "iub"):
        raise DataError(
            f"{where}: expected {length} whole numbers in {name}, found shape {list(found.shape)} of {found.dtype}"
        )
    if length and (int(found.max()) > np.iinfo(np.int32).max or int(found.min()) < -(1 << 31)):
        raise DataError(f"{where}: a number in {name} is beyond 32 bits")
    return found.astype(np.int64)


def token_ids(where: str, values: Any) -> Any:
    """The tokens of a row, int64 ``[L]``.

    Raises:
        DataError: something else than whole numbers, or one below 0.
    """
    found = whole(where, "input_ids", values, len(values))
    if (found < 0).any():
        raise DataError(f"{where}: token id {int(found.min())} in input_ids; token ids are 0 or above")
    return found


def refuse_other_labels(where: str, ids: Any, labels: Any) -> Any:
    """Which tokens are learnt, bool ``[L]``: labels are the token itself, or -100.

    Raises:
        DataError: another label. One token further on is the usual mistake.
    """
    targets = labels != IGNORED
    wrong = np.flatnonzero(targets & (labels != ids))
    if len(wrong):
        place = int(wrong[0])
        raise DataError(
            f"{where}: labels[{place}] is {int(labels[place])} and input_ids[{place}] {int(ids[place])}; labels are the tokens themselves or "
            "-100, not shifted"
        )
    # The first token is predicted by nothing.
    targets[:1] = False
    return targets


def _batches(sequences: Iterable[PlainSequence]) -> Iterator[list[PlainSequence]]:
    batch: list[PlainSequence] = []
    for sequence in sequences:
        batch.append(sequence)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch
