"""Caches made to hurt whoever opens them. Each is a small directory, laid out where the caller says."""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

from kdcache.cache import layout
from kdcache.cache.codec import sequence_digest
from kdcache.cache.manifest import parse_plan
from kdcache.cache.reader import open_cache
from kdcache.cache.shard import compress
from kdcache.cache.verify import verify
from kdcache.errors import CorruptCacheError, KdcacheError
from tests.hostile.structural import Forgery, nested
from tests.hostile.victims import SHARDS, Victim, write_files

MIB = 1 << 20
# Values that one JSON file may hold, with room for what is around them.
_VALUES = (1 << 18) - 20_000
_CHUNK = bytes(MIB)
Attack = Callable[[Path, Victim], None]
ATTACKS: dict[str, Attack] = {}


def attack(make: Attack) -> Attack:
    """Enter an attack under its name in words."""
    ATTACKS[make.__name__.replace("_", " ")] = make
    return make


# Frames ---------------------------------------------------------------------------------------------------------------


@attack
def frame_of_13_bytes_claims_an_exbibyte(folder: Path, victim: Victim) -> None:
    _with_shard(folder, victim, bytes.fromhex("28b52ffde4") + struct.pack("<Q", 1 << 60), raw_bytes=(1 << 53) - 1)


@attack
def gibibyte_of_zeros_in_a_shard(folder: Path, victim: Victim) -> None:
    _with_shard(folder, victim, zeros(b"", 1 << 30), raw_bytes=1 << 30)


@attack
def gibibyte_of_zeros_that_plan_and_header_promise(folder: Path, victim: Victim) -> None:
    promised_zeros(folder, victim, 1 << 30)


@attack
def quarter_gibibyte_of_zeros_that_plan_and_header_promise(folder: Path, victim: Victim) -> None:
    promised_zeros(folder, victim, 1 << 28)


@attack
def sixty_mebibytes_of_zeros_that_plan_and_header_promise(folder: Path, victim: Victim) -> None:
    promised_zeros(folder, victim, 60 * MIB)


@attack
def zeros_just_within_what_a_small_frame_may_hold(folder: Path, victim: Victim) -> None:
    promised_zeros(folder, victim, 16 * MIB)


@attack
def rows_good_up_to_the_last_within_what_a_small_frame_may_hold(folder: Path, victim: Victim) -> None:
    good_but_the_last(folder, victim, 16 * MIB)


@attack
def gibibyte_of_zeros_as_vocabulary(folder: Path, victim: Victim) -> None:
    write_files(folder, {**victim.files, layout.VOCABULARY_FILE: zeros(b"", 1 << 30)})


@attack
def frame_with_a_window_of_two_gibibytes(folder: Path, victim: Victim) -> None:
    # Window 2**31, a stated size of 8 bytes wide, a checksum; no single segment.
    frame = bytes.fromhex("28b52ffd") + bytes([0xC4, 21 << 3]) + struct.pack("<Q", 1 << 29)
    _with_shard(folder, victim, frame + bytes(64), raw_bytes=1 << 29)


@attack
def skippable_frame_in_front(folder: Path, victim: Victim) -> None:
    data = struct.pack("<II", 0x184D2A50, 1 << 20) + bytes(1 << 20) + victim.files[SHARDS[0]]
    _with_shard(folder, victim, data, raw_bytes=0)


@attack
def frame_of_nothing(folder: Path, victim: Victim) -> None:
    _with_shard(folder, victim, compress(b""), raw_bytes=0)


# Headers --------------------------------------------------------------------------------------------------------------


@attack
def header_of_50_megabytes(folder: Path, victim: Victim) -> None:
    text = b'{"__metadata__":{"kdcache":"' + b"x" * 50_000_000 + b'"}}'
    raw = struct.pack("<Q", len(text)) + text
    _with_shard(folder, victim, compress(raw), raw_bytes=len(raw))


@attack
def header_that_claims_2_to_the_63(folder: Path, victim: Victim) -> None:
    raw = struct.pack("<Q", 1 << 63) + b"{}"
    _with_shard(folder, victim, compress(raw), raw_bytes=len(raw))


