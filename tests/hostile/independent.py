"""A second reader, written from ``cache_format.md`` alone, number by number: what a shard holds, and whether it may.

It shares no code with the package. Slow, and for the few rows of an attack's cache fast enough.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from dataclasses import dataclass
from typing import Any

import zstandard


@dataclass(frozen=True)
class Row:
    """One position: entries as ``(id, logit)``, log-odds of the rest by temperature, the label, and counts of draws."""

    head: list[tuple[int, float]]
    tail: list[tuple[int, float]]
    rest: list[float]
    label: float
    counts: list[int]


@dataclass(frozen=True)
class Shard:
    """Sequences as ``(ids, flags)``, and rows."""

    sequences: list[tuple[list[int], list[int]]]
    rows: list[Row]


def read(data: bytes, plan: dict[str, Any], index: int) -> Shard:
    """Decode a shard file whose container is sound."""
    raw = zstandard.ZstdDecompressor().decompress(data)
    size = struct.unpack("<Q", raw[:8])[0]
    header, body = json.loads(raw[8 : 8 + size]), raw[8 + size :]
    tensors = {n: body[slice(*e["data_offsets"])] for n, e in header.items() if n != "__metadata__"}
    selection, counts = plan["selection"], plan["shards"][index]
    width = 2 if plan["tokenizer"]["vocab_size"] <= 65536 else 3
    lengths = [x[0] for x in struct.iter_unpack("<I", tensors["sequence.length"])]
    ids, flags = _planes(tensors["token.id"], width), list(tensors["token.target"])
    sequences, at = [], 0
    for length in lengths:
        sequences.append((ids[at : at + length], flags[at : at + length]))
        at += length
    half = selection["values"] == "half"
    heads = _entries(tensors, "head", width, half, 1 / 16)
    tails = _entries(tensors, "tail", width, half, 1 / 2) if "tail.value" in tensors else None
    tail_steps = _planes(tensors["tail.id"], width)
    rest, labels = _planes(tensors["row.rest"], 2), _half(tensors["row.label"])
    means = _half(tensors["row.tail_value"]) if "row.tail_value" in tensors else []
    rows, h, t, positions = [], 0, 0, counts["positions"]
    for p, (n, m) in enumerate(zip(_planes(tensors["row.head"], 2), _planes(tensors["row.tail"], 2), strict=True)):
        head = _risen([s for s, _ in heads[h : h + n]])
        tail = _risen(tail_steps[t : t + m])
        values = [v for _, v in tails[t : t + m]] if tails is not None else [means[p]] * m
        drawn = (
            [*tensors["head.count"][h : h + n], *tensors["tail.count"][t : t + m]] if "head.count" in tensors else []
        )
        rows.append(
            Row(
                head=list(zip(head, [v for _, v in heads[h : h + n]], strict=True)),
                tail=list(zip(tail, values, strict=True)),
                rest=[(rest[b * positions + p] - 32768) / 1024 for b in range(len(selection["temperatures"]))],
                label=labels[p],
                counts=drawn,
            )
        )
        h, t = h + n, t + m
    return Shard(sequences, rows)


def broken(shard: Shard, data: bytes, plan: dict[str, Any], index: int) -> list[int]:
    """Numbers of the invariants that do not hold."""
    selection, counts, vocabulary = plan["selection"], plan["shards"][index], plan["tokenizer"]["vocab_size"]
    method = selection["method"]
    raw = zstandard.ZstdDecompressor().decompress(data)
    size = struct.unpack("<Q", raw[:8])[0]
    header, body = json.loads(raw[8 : 8 + size]), raw[8 + size :]
    digests = body[slice(*header["sequence.digest"]["data_offsets"])]
    held: dict[int, bool] = dict.fromkeys(range(1, 15), True)
    tokens = [len(i) for i, _ in shard.sequences]
    held[1] = sum(tokens) == counts["tokens"] and min(tokens) >= 2 and len(tokens) == counts["sequences"]
    flags = [f for _, fs in shard.sequences for f in fs]
    held[2] = set(flags) <= {0, 1} and not any(f[0] for _, f in shard.sequences) and sum(flags) == len(shard.rows)
    held[2] &= len(shard.rows) == counts["positions"]
    held[3] = all(i < vocabulary for ids, _ in shard.sequences for i in ids)
    held[4] = sum(len(r.head) for r in shard.rows) == header["head.id"]["shape"][1]
    held[4] &= sum(len(r.tail) for r in shard.rows) == header["tail.id"]["shape"][1]
    thinned = selection["positions"] != "all" and counts["split"] == 0
    limit = {
        "random_sampling": selection["draws"] + 1,
        "threshold_sampling": 2 * sum(math.ceil(1 / f) + 1 for f in selection["floors"]),
    }.get(method, selection["k"])
    limit = min(limit, vocabulary * (2 if method == "threshold_sampling" else 1))
    for row in shard.rows:
        kept = bool(row.head)
        held[5] &= kept or (thinned and not row.tail)
        held[5] &= not row.tail or method.endswith("sampling")
        ids = [[i for i, _ in part] for part in (row.head, row.tail)]
        held[6] &= all(i < vocabulary for part in ids for i in part)
        held[7] &= all(part == sorted(set(part)) for part in ids) and not set(ids[0]) & set(ids[1])
        held[8] &= all(math.isfinite(v) and v <= 0 for _, v in row.head + row.tail)
        held[9] &= not kept or max(v for _, v in row.head) == 0
        held[10] &= all(-32 <= r <= 32 for r in row.rest)
        held[11] &= math.isfinite(row.label) and row.label <= 0
        held[12] &= not kept or not row.counts or sum(row.counts) == selection["draws"]
        held[14] &= len(row.head) + len(row.tail) <= limit
    expected = b"".join(
        hashlib.sha256(struct.pack(f"<{len(i)}I", *i) + bytes(f)).digest()[:16] for i, f in shard.sequences
    )
    held[13] = digests == expected
    return [number for number, holds in held.items() if not holds]


def _planes(data: bytes, width: int) -> list[int]:
    count = len(data) // width
    return [sum(data[place * count + i] << (8 * place) for place in range(width)) for i in range(count)]


def _half(data: bytes) -> list[float]:
    return [struct.unpack("<e", struct.pack("<H", n))[0] for n in _planes(data, 2)]


def _entries(tensors: dict[str, bytes], part: str, width: int, half: bool, step: float) -> list[tuple[int, float]]:
    values = tensors[f"{part}.value"]
    logits = _half(values) if half else [-step * n for n in _planes(values, 2)]
    return list(zip(_planes(tensors[f"{part}.id"], width), logits, strict=True))


def _risen(steps: list[int]) -> list[int]:
    reached, ids = 0, []
    for step in steps:
        reached += step
        ids.append(reached)
    return ids
