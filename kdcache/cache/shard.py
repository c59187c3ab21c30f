"""Arrays <-> bytes <-> file.

A shard is one zstd frame around one safetensors file, so that ``zstd -d`` gives a file any tool opens.
One metadata key carries the commit record: format, version, plan digest, shard index and a content
hash over the raw tensors, which survives recompression.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.numpy
import zstandard

from kdcache.cache import layout
from kdcache.cache.codec import Arrays, expected_tensors
from kdcache.cache.files import FileState, file_state
from kdcache.cache.rows import RowDesign
from kdcache.cache.strict_json import parse_object
from kdcache.errors import CorruptCacheError, StorageError


@dataclass(frozen=True)
class ShardRecord:
    """What a shard says of itself: its plan, its index and the hash of its raw tensors (hex)."""

    plan_digest: str
    index: int
    content_sha256: str


def content_hash(arrays: Arrays) -> str:
    """SHA-256 over every tensor in name order: name, dtype, shape and little-endian bytes."""
    h = hashlib.sha256()
    for name in sorted(arrays):
        array = arrays[name]
        dtype = layout.SAFETENSORS_DTYPES[array.dtype.str]
        h.update(f"{name} {dtype} {','.join(map(str, array.shape))}\n".encode())
        h.update(np.ascontiguousarray(array).data)
    return h.hexdigest()


def pack(arrays: Arrays, *, plan_digest: str, index: int) -> bytes:
    """Bytes of a shard file. Equal arrays give equal bytes on the same zstd version."""
    record = {
        "format": layout.FORMAT,
        "version": layout.VERSION,
        "plan": plan_digest,
        "index": index,
        "content": content_hash(arrays),
    }
    metadata = {layout.METADATA_KEY: json.dumps(record, sort_keys=True, separators=(",", ":"))}
    return compress(safetensors.numpy.save(dict(arrays), metadata=metadata))


def unpack(
    data: bytes,
    *,
    sequences: int,
    tokens: int,
    positions: int,
    design: RowDesign,
    entries_limit: int,
    limit: int = layout.SHARD_LIMIT,
    verified: bool = False,
) -> tuple[Arrays, ShardRecord]:
    """Inverse of `pack`: parsed strictly, nothing believed before it is checked.

    ``verified`` leaves out the content hash, for bytes that have passed it before.

    Raises:
        CorruptCacheError: the frame, the header, a tensor's name, dtype or shape, or the content hash is wrong.
    """
    raw = decompress(data, limit=limit)
    header, record = _header(raw)
    head, tail = (_entries(header, name, entries_limit) for name in ("head.id", "tail.id"))
    expected = expected_tensors(
        sequences=sequences,
        tokens=tokens,
        positions=positions,
        head=head,
        tail=tail,
        design=design,
    )
    if set(header) != set(expected):
        raise CorruptCacheError(
            f"the header names tensors {sorted(set(header) ^ set(expected))} that should not be there or are missing"
        )
    for name, (dtype, axes) in expected.items():
        found = header[name]
        if not isinstance(found, dict) or set(found) != {"dtype", "shape", "data_offsets"}:
            raise CorruptCacheError(f"tensor {name} has an unknown header field")
        if found["dtype"] != dtype or found["shape"] != axes:
            raise CorruptCacheError(f"tensor {name} should be {dtype} {axes}, found {found['dtype']} {found['shape']}")
    try:
        arrays: Arrays = dict(safetensors.numpy.load(raw))
    except (safetensors.SafetensorError, ValueError, TypeError) as exc:
        raise CorruptCacheError(f"not a safetensors file: {exc}") from exc
    if not verified and content_hash(arrays) != record.content_sha256:
        raise CorruptCacheError("the content hash is not that of the tensors")
    return arrays, record


def compress(raw: bytes) -> bytes:
    """One zstd frame with content size and checksum, single-threaded so that bytes are reproducible."""
    return zstandard.ZstdCompressor(
        level=layout.ZSTD_LEVEL, write_checksum=True, write_content_size=True, threads=0
    ).compress(raw)


def part_sizes(arrays: Arrays) -> dict[str, int]:
    """Bytes of each part of ``layout.PARTS``, its tensors each compressed alone."""
    alone = {name: len(compress(array.tobytes())) for name, array in arrays.items()}
    return {part: sum(alone.get(name, 0) for name in names) for part, names in layout.PARTS.items()}


def decompress(data: bytes, *, limit: int) -> bytes:
    """Decode one frame after reading what it claims about itself.

    Raises:
        CorruptCacheError: not one whole frame with a stated size within ``limit``, a checksum, no dictionary
            and a window within the format's bound.
    """
    try:
        frame = zstandard.get_frame_parameters(data)
    except zstandard.ZstdError as exc:
        raise CorruptCacheError(f"not a zstd frame: {exc}") from exc
    if frame.content_size in (zstandard.CONTENTSIZE_UNKNOWN, zstandard.CONTENTSIZE_ERROR):
        raise CorruptCacheError("the zstd frame does not state its size")
    if frame.content_size > limit:
        raise CorruptCacheError(f"the zstd frame claims {frame.content_size} bytes, more than the limit of {limit}")
    if frame.content_size > unpacked_limit(data):
        raise CorruptCacheError(
            f"the zstd frame claims to unpack {len(data)} bytes into {frame.content_size}, "
            f"more than {layout.EXPANSION_LIMIT} times as many"
        )
    if not frame.has_checksum:
        raise CorruptCacheError("the zstd frame has no checksum")
    if frame.dict_id != 0 or frame.window_size > max(layout.ZSTD_WINDOW_LIMIT, frame.content_size):
        raise CorruptCacheError("the zstd frame wants a dictionary or too large a window")
    try:
        # One-shot: the streaming readers return short data from a truncated frame without a word.
        raw: bytes = zstandard.ZstdDecompressor().decompress(
            data, max_output_size=frame.content_size, allow_extra_data=False
        )
    except (zstandard.ZstdError, MemoryError) as exc:
        raise CorruptCacheError(f"the zstd frame is truncated or damaged: {exc}") from exc
    if len(raw) != frame.content_size:
        raise CorruptCacheError(f"the zstd frame holds {len(raw)} bytes and claims {frame.content_size}")
    return raw


def unpacked_limit(data: bytes) -> int:
    """Bytes that a frame of this size may hold: zeros pack 30,000 : 1, a teacher's distributions about 10 : 1."""
    return max(layout.EXPANSION_FLOOR, layout.EXPANSION_LIMIT * len(data))