@attack
def header_30000_levels_deep(folder: Path, victim: Victim) -> None:
    text = nested(30_000, "[").encode()
    _with_shard(folder, victim, compress(struct.pack("<Q", len(text)) + text), raw_bytes=8 + len(text))


@attack
def header_of_two_levels_less_than_python_allows(folder: Path, victim: Victim) -> None:
    _forged(folder, victim, lambda f: f.header["head.id"].update(shape=json.loads(nested(900, "["))))


@attack
def shape_of_2_to_the_63(folder: Path, victim: Victim) -> None:
    _forged(folder, victim, lambda f: f.header["head.id"].update(shape=[2, (1 << 63) - 1]))


@attack
def shape_whose_product_wraps_around(folder: Path, victim: Victim) -> None:
    _forged(folder, victim, lambda f: f.header["row.rest"].update(shape=[1 << 32, 1 << 32, 0]))


@attack
def plan_of_four_billion_positions(folder: Path, victim: Victim) -> None:
    def change(f: Forgery) -> None:
        for key in ("sequences", "tokens", "positions"):
            f.plan["shards"][0][key] = f.plan["data"]["splits"][0][key] = (1 << 32) - 1
        f.header["row.head"]["shape"] = [2, (1 << 32) - 1]

    _forged(folder, victim, change)


# JSON -----------------------------------------------------------------------------------------------------------------


