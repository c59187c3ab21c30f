"""Our own plain exchange: one JSON object per sequence, in two kinds that docs/exchange.md describes.

The *whole* kind, which a cache is exported as, holds everything that a cache does: ``plan.json`` and ``vocabulary.json`` beside it, exact
and drawn entries, the rest at every declared temperature. Read again it is the same cache, to the same cache id. The *plain* kind, for
whoever makes data elsewhere, has rows of ids and log-probabilities at one temperature.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kdcache.cache.codec import CachedSequence, sequence_digest
from kdcache.cache.invariants import check_rows
from kdcache.cache.layout import REST_LIMIT
from kdcache.cache.manifest import Plan
from kdcache.cache.rows import RowDesign, SparseRows
from kdcache.errors import CorruptCacheError, DataError
from kdcache.exchange.plain import PlainSequence

PLAN, VOCABULARY, CACHE = "plan.json", "vocabulary.json", "cache.json"
_ENTRIES = ("ids", "logits", "tail_ids", "tail_logits")
_COUNTS = ("counts", "tail_counts")


def write(path: Path, sequences: Iterable[CachedSequence]) -> int:
    """Write one split in the whole kind; returns its sequences.

    Raises:
        OSError: it cannot be written.
    """
    count = 0
    with path.open("w", encoding="ascii") as file:
        for sequence in sequences:
            file.write(json.dumps(_object(sequence), separators=(",", ":"), allow_nan=False) + "\n")
            count += 1
    return count


def read_whole(rows: Iterable[tuple[str, Mapping[str, Any]]], plan: Plan, split: int) -> Iterator[CachedSequence]:
    """A split of the whole kind; its tokens are held against the plan's fingerprint when the last has come.

    Raises:
        DataError: a line that is not of this kind, or other tokens than the plan's.
    """
    design, digest, count = plan.design(split), hashlib.sha256(), 0
    for where, row in rows:
        sequence = _whole(where, row, design)
        digest.update(sequence_digest(sequence.token_ids, sequence.targets))
        count += 1
        yield sequence
    planned = plan.data.splits[split]
    if count != planned.sequences or digest.hexdigest() != planned.fingerprint:
        raise DataError(
            f"split {planned.name} holds {count:,} sequences, and {PLAN} names {planned.sequences:,}, or other ones: a line is missing, "
            "added or changed"
        )


def read_plain(rows: Iterable[tuple[str, Mapping[str, Any]]]) -> Iterator[tuple[str, PlainSequence]]:
    """Lines of the plain kind, checked for their shape.

    Raises:
        DataError: naming the line.
    """
    for where, row in rows:
        yield where, _plain(where, row)


def _object(sequence: CachedSequence) -> dict[str, Any]:
    rows, lines = sequence.rows, []
    for number in range(len(rows)):
        one = rows.slice(number, number + 1)
        line: dict[str, Any] = {
            "rest": one.rest[0].tolist(), "label": float(one.label_log_prob[0]),
            "ids": one.head_ids.tolist(), "logits": one.head_logits.tolist(),
        }  # fmt: skip
        if len(one.tail_ids):
            line |= {"tail_ids": one.tail_ids.tolist(), "tail_logits": one.tail_logits.tolist()}
        if one.head_counts is not None and one.tail_counts is not None:
            line |= {"counts": one.head_counts.tolist(), "tail_counts": one.tail_counts.tolist()}
        lines.append(line)
    return {
        "input_ids": sequence.token_ids.tolist(),
        "targets": np.flatnonzero(sequence.targets).tolist(),
        "rows": lines,
    }


def _whole(where: str, row: Mapping[str, Any], design: RowDesign) -> CachedSequence:
    ids, targets, lines = _frame(where, row)
    if any("logprobs" in line for line in lines):
        raise DataError(f"{where} is of the plain kind, but {PLAN} lies beside it; take that file away")
    columns: dict[str, list[Any]] = {name: [] for name in (*_ENTRIES, *_COUNTS, "rest", "label")}
    for number, line in enumerate(lines):
        for name in _ENTRIES:
            columns[name].append(_numbers(where, number, name, line.get(name, []), whole=name.endswith("ids")))
        for name in _COUNTS if design.draws else ():
            columns[name].append(_numbers(where, number, name, line.get(name, []), whole=True))
        rest = _numbers(where, number, "rest", line.get("rest"), whole=False)
        if len(rest) != len(design.temperatures):
            raise DataError(f"{where}: row {number} should have {len(design.temperatures)} numbers in rest")
        columns["rest"].append(rest)
        columns["label"].append(_numbers(where, number, "label", [line.get("label")], whole=False))
        for a, b in (("ids", "logits"), ("tail_ids", "tail_logits")):
            if len(columns[a][-1]) != len(columns[b][-1]):
                raise DataError(f"{where}: row {number} has {len(columns[a][-1])} {a} and {len(columns[b][-1])} {b}")

    def joined(name: str, kind: Any) -> Any:
        return np.concatenate([np.zeros(0), *columns[name]]).astype(kind)

    # Before they are packed into unsigned numbers.
    if any((part > 0).any() for name in ("logits", "tail_logits", "label") for part in columns[name]):
        raise DataError(f"{where}: logits (below the row's largest) and labels (log-probabilities) are at most 0")
    if any(len(part) and part.max() != 0 for part in columns["logits"]):
        raise DataError(f"{where}: the largest of a row's logits is 0; the others are below it")
    if any(((part < 0) | (part >= design.vocab_size)).any() for name in ("ids", "tail_ids") for part in columns[name]):
        raise DataError(f"{where}: an id lies outside the vocabulary of {design.vocab_size:,} tokens")
    if any(((part < 0) | (part > 255)).any() for name in _COUNTS for part in columns[name]):
        raise DataError(f"{where}: a count lies outside 0 to 255")
    rows = SparseRows(
        head=np.array([len(c) for c in columns["ids"]], dtype=np.int64),
        tail=np.array([len(c) for c in columns["tail_ids"]], dtype=np.int64),
        head_ids=joined("ids", np.uint32),
        head_logits=joined("logits", np.float32),
        tail_ids=joined("tail_ids", np.uint32),
        tail_logits=joined("tail_logits", np.float32),
        # As it is stored.
        rest=np.clip(joined("rest", np.float32), -REST_LIMIT, REST_LIMIT).reshape(len(lines), len(design.temperatures)),
        label_log_prob=joined("label", np.float32),
        design=design,
        head_counts=joined("counts", np.uint8) if design.draws else None,
        tail_counts=joined("tail_counts", np.uint8) if design.draws else None,
    )
    if (ids >= design.vocab_size).any():
        raise DataError(f"{where}: a token id lies outside the vocabulary of {design.vocab_size:,} tokens")
    if lines:
        try:
            check_rows(rows)
        except CorruptCacheError as exc:
            raise DataError(f"{where} holds rows that no cache may hold: {exc}; export the cache again") from exc
    return CachedSequence(ids.astype(np.uint32), targets, rows)


def _plain(where: str, row: Mapping[str, Any]) -> PlainSequence:
    ids, targets, lines = _frame(where, row)
    entries, log_probs, labels = [], [], []
    for number, line in enumerate(lines):
        if "logprobs" not in line:
            raise DataError(
                f"{where}: row {number} has no logprobs; a file of the whole kind (with logits and rest) needs its {PLAN} beside it"
            )
        entries.append(_numbers(where, number, "ids", line.get("ids"), whole=True))
        log_probs.append(_numbers(where, number, "logprobs", line["logprobs"], whole=False))
        if len(entries[-1]) != len(log_probs[-1]):
            raise DataError(f"{where}: row {number} has {len(entries[-1])} ids and {len(log_probs[-1])} logprobs")
        known = line.get("label")
        labels.append(np.nan if known is None else float(_numbers(where, number, "label", [known], whole=False)[0]))
    return PlainSequence(
        ids.astype(np.uint32),
        targets,
        np.array([len(e) for e in entries], dtype=np.int64),
        np.concatenate([np.zeros(0), *entries]).astype(np.int64),
        np.concatenate([np.zeros(0), *log_probs]),
        np.array(labels, dtype=np.float64),
    )


def _frame(where: str, row: Mapping[str, Any]) -> tuple[Any, Any, list[Mapping[str, Any]]]:
    """Token ids int64 ``[L]``, targets bool ``[L]``, and one object per target."""
    lines = row.get("rows")
    if not isinstance(lines, list) or not all(isinstance(line, dict) for line in lines):
        raise DataError(f"{where}: expected rows, a list of one object per target")
    ids = _numbers(where, None, "input_ids", row.get("input_ids"), whole=True)
    places = _numbers(where, None, "targets", row.get("targets"), whole=True)
    if len(ids) < 2 or (ids < 0).any():
        raise DataError(f"{where}: expected two token ids at least, none below 0")
    if (np.diff(places) <= 0).any() or (len(places) and not 1 <= places[0] <= places[-1] < len(ids)):
        raise DataError(f"{where}: targets should rise, from 1 to the last token's index")
    if len(places) != len(lines):
        raise DataError(f"{where}: {len(places)} targets and {len(lines)} rows; expected one row per target")
    targets = np.zeros(len(ids), dtype=np.bool_)
    targets[places] = True
    return ids, targets, lines


def _numbers(where: str, number: int | None, name: str, values: Any, *, whole: bool) -> Any:
    """A list of numbers, int64 or float64."""
    place = where if number is None else f"{where}: row {number}"
    kinds = (int,) if whole else (int, float)
    if not isinstance(values, list) or any(type(v) not in kinds for v in values):
        raise DataError(f"{place}: {name} should be {'a list of whole numbers' if whole else 'numbers'}")
    try:
        found = np.array(values, dtype=np.int64 if whole else np.float64)
    except OverflowError as exc:
        raise DataError(f"{place}: a number in {name} is too large") from exc
    if whole and len(found) and (found.max() > np.iinfo(np.int32).max or found.min() < -(1 << 31)):
        raise DataError(f"{place}: a number in {name} is beyond 32 bits")
    if not whole and (np.abs(found) > np.finfo(np.float32).max).any():
        raise DataError(f"{place}: a number in {name} is beyond single precision")
    return found
