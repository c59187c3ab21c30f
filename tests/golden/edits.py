"""Edits to the files of a cache that leave every hash above the defect right, so that the defect itself is met."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import safetensors.numpy
import zstandard

from kdcache.cache import shard
from kdcache.cache.strict_json import canonical_sha256, readable

SHARD = "shards/{:05d}.safetensors.zst"
Json = dict[str, Any]


class Files:
    """Relative path -> bytes of one cache directory, and the ways to break it."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = dict(files)

    def json(self, name: str, change: Callable[[Json], object]) -> None:
        """Change a JSON file's value."""
        value = json.loads(self.files[name])
        change(value)
        self.files[name] = readable(value)

    def text(self, name: str, old: str, new: str) -> None:
        """Change a JSON file's text."""
        before = self.files[name].decode()
        assert before.count(old), old
        self.files[name] = before.replace(old, new, 1).encode()

    def raw(self, index: int = 0) -> bytes:
        """A shard without its frame."""
        return zstandard.ZstdDecompressor().decompress(self.files[SHARD.format(index)])

    def put(self, data: bytes, index: int = 0, **entry: object) -> None:
        """Replace a shard's file and what the manifest says of it."""
        self.files[SHARD.format(index)] = data
        stated = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data), **entry}
        self.json("manifest.json", lambda m: m["shards"][index].update(stated))

    def frame(self, change: Callable[[bytes], bytes], index: int = 0) -> None:
        """Change a shard's frame."""
        self.put(change(self.files[SHARD.format(index)]), index)

    def header(self, change: Callable[[Json], object], index: int = 0) -> None:
        """Change a shard's safetensors header; a change may return the header's text."""
        raw = self.raw(index)
        size = struct.unpack("<Q", raw[:8])[0]
        header = json.loads(raw[8 : 8 + size])
        text = change(header)
        encoded = (text if isinstance(text, str) else json.dumps(header)).encode()
        whole = struct.pack("<Q", len(encoded)) + encoded + raw[8 + size :]
        self.put(shard.compress(whole), index, raw_bytes=len(whole))

    def record(self, shard_number: int = 0, /, **changes: object) -> None:
        """Change fields of a shard's commit record."""

        def change(header: Json) -> None:
            record = json.loads(header["__metadata__"]["kdcache"])
            header["__metadata__"]["kdcache"] = json.dumps({**record, **changes})

        self.header(change, shard_number)

    def tensors(self, change: Callable[[dict[str, np.ndarray]], object], index: int = 0) -> None:
        """Change a shard's tensors."""
        raw = self.raw(index)
        size = struct.unpack("<Q", raw[:8])[0]
        record = json.loads(json.loads(raw[8 : 8 + size])["__metadata__"]["kdcache"])
        arrays = {name: np.array(array) for name, array in safetensors.numpy.load(raw).items()}
        change(arrays)
        data = shard.pack(arrays, plan_digest=record["plan"], index=record["index"])
        entries = arrays["head.id"].shape[1] + arrays["tail.id"].shape[1]
        self.put(
            data,
            index,
            content_sha256=shard.content_hash(arrays),
            raw_bytes=shard.frame_size(data),
            entries=entries,
        )

    def plan(self, change: Callable[[Json], object]) -> None:
        """Change the plan and stamp manifest and shards with its new digest."""
        self.json("plan.json", change)
        digest = canonical_sha256(json.loads(self.files["plan.json"]))
        self.json("manifest.json", lambda m: m.update(plan_digest=digest))
        for index in range(len([name for name in self.files if name.startswith("shards/")])):
            self.record(index, plan=digest)


def reframed(data: bytes, *, descriptor: int, extra: bytes) -> bytes:
    """A frame of less than 64 KiB again, with other optional fields in its header; the blocks stay as they are."""
    single_segment, size_flag = data[4] & 0x20, data[4] >> 6
    assert single_segment
    assert size_flag < 2
    length = 1 + size_flag
    size = int.from_bytes(data[5 : 5 + length], "little") + (256 if size_flag else 0)
    return data[:4] + bytes([descriptor]) + extra + struct.pack("<I", size) + data[5 + length :]
