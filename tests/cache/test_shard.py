"""A shard's bytes: reproducible, strict when read, atomic when written."""

import json
import os
import struct

import numpy as np
import pytest
import safetensors.numpy
import zstandard

from kdcache.cache import layout, shard
from kdcache.cache.codec import encode
from kdcache.cache.files import write_file
from kdcache.errors import CacheError, CorruptCacheError
from tests.cache.samples import SELECTIONS, sample_sequences


def packed(content):
    return shard.pack(encode(content, values="quantised"), plan_digest="a" * 64, index=4)


def counts(content):
    return {
        "sequences": len(content), "tokens": len(content.token_ids), "positions": len(content.rows),
        "design": content.rows.design, "entries_limit": content.rows.entries,
    }  # fmt: skip


CONTENT = sample_sequences(sequences=3)
PACKED, COUNTS = packed(CONTENT), counts(CONTENT)


def frame(raw, **options):
    options = {"write_checksum": True, "write_content_size": True, **options}
    return zstandard.ZstdCompressor(level=3, **options).compress(raw)


def with_header(change):
    """The shard again with its safetensors header changed."""
    raw = zstandard.ZstdDecompressor().decompress(PACKED)
    size = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + size])
    text = change(header)
    encoded = (text if isinstance(text, str) else json.dumps(header)).encode()
    return frame(struct.pack("<Q", len(encoded)) + encoded + raw[8 + size :])


@pytest.mark.parametrize("method", SELECTIONS)
def test_round_trip_and_equal_bytes(method):
    content = sample_sequences(sequences=3, method=method)
    arrays, record = shard.unpack(packed(content), **counts(content))
    assert record.index == 4
    assert record.plan_digest == "a" * 64
    written = encode(content, values="quantised")
    assert set(arrays) == set(written)
    for name, array in written.items():
        assert np.array_equal(arrays[name], array), name
        assert arrays[name].dtype == array.dtype, name
    assert packed(content) == packed(content)


@pytest.mark.parametrize("method", SELECTIONS)
def test_a_plain_safetensors_reader_opens_it(method):
    content = sample_sequences(sequences=3, method=method)
    tensors = safetensors.numpy.load(zstandard.ZstdDecompressor().decompress(packed(content)))
    left_out = {"row.tail_value"} if method != "ids_alone" else {"tail.value"}
    left_out |= {"head.count", "tail.count"} if method != "random_sampling" else set()
    assert set(tensors) == set(layout.TENSORS) - left_out


@pytest.mark.parametrize("method", SELECTIONS)
def test_a_shard_of_another_design_is_refused(method):
    content = sample_sequences(sequences=3, method=method)
    for other in set(SELECTIONS) - {method}:
        design = sample_sequences(sequences=3, method=other).rows.design
        if (design.draws, design.tail_logits) != (content.rows.design.draws, content.rows.design.tail_logits):
            with pytest.raises(CorruptCacheError):
                shard.unpack(packed(content), **{**counts(content), "design": design})


def test_more_entries_than_the_plan_allows_are_refused():
    largest = max(len(CONTENT.rows.head_ids), len(CONTENT.rows.tail_ids))
    shard.unpack(PACKED, **{**COUNTS, "entries_limit": largest})
    with pytest.raises(CorruptCacheError, match=f"at most {largest - 1} entries"):
        shard.unpack(PACKED, **{**COUNTS, "entries_limit": largest - 1})


def test_every_truncation_is_refused():
    for size in range(len(PACKED)):
        with pytest.raises(CorruptCacheError):
            shard.unpack(PACKED[:size], **COUNTS)


def test_every_flipped_byte_is_refused():
    for place in range(len(PACKED)):
        damaged = bytearray(PACKED)
        damaged[place] ^= 0x41
        with pytest.raises(CorruptCacheError):
            shard.unpack(bytes(damaged), **COUNTS)


def drop(header):
    del header["row.head"]


def add(header):
    header["extra"] = header["row.head"]


def huge(header):
    header["head.id"]["shape"] = [2, 2**63 - 1]


def negative(header):
    header["tail.id"]["shape"] = [2, -1]


def field(header):
    header["row.head"]["more"] = 1


def key(header):
    header["__metadata__"]["second"] = "x"


def version(header):
    record = json.loads(header["__metadata__"]["kdcache"])
    header["__metadata__"]["kdcache"] = json.dumps({**record, "version": 99})


def twice(header):
    return json.dumps(header).replace('"row.head"', '"row.head": 1, "row.head"', 1)


@pytest.mark.parametrize("change", [drop, add, huge, negative, field, key, version, twice], ids=lambda c: c.__name__)
def test_a_changed_header_is_refused(change):
    with pytest.raises(CorruptCacheError):
        shard.unpack(with_header(change), **COUNTS)


def test_a_changed_tensor_behind_good_checksums_is_refused():
    raw = bytearray(zstandard.ZstdDecompressor().decompress(PACKED))
    raw[-1] ^= 1
    with pytest.raises(CorruptCacheError, match="content hash"):
        shard.unpack(frame(bytes(raw)), **COUNTS)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not zstd at all",
        frame(b"x" * 100, write_checksum=False),
        zstandard.ZstdCompressor(write_checksum=True, write_content_size=False).compress(b"x" * 100),
        PACKED + b"trailing",
        PACKED + PACKED,
        # thirteen bytes that claim 2**40 bytes of content
        bytes.fromhex("28b52ffde4") + struct.pack("<Q", 1 << 40),
    ],
    ids=["empty", "foreign", "no checksum", "no size", "trailing", "two frames", "bomb"],
)
def test_a_frame_that_is_not_ours_is_refused(data):
    with pytest.raises(CorruptCacheError):
        shard.unpack(data, **COUNTS)


def test_files_respect_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        write_file(tmp_path / "file", b"x")
    finally:
        os.umask(old)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


def test_reading_refuses_what_is_not_a_regular_file(tmp_path):
    with pytest.raises(CorruptCacheError, match="missing"):
        shard.read_file(tmp_path / "none", limit=10)
    with pytest.raises(CorruptCacheError, match="regular file"):
        shard.read_file(tmp_path, limit=10)
    (tmp_path / "big").write_bytes(b"x" * 11)
    with pytest.raises(CacheError, match="limit"):
        shard.read_file(tmp_path / "big", limit=10)