def frame_size(data: bytes) -> int:
    """Bytes that a frame made by `compress` holds, as its header states."""
    size: int = zstandard.get_frame_parameters(data).content_size
    return size


def read_file(path: Path, *, limit: int) -> bytes:
    """All bytes of a regular file of at most ``limit`` bytes.

    Raises:
        CorruptCacheError: missing, not a regular file, a link out of its cache, or too large.
        StorageError: it cannot be read.
    """
    return read_stated(path, limit=limit)[0]


def read_stated(path: Path, *, limit: int) -> tuple[bytes, FileState]:
    """`read_file`, with the state of the file that was read, as `file_state` has it.

    Raises:
        CorruptCacheError: as `read_file`, or the file changed while it was read.
        StorageError: it cannot be read.
    """
    try:
        # What is opened is the file that was looked at: no link is followed from here on, and no pipe is waited for.
        descriptor = os.open(_inside(path), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise CorruptCacheError(f"{path} is not a regular file")
            if status.st_size > limit:
                raise CorruptCacheError(f"{path} has {status.st_size} bytes, more than the limit of {limit}")
            chunks, left = [], status.st_size + 1
            while left and (chunk := os.read(descriptor, left)):
                chunks.append(chunk)
                left -= len(chunk)
            after = os.fstat(descriptor)
        finally:
            os.close(descriptor)
    except FileNotFoundError as exc:
        raise CorruptCacheError(f"{path} is missing") from exc
    except RuntimeError as exc:
        raise CorruptCacheError(f"{path} is a link in a circle") from exc
    except OSError as exc:
        raise StorageError(f"cannot read {path}: {exc.strerror or exc}") from exc
    data, state = b"".join(chunks), file_state(status)
    if len(data) != status.st_size or file_state(after) != state:
        raise CorruptCacheError(f"{path} changed while it was read; let whatever writes it finish, then try again")
    return data, state


def _inside(path: Path) -> Path:
    """Where ``path`` really lies: in its cache, or among the blobs that a Hub snapshot's own links point to.

    Raises:
        CorruptCacheError: a link leads elsewhere.
    """
    root = path.parent.parent if path.parent.name == layout.SHARD_DIRECTORY else path.parent
    real, home = path.resolve(strict=True), root.resolve(strict=True)
    homes = [home]
    if root.absolute().parent.name == "snapshots":
        homes.append(root.absolute().parent.parent.resolve(strict=True) / "blobs")
    if not any(real.is_relative_to(h) for h in homes):
        raise CorruptCacheError(
            f"{path} is a link out of its cache, which is not followed; copy the file itself there (rsync -L, cp -L)"
        )
    return real


def _entries(header: dict[str, object], name: str, limit: int) -> int:
    """How many entries a tensor of ids claims to hold."""
    entry = header.get(name)
    shape = entry.get("shape") if isinstance(entry, dict) else None
    entries = shape[1] if isinstance(shape, list) and len(shape) == 2 else None
    if type(entries) is not int or not 0 <= entries <= limit:
        raise CorruptCacheError(f"the header's {name} should be two-dimensional with at most {limit} entries")
    return entries


def _header(raw: bytes) -> tuple[dict[str, object], ShardRecord]:
    size = int.from_bytes(raw[:8], "little")
    if len(raw) < 8 or size > layout.HEADER_LIMIT or 8 + size > len(raw):
        raise CorruptCacheError(f"the safetensors header claims {size} bytes (limit {layout.HEADER_LIMIT})")
    header = parse_object(raw[8 : 8 + size], what="the safetensors header")
    metadata = header.pop("__metadata__", None)
    if not isinstance(metadata, dict) or set(metadata) != {layout.METADATA_KEY}:
        raise CorruptCacheError(
            f"not a kdcache shard: the metadata should have exactly the key {layout.METADATA_KEY!r}"
        )
    record = parse_object(str(metadata[layout.METADATA_KEY]).encode("utf-8", "replace"), what="the shard record")
    if set(record) != {"format", "version", "plan", "index", "content"} or record["format"] != layout.FORMAT:
        raise CorruptCacheError("not a kdcache shard: unknown fields in the shard record")
    if type(record["version"]) is not int or record["version"] != layout.VERSION:
        raise CorruptCacheError(
            f"shard format version {record['version']}, this kdcache reads version {layout.VERSION}"
        )
    plan, index, content = record["plan"], record["index"], record["content"]
    if not isinstance(plan, str) or type(index) is not int or not isinstance(content, str):
        raise CorruptCacheError("not a kdcache shard: a field of the shard record has the wrong type")
    return header, ShardRecord(plan_digest=plan, index=index, content_sha256=content)