def _json_attacks() -> Iterator[tuple[str, Attack]]:
    """Every file of JSON as large as it may be, full of what costs most to parse."""
    # The most of each that JSON_VALUES lets through, and as many bytes as fit.
    fillings = {
        "empty lists": lambda size: b'{"format":"kdcache","version":1,"shards":[' + b"[]," * (size // 3) + b"[]]}",
        "empty objects": lambda size: b'{"format":"kdcache","version":1,"shards":[' + b"{}," * (size // 3) + b"{}]}",
        "unknown keys": lambda size: (
            b'{"format":"kdcache","version":1,' + b",".join(b'"%07x":0' % i for i in range(size // 12)) + b"}"
        ),
        "short strings": lambda size: b'{"format":"kdcache","version":1,"shards":["' + b'ab","' * (size // 5) + b'"]}',
        "wide characters": lambda size: (
            b'{"format":"kdcache","version":1,"data":"\xf0\x9f\x98\x80' + b"x" * size + b'"}'
        ),
        "a number of a million digits": lambda size: b'{"format":"kdcache","version":' + b"9" * 1_000_000 + b"}",
        "brackets 10 million deep": lambda size: b"[" * 10_000_000,
        "braces 1 million deep": lambda size: b'{"a":' * 1_000_000,
    }
    for file in (layout.PLAN_FILE, layout.MANIFEST_FILE):
        for what, fill in fillings.items():

            def make(folder: Path, victim: Victim, file: str = file, fill: Callable[[int], bytes] = fill) -> None:
                write_files(folder, {**victim.files, file: fill(layout.JSON_LIMIT - 128)})

            yield f"{file} full of {what}", make
            if what.startswith(("empty", "unknown", "short")):
                # Brackets and commas count.
                size = 4096 * (_VALUES // sum(fill(4096).count(sign) for sign in (b",", b"[", b"{")))

                def many(
                    folder: Path,
                    victim: Victim,
                    file: str = file,
                    fill: Callable[[int], bytes] = fill,
                    size: int = size,
                ) -> None:
                    write_files(folder, {**victim.files, file: fill(size)})

                yield f"{file} with a quarter of a million {what}", many


ATTACKS.update(_json_attacks())


@attack
def plan_of_as_many_shards_as_fit(folder: Path, victim: Victim) -> None:
    plan = json.loads(victim.files[layout.PLAN_FILE])
    last, count = plan["shards"].pop(), _VALUES // 6
    one = {"positions": 1, "sequences": 1, "split": 0, "start": 0, "tokens": 2}
    plan["shards"] = [{**one, "start": i} for i in range(count)] + [last]
    plan["data"]["splits"][0].update(sequences=count, tokens=2 * count, positions=count)
    write_files(folder, {**victim.files, layout.PLAN_FILE: json.dumps(plan, separators=(",", ":")).encode()})


@attack
def vocabulary_of_13_million_strings(folder: Path, victim: Victim) -> None:
    vocabulary(folder, victim, b'["ab"' + b',"ab"' * 13_000_000 + b"]")


@attack
def vocabulary_of_a_million_strings(folder: Path, victim: Victim) -> None:
    vocabulary(folder, victim, b'["ab"' + b',"ab"' * ((1 << 20) - 1) + b"]")


@attack
def vocabulary_of_a_million_lists(folder: Path, victim: Victim) -> None:
    vocabulary(folder, victim, b"[[]" + b",[]" * ((1 << 20) - 2) + b"]")


@attack
def vocabulary_of_one_wide_string(folder: Path, victim: Victim) -> None:
    vocabulary(folder, victim, b'["\xf0\x9f\x98\x80","' + b"x" * (15 * MIB) + b'"]')


@attack
def vocabulary_a_million_levels_deep(folder: Path, victim: Victim) -> None:
    vocabulary(folder, victim, b"[" * 1_000_000)


# What lies in the directory -------------------------------------------------------------------------------------------


def _place_attacks() -> Iterator[tuple[str, Attack]]:
    """Things that are no regular file, or far too large a one, in the place of each file."""

    def sparse(path: Path) -> None:
        with path.open("wb") as f:
            f.truncate(1 << 40)

    things: dict[str, Callable[[Path], object]] = {
        "a sparse file of a tebibyte": sparse,
        "a pipe that nobody writes to": os.mkfifo,
        "a link to a device that never ends": lambda path: path.symlink_to("/dev/zero"),
        "a link to itself": lambda path: path.symlink_to(path.name),
        "a link out of the cache": lambda path: path.symlink_to("/etc/hostname"),
        "a directory": Path.mkdir,
        "an empty file": Path.touch,
    }
    for file in (layout.PLAN_FILE, layout.MANIFEST_FILE, layout.VOCABULARY_FILE, SHARDS[0]):
        for what, place in things.items():

            def make(folder: Path, victim: Victim, file: str = file, place: Callable[[Path], object] = place) -> None:
                write_files(folder, victim.files)
                (folder / file).unlink()
                place(folder / file)

            yield f"{what} as {file}", make


ATTACKS.update(_place_attacks())


@attack
def shards_folder_that_is_a_link_in_a_circle(folder: Path, victim: Victim) -> None:
    _without_shards(folder, victim)
    (folder / layout.SHARD_DIRECTORY).symlink_to(layout.SHARD_DIRECTORY)


@attack
def shards_folder_that_is_a_link_to_the_root(folder: Path, victim: Victim) -> None:
    _without_shards(folder, victim)
    (folder / layout.SHARD_DIRECTORY).symlink_to("/")


@attack
def shards_folder_that_is_a_file(folder: Path, victim: Victim) -> None:
    _without_shards(folder, victim)
    (folder / layout.SHARD_DIRECTORY).write_bytes(b"x")


@attack
def sparse_gibibyte_that_the_manifest_promises(folder: Path, victim: Victim) -> None:
    manifest = json.loads(victim.files[layout.MANIFEST_FILE])
    manifest["shards"][0].update(bytes=1 << 30, raw_bytes=1 << 30)
    write_files(folder, {**victim.files, layout.MANIFEST_FILE: json.dumps(manifest).encode()})
    with (folder / SHARDS[0]).open("wb") as f:
        f.truncate(1 << 30)


@attack
def sparse_shard_as_large_as_one_may_be(folder: Path, victim: Victim) -> None:
    manifest = json.loads(victim.files[layout.MANIFEST_FILE])
    manifest["shards"][0].update(bytes=192 * MIB, raw_bytes=192 * MIB)
    write_files(folder, {**victim.files, layout.MANIFEST_FILE: json.dumps(manifest).encode()})
    with (folder / SHARDS[0]).open("wb") as f:
        f.truncate(192 * MIB)


# Parts ----------------------------------------------------------------------------------------------------------------


def zeros(start: bytes, size: int) -> bytes:
    """A frame of ``size`` bytes that begin with ``start`` and are zeros from there on, with size and checksum."""
    stream = zstandard.ZstdCompressor(level=1, write_checksum=True, write_content_size=True).compressobj(size=size)
    parts, left = [stream.compress(start)], size - len(start)
    while left:
        parts.append(stream.compress(_CHUNK[: min(left, MIB)]))
        left -= min(left, MIB)
    return b"".join([*parts, stream.flush()])


def promised_zeros(folder: Path, victim: Victim, size: int) -> None:
    """A shard of zeros with all hashes right, of exactly the tensors that plan and header state."""
    positions = size // 40
    shapes = {name: list(entry["shape"]) for name, entry in Forgery(victim, 0).header.items()}
    axes = {"row.": positions, "head": positions, "tail": positions // 4, "toke": positions, "sequ": positions // 16}
    for name, shape in shapes.items():
        shape[0 if name.startswith("sequence") else len(shape) - 1] = axes[name[:4]]
    counts = {"sequences": positions // 16, "tokens": positions, "positions": positions}
    _promised(folder, victim, counts, {n: (s, lambda start, stop: bytes(stop - start)) for n, s in shapes.items()})


def good_but_the_last(folder: Path, victim: Victim, size: int) -> None:
    """A shard that holds every invariant but that its last label is no number: what it costs to find that out.

    For the victim ``threshold_sampling``: 30 head entries a row, 16 rows a sequence.
    """
    sequences = size // (16 * 136)
    positions, tokens = 16 * sequences, 17 * sequences
    ids, flags = np.zeros(17, dtype=np.uint32), np.arange(17) > 0
    steps = np.tile(np.minimum(np.arange(30), 1), positions).astype(np.uint8)
    labels = np.zeros((2, positions), dtype=np.uint8)
    labels[1, -1] = 0x7E
    arrays: dict[str, Any] = {
        "sequence.length": np.full(sequences, 17, dtype="<u4"),
        "sequence.digest": np.tile(np.frombuffer(sequence_digest(ids, flags), dtype=np.uint8), (sequences, 1)),
        "token.id": np.zeros((2, tokens), dtype=np.uint8),
        "token.target": np.tile(flags.astype(np.uint8), sequences),
        "row.head": np.stack([np.full(positions, 30), np.zeros(positions)]).astype(np.uint8),
        "row.tail": np.zeros((2, positions), dtype=np.uint8),
        "row.rest": np.stack([np.zeros((2, positions)), np.full((2, positions), 128)]).astype(np.uint8),
        "row.label": labels,
        "head.id": np.stack([steps, np.zeros_like(steps)]),
        "head.value": np.zeros((2, len(steps)), dtype=np.uint8),
        "tail.id": np.zeros((2, 0), dtype=np.uint8),
        "tail.value": np.zeros((2, 0), dtype=np.uint8),
    }
    parts = {}
    for name, array in arrays.items():
        data = array.tobytes()
        parts[name] = (list(array.shape), lambda start, stop, data=data: data[start:stop])
    _promised(folder, victim, {"sequences": sequences, "tokens": tokens, "positions": positions}, parts)


Part = tuple[list[int], Callable[[int, int], bytes]]


def _promised(folder: Path, victim: Victim, counts: dict[str, int], parts: dict[str, Part]) -> None:
    """Seal a first shard of these tensors, made piece by piece: nothing here holds it whole."""
    plan = json.loads(victim.files[layout.PLAN_FILE])
    plan["shards"][0].update(counts)
    plan["data"]["splits"][0].update(counts)
    digest = parse_plan(json.dumps(plan).encode()).digest
    at, header, h = 0, {}, hashlib.sha256()
    for name, (shape, pieces) in sorted(parts.items()):
        dtype, length = ("U32", 4 * shape[0]) if name == "sequence.length" else ("U8", math.prod(shape))
        h.update(f"{name} {dtype} {','.join(map(str, shape))}\n".encode())
        for start in range(0, length, MIB):
            h.update(pieces(start, min(length, start + MIB)))
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + length]}
        at += length
    record = {"format": "kdcache", "version": 1, "plan": digest, "index": 0, "content": h.hexdigest()}
    text = json.dumps({"__metadata__": {"kdcache": json.dumps(record)}, **header}).encode()
    text += b" " * (-len(text) % 8)
    size = 8 + len(text) + at
    stream = zstandard.ZstdCompressor(level=1, write_checksum=True, write_content_size=True).compressobj(size=size)
    frame = [stream.compress(struct.pack("<Q", len(text)) + text)]
    for name, (_, pieces) in sorted(parts.items()):
        length = header[name]["data_offsets"][1] - header[name]["data_offsets"][0]
        frame += [stream.compress(pieces(start, min(length, start + MIB))) for start in range(0, length, MIB)]
    data = b"".join([*frame, stream.flush()])
    manifest = json.loads(victim.files[layout.MANIFEST_FILE])
    manifest["plan_digest"] = digest
    manifest["splits"][0].update(counts)
    manifest["shards"][0].update(
        sha256=hashlib.sha256(data).hexdigest(), bytes=len(data), raw_bytes=size, content_sha256=h.hexdigest(),
        entries=parts["head.id"][0][1] + parts["tail.id"][0][1],
    )  # fmt: skip
    files = {layout.PLAN_FILE: plan, layout.MANIFEST_FILE: manifest}
    write_files(folder, {**victim.files, **{n: json.dumps(v).encode() for n, v in files.items()}, SHARDS[0]: data})


def vocabulary(folder: Path, victim: Victim, text: bytes) -> None:
    """This vocabulary, its hash and its number of tokens in the plan, and the plan's digest everywhere."""

    def change(f: Forgery) -> None:
        f.plan["tokenizer"].update(
            fingerprint=hashlib.sha256(text).hexdigest(),
            vocab_size=min(layout.VOCAB_LIMIT, max(500, text.count(b",") + 1)),
        )
        f.files[layout.VOCABULARY_FILE] = compress(text)

    _forged(folder, victim, change)


def _forged(folder: Path, victim: Victim, change: Callable[[Forgery], object]) -> None:
    forgery = Forgery(victim, 0)
    change(forgery)
    write_files(folder, forgery.seal())


def _with_shard(folder: Path, victim: Victim, data: bytes, **fields: Any) -> None:
    """Another file as the first shard, which the manifest promises."""
    manifest = json.loads(victim.files[layout.MANIFEST_FILE])
    manifest["shards"][0].update(sha256=hashlib.sha256(data).hexdigest(), bytes=len(data), **fields)
    write_files(folder, {**victim.files, SHARDS[0]: data, layout.MANIFEST_FILE: json.dumps(manifest).encode()})


def _without_shards(folder: Path, victim: Victim) -> None:
    write_files(folder, victim.files)
    for name in SHARDS:
        (folder / name).unlink()
    (folder / layout.SHARD_DIRECTORY).rmdir()


def outcome(use: Callable[[Path], object], folder: Path) -> str:
    """Name of the error that a use of a cache ends in, or ``none``; an error that is not ours in capitals."""
    try:
        use(folder)
    except KdcacheError as exc:
        return type(exc).__name__
    except Exception as exc:
        return f"FOREIGN {type(exc).__name__} {exc}"[:200]
    return "none"


def read_whole(folder: Path) -> None:
    """Open a cache and read all of it, as training does."""
    cache = open_cache(folder)
    cache.vocabulary()
    for split in cache.splits.values():
        for sequence in split:
            sequence.rows.kept_mass()


def verify_whole(folder: Path) -> None:
    """What ``kdcache verify`` does; findings are an error."""
    findings = verify(folder)
    if findings:
        raise CorruptCacheError(findings[0].problem)


USES = (read_whole, verify_whole)
