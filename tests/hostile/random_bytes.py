"""Random changes of bytes that a hash covers. Whatever they hit: an error of ours, or exactly the old content."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

import zstandard

from kdcache.cache import layout
from kdcache.cache.reader import open_cache
from kdcache.cache.shard import compress
from kdcache.errors import KdcacheError
from tests.hostile.victims import FILES, SHARDS, Victim, seen

# How deep a change reaches: with a restated manifest the file's own hash no longer catches it, and recompressed neither
# does the frame's checksum.
KINDS = {
    "shard file": 0.3,
    "shard file, its hash in the manifest made right": 0.2,
    "bytes inside a shard, frame and manifest made right": 0.2,
    layout.PLAN_FILE: 0.12,
    layout.MANIFEST_FILE: 0.12,
    layout.VOCABULARY_FILE: 0.06,
}


def attack(victims: list[Victim], directories: dict[str, Path], index: int) -> tuple[str, str]:
    """Case number ``index``: change one file, read, put it back.

    Returns:
        Its kind, and ``refused``, ``no difference`` or ``SILENT DIFFERENCE``.
    """
    draw = random.Random(index)
    victim = draw.choice(victims)
    directory = directories[victim.name]
    kind = draw.choices(list(KINDS), list(KINDS.values()))[0]
    file = kind if kind in FILES else draw.choice(SHARDS)
    manifest = victim.files[layout.MANIFEST_FILE]
    if kind.startswith("bytes"):
        raw = zstandard.ZstdDecompressor().decompress(victim.files[file])
        inside = damaged(raw, draw)
        data = compress(inside)
        manifest = restated(manifest, file, data, raw_bytes=len(inside))
    else:
        data = damaged(victim.files[file], draw)
        if kind.endswith("made right"):
            manifest = restated(manifest, file, data)
    restored = {file} if manifest == victim.files[layout.MANIFEST_FILE] else {file, layout.MANIFEST_FILE}
    try:
        if layout.MANIFEST_FILE in restored:
            (directory / layout.MANIFEST_FILE).write_bytes(manifest)
        (directory / file).write_bytes(data)
        return kind, _outcome(directory, file, victim)
    finally:
        for name in restored:
            (directory / name).write_bytes(victim.files[name])


def damaged(data: bytes, draw: random.Random) -> bytes:
    """Another byte string: one to three changes of the kinds that disks, networks and editors make."""
    changed = bytearray(data)
    while changed == data:
        for _ in range(draw.choice((1, 1, 1, 2, 3))):
            _damage(changed, draw)
    return bytes(changed)


def restated(manifest: bytes, file: str, data: bytes, **fields: object) -> bytes:
    """The manifest with the size and hash of a changed shard file."""
    value = json.loads(manifest)
    value["shards"][SHARDS.index(file)].update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest(), **fields)
    return json.dumps(value).encode()


def _damage(data: bytearray, draw: random.Random) -> None:
    place = draw.randrange(len(data)) if data else 0
    span = slice(place, place + draw.choice((1, 1, 2, 4, 8, 16, 64)))
    how = draw.randrange(8) if data else 7
    if how <= 1:
        data[place] ^= 1 << draw.randrange(8)
    elif how == 2:
        data[place] = draw.choice((0, 1, 0x7F, 0x80, 0xFF, draw.randrange(256)))
    elif how == 3:
        del data[span]
    elif how == 4:
        data[place:place] = data[span]
    elif how == 5:
        del data[place:]
    elif how == 6:
        data[span] = bytes(len(data[span]))
    else:
        data[place:place] = draw.randbytes(draw.choice((1, 1, 2, 8)))


def _outcome(directory: Path, file: str, victim: Victim) -> str:
    try:
        cache = open_cache(directory)
        # A changed manifest is another cache, with another id; what it leads to has to be the old content all the same.
        same = all(
            seen(cache, f) == victim.digests[f]
            for f in ((*SHARDS, layout.PLAN_FILE) if file.endswith(".json") else (file,))
        )
        if file == layout.MANIFEST_FILE:
            same = same and cache.id != victim.digests[file]
    except KdcacheError:
        return "refused"
    return "no difference" if same else "SILENT DIFFERENCE"
