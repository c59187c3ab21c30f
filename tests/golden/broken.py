"""The invalid golden caches: what is broken in which valid one, and the error that has to say so."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import zstandard

from kdcache.cache.shard import compress
from tests.golden.edits import SHARD, Files, Json, reframed

FIRST, SECOND = SHARD.format(0), SHARD.format(1)
PLAN, MANIFEST, VOCABULARY = "plan.json", "manifest.json", "vocabulary.json.zst"


@dataclass(frozen=True)
class Broken:
    """One invalid cache.

    Attributes:
        text: what the error of opening and reading everything has to say; empty where only `verify` can see it.
        change: breaks the files of ``base``.
        base: the valid cache.
        error: the error's class.
        verify: what the finding says, where it is not the error's text.
    """

    text: str
    change: Callable[[Files], object]
    base: str = "top_k"
    error: str = "CorruptCacheError"
    verify: str = ""


def put(name: str, place: tuple[int, ...], value: int) -> Callable[[Files], None]:
    """Set one byte or number of a tensor of the first shard."""
    return lambda f: f.tensors(lambda a: a[name].__setitem__(place, value))


def half(name: str, number: float) -> Callable[[Files], None]:
    """Set the first number of a tensor in half precision."""
    low, high = np.array(number, "<f2").tobytes()

    def change(arrays: dict[str, np.ndarray]) -> None:
        arrays[name][:, 0] = low, high

    return lambda f: f.tensors(change)


def drawn_where_nothing_is(arrays: dict[str, np.ndarray]) -> None:
    arrays["row.tail"][0, 0] = 1
    arrays |= {"tail.id": np.array([[15], [0]], "|u1"), "tail.value": np.array([[9], [0]], "|u1")}


def drawn_in_an_empty_row(arrays: dict[str, np.ndarray]) -> None:
    empty = int(np.argmax(arrays["row.head"][0] == 0))
    full = int(np.argmax(arrays["row.tail"][0]))
    arrays["row.tail"][0, empty] += 1
    arrays["row.tail"][0, full] -= 1


def drawn_and_in_the_head(arrays: dict[str, np.ndarray]) -> None:
    row = int(np.argmax(arrays["row.tail"][0] == 1))
    before = int(arrays["row.tail"][0, :row].sum())
    arrays["tail.id"][0, before] = arrays["head.id"][0, int(arrays["row.head"][0, :row].sum())]


def first_shape(name: str, shape: list[int]) -> Callable[[Files], None]:
    return lambda f: f.header(lambda h: h[name].update(shape=shape))


def hole(header: Json) -> None:
    for name, entry in header.items():
        if name != "__metadata__" and entry["data_offsets"][0]:
            entry["data_offsets"] = [offset + 1 for offset in entry["data_offsets"]]


def flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :]


def with_tensor(header: Json) -> None:
    header["extra"] = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}


def twice(old: str, key: str) -> Callable[[Json], str]:
    return lambda value: json.dumps(value).replace(old, f"{key}{old}", 1)


def swap(files: Files) -> None:
    files.files[FIRST], files.files[SECOND] = files.files[SECOND], files.files[FIRST]


def other_vocabulary(tokens: list[object]) -> Callable[[Files], None]:
    raw = json.dumps(tokens, separators=(",", ":")).encode()

    def change(files: Files) -> None:
        files.files[VOCABULARY] = compress(raw)
        files.plan(lambda p: p["tokenizer"].update(fingerprint=hashlib.sha256(raw).hexdigest()))

    return change


def manifest(change: Callable[[Json], object]) -> Callable[[Files], None]:
    return lambda f: f.json(MANIFEST, change)


def plan(change: Callable[[Json], object]) -> Callable[[Files], None]:
    return lambda f: f.json(PLAN, change)


def entry(**changes: object) -> Callable[[Files], None]:
    return manifest(lambda m: m["shards"][0].update(changes))


def remove(name: str) -> Callable[[Files], object]:
    return lambda f: f.files.pop(name)


DAMAGED = "the zstd frame is truncated or damaged"
TOTALS = "the totals of split train are not those of its shards"

INVARIANTS = {
    "invariant_1_sum": Broken("invariant 1 ", put("sequence.length", (0,), 4), "threshold"),
    "invariant_1_short": Broken(
        "invariant 1 ", lambda f: f.tensors(lambda a: a["sequence.length"].put([0, 1], [1, 7])), "threshold"
    ),
    "invariant_2_flag": Broken("invariant 2 (target flags", put("token.target", (1,), 2)),
    "invariant_2_first": Broken("invariant 2 (the first token", put("token.target", (0,), 1)),
    "invariant_2_rows": Broken("invariant 2 (one row per target)", put("token.target", (1,), 0)),
    "invariant_3": Broken("invariant 3 ", put("token.id", (0, 1), 16)),
    "invariant_4_head": Broken("invariant 4 ", put("row.head", (0, 0), 3)),
    "invariant_4_tail": Broken("invariant 4 ", put("row.tail", (1, 0), 1), "threshold_sampling"),
    "invariant_5_no_head": Broken(
        "invariant 5 (every row", lambda f: f.tensors(lambda a: a["row.head"][0].put([0, 1], [0, 8]))
    ),
    "invariant_5_drawn": Broken("invariant 5 (no entry is drawn)", lambda f: f.tensors(drawn_where_nothing_is)),
    "invariant_5_empty": Broken(
        "invariant 5 (a row without", lambda f: f.tensors(drawn_in_an_empty_row), "selected"
    ),
    "invariant_6_head": Broken("invariant 6 ", put("head.id", (0, 3), 16)),
    "invariant_6_tail": Broken("invariant 6 ", put("tail.id", (1, 0), 1), "threshold_sampling"),
    "invariant_7_order": Broken("invariant 7 (ids rise", put("head.id", (0, 1), 0)),
    "invariant_7_both": Broken(
        "invariant 7 (no id twice", lambda f: f.tensors(drawn_and_in_the_head), "threshold_sampling"
    ),
    "invariant_8_positive": Broken("invariant 8 ", half("head.value", 0.5), "half"),
    "invariant_8_nan": Broken("invariant 8 ", half("tail.value", float("nan")), "half"),
    "invariant_8_infinite": Broken("invariant 8 ", half("tail.value", float("-inf")), "half"),
    "invariant_9": Broken("invariant 9 ", lambda f: f.tensors(lambda a: np.add(a["head.value"], 1, out=a["head.value"]))),
    "invariant_11_positive": Broken("invariant 11 ", half("row.label", 0.5)),
    "invariant_11_nan": Broken("invariant 11 ", half("row.label", float("nan"))),
    "invariant_11_infinite": Broken("invariant 11 ", half("row.label", float("-inf"))),
    "invariant_12": Broken("invariant 12 ", put("head.count", (0,), 9), "random_sampling"),
    "invariant_13": Broken("invariant 13 ", put("token.id", (0, 1), 6)),
    "invariant_14": Broken(
        "invariant 14 ", lambda f: f.tensors(lambda a: a["row.head"][0].put([0, 1], [5, 3]))
    ),
}  # fmt: skip

FRAMES = {
    "file_truncated": Broken("is damaged", lambda f: f.files.update({FIRST: f.files[FIRST][:-1]})),
    "file_flipped": Broken("is damaged", lambda f: f.files.update({FIRST: flipped(f.files[FIRST])})),
    "file_swapped": Broken("is damaged", swap),
    "file_empty": Broken("not a zstd frame", lambda f: f.put(b"")),
    "frame_truncated": Broken(DAMAGED, lambda f: f.frame(lambda d: d[:-1])),
    "frame_flipped": Broken(DAMAGED, lambda f: f.frame(flipped)),
    "frame_trailing": Broken(DAMAGED, lambda f: f.frame(lambda d: d + b"x")),
    "frame_twice": Broken(DAMAGED, lambda f: f.frame(lambda d: d + d)),
    "frame_skippable": Broken("checksum", lambda f: f.frame(lambda d: struct.pack("<II", 0x184D2A50, 4) + b"skip" + d)),
    "frame_no_checksum": Broken(
        "no checksum",
        lambda f: f.put(zstandard.ZstdCompressor(write_checksum=False, write_content_size=True).compress(f.raw())),
    ),
    "frame_no_size": Broken(
        "does not state its size",
        lambda f: f.put(zstandard.ZstdCompressor(write_checksum=True, write_content_size=False).compress(f.raw())),
    ),
    # Exponent 14 of the window descriptor: 2 ** (10 + 14).
    "frame_window": Broken(
        "too large a window", lambda f: f.frame(lambda d: reframed(d, descriptor=0x84, extra=bytes([14 << 3])))
    ),
    "frame_dictionary": Broken(
        "wants a dictionary", lambda f: f.frame(lambda d: reframed(d, descriptor=0xA5, extra=b"\x07"))
    ),
    "frame_bomb": Broken(
        "claims 1152921504606846976 bytes",
        lambda f: f.put(bytes.fromhex("28b52ffde4") + struct.pack("<Q", 1 << 60)),
    ),
}

SHARDS = {
    "header_size": Broken(
        "header claims",
        lambda f: f.put(compress(struct.pack("<Q", 1 << 40) + f.raw()[8:])),
    ),
    "header_too_large": Broken(
        "limit 65536", lambda f: f.header(lambda h: json.dumps(h) + " " * (1 << 16))
    ),
    "header_no_json": Broken("the safetensors header is not acceptable JSON", lambda f: f.header(lambda h: "{")),
    "header_duplicate_key": Broken("a key twice", lambda f: f.header(twice('"row.head"', '"row.head": 1, '))),
    "header_two_metadata_keys": Broken(
        "exactly the key 'kdcache'", lambda f: f.header(lambda h: h["__metadata__"].update(second="x"))
    ),
    "header_no_metadata": Broken("exactly the key 'kdcache'", lambda f: f.header(lambda h: h.pop("__metadata__"))),
    "header_extra_tensor": Broken("tensors ['extra']", lambda f: f.header(with_tensor)),
    "header_missing_tensor": Broken(
        "tensors ['row.label']", lambda f: f.tensors(lambda a: a.pop("row.label"))
    ),
    "header_dtype": Broken("should be U8 [3]", lambda f: f.header(lambda h: h["token.target"].update(dtype="I8"))),
    "header_shape": Broken("should be U8 [2, 2]", first_shape("row.head", [2, 3])),
    "header_shape_large": Broken("head.id should be two-dimensional", first_shape("head.id", [2, 10**17])),
    "header_shape_huge": Broken("an integer is too large", first_shape("head.id", [2, 2**63 - 1])),
    "header_shape_negative": Broken("tail.id should be two-dimensional", first_shape("tail.id", [2, -1])),
    "header_field": Broken("unknown header field", lambda f: f.header(lambda h: h["row.head"].update(more=1))),
    "header_hole": Broken("not a safetensors file", lambda f: f.header(hole)),
    "record_format": Broken("not a kdcache shard", lambda f: f.record(format="other")),
    "record_version": Broken("shard format version 2", lambda f: f.record(version=2)),
    "record_field": Broken("unknown fields in the shard record", lambda f: f.record(more=1)),
    "record_plan": Broken("it belongs to plan aaaaaaaaaaaa", lambda f: f.record(plan="a" * 64)),
    "record_index": Broken("it is shard 1, not 0", lambda f: f.record(index=1)),
    "record_content": Broken("the content hash is not that", lambda f: f.record(content="a" * 64)),
}  # fmt: skip

RECORDS = {
    "shard_missing": Broken(
        "1 of 2 shards are missing: 00001.safetensors.zst", remove(SECOND), error="IncompleteCacheError",
        verify="missing",
    ),
    "manifest_missing": Broken("no manifest", remove(MANIFEST), error="IncompleteCacheError", verify="missing"),
    "plan_missing": Broken("is not a cache", remove(PLAN), error="CacheError"),
    "vocabulary_missing": Broken("vocabulary.json.zst is missing", remove(VOCABULARY)),
    "vocabulary_hash": Broken(
        "not the plan's tokenizer fingerprint", lambda f: f.files.update({VOCABULARY: compress(b'["other"]')})
    ),
    "vocabulary_length": Broken("does not list 16 tokens", other_vocabulary(["a"] * 15)),
    "vocabulary_type": Broken("something that is not a token", other_vocabulary([1] * 16)),
    "vocabulary_frame": Broken(DAMAGED, lambda f: f.files.update({VOCABULARY: f.files[VOCABULARY][:-1]})),
    "manifest_format": Broken("manifest.json is not from a kdcache cache", manifest(lambda m: m.update(format="x"))),
    "manifest_version": Broken("manifest.json has format version 2", manifest(lambda m: m.update(version=2))),
    "manifest_field": Broken("manifest.json: more", manifest(lambda m: m.update(more=1))),
    "manifest_other_plan": Broken("names plan aaaaaaaaaaaa", manifest(lambda m: m.update(plan_digest="a" * 64))),
    "manifest_shards": Broken("lists other shards or splits", manifest(lambda m: m["shards"].pop())),
    "manifest_splits": Broken("lists other shards or splits", manifest(lambda m: m["splits"][0].update(name="x"))),
    "manifest_counts": Broken("the counts of split train", manifest(lambda m: m["splits"][0].update(tokens=4))),
    "manifest_masses": Broken("should state 2 kept masses", manifest(lambda m: m["splits"][0]["kept_mass_p1"].pop())),
    "manifest_duplicate_key": Broken("a key twice", lambda f: f.text(MANIFEST, '"format"', '"format": 1, "format"')),
    "manifest_nan": Broken("NaN is not a number", lambda f: f.text(MANIFEST, '"version": 1', '"version": NaN')),
    "manifest_huge_integer": Broken(
        "an integer is too large", lambda f: f.text(MANIFEST, '"version": 1', '"version": 1' + "0" * 18)
    ),
    "manifest_deep": Broken(
        "manifest.json", lambda f: f.text(MANIFEST, '"version": 1', '"deep": ' + "[" * 12_000 + "]" * 12_000)
    ),
    "manifest_list": Broken("not a JSON object", lambda f: f.files.update({MANIFEST: b"[]"})),
    "manifest_sha256": Broken("is damaged", entry(sha256="a" * 64)),
    "manifest_content": Broken("another content hash, size or entry count", entry(content_sha256="a" * 64)),
    "manifest_bytes": Broken("is damaged", entry(bytes=7)),
    "manifest_raw_bytes": Broken("another content hash, size or entry count", entry(raw_bytes=1 << 20)),
    "manifest_raw_bytes_small": Broken("more than the limit of 7", entry(raw_bytes=7)),
    "manifest_entries": Broken("another content hash, size or entry count", entry(entries=7)),
    "manifest_totals": Broken("", manifest(lambda m: m["splits"][0].update(teacher_nll=1.0)), verify=TOTALS),
    "manifest_kept": Broken("", manifest(lambda m: m["splits"][0].update(kept_positions=1)), verify=TOTALS),
    "plan_format": Broken("plan.json is not from a kdcache cache", plan(lambda p: p.update(format="x"))),
    "plan_version": Broken("plan.json has format version 2", plan(lambda p: p.update(version=2))),
    "plan_field": Broken("plan.json: more", plan(lambda p: p.update(more=1))),
    "plan_field_missing": Broken("plan.json: derived", plan(lambda p: p.pop("derived"))),
    "plan_duplicate_key": Broken("a key twice", lambda f: f.text(PLAN, '"format"', '"format": 1, "format"')),
    "plan_changed": Broken(f"{MANIFEST} names plan", plan(lambda p: p["teacher"].update(name="other"))),
    "plan_split_names": Broken(
        "split names should differ", plan(lambda p: p["data"]["splits"][1].update(name=p["data"]["splits"][0]["name"]))
    ),
    "plan_shards": Broken("shard 0 does not continue its split", plan(lambda p: p["shards"][0].update(start=1))),
    "plan_totals": Broken("do not add up to it", plan(lambda p: p["data"]["splits"][0].update(tokens=4))),
    "plan_vocabulary": Broken(
        "plan.json: tokenizer.vocab_size", plan(lambda p: p["tokenizer"].update(vocab_size=(1 << 24) + 1))
    ),
    "plan_floors": Broken("plan.json: selection", plan(lambda p: p["selection"].update(floors=[0.5, 0.5]))),
    "plan_sequences": Broken(
        "", lambda f: f.plan(lambda p: p["data"]["splits"][0].update(fingerprint="a" * 64)),
        verify="split train holds other sequences than its fingerprint says",
    ),
}  # fmt: skip

BROKEN = {**INVARIANTS, **FRAMES, **SHARDS, **RECORDS}
