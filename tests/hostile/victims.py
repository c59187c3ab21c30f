"""Tiny whole caches for attacks to change, one of every kind of content, and what a reader makes of them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kdcache.cache import layout
from kdcache.cache.codec import ShardContent
from kdcache.cache.reader import Cache

# Name -> how positions are selected, how values are stored, and whether some rows are left empty.
VICTIMS = {
    "threshold_sampling": ("threshold_sampling", "quantised", False),
    "top_k": ("top_k", "half", False),
    "threshold": ("threshold", "quantised", True),
    "random_sampling": ("random_sampling", "half", False),
    "ids_alone": ("ids_alone", "quantised", True),
}
SHARDS = tuple(f"{layout.SHARD_DIRECTORY}/{layout.shard_name(i)}" for i in range(2))
FILES = (layout.PLAN_FILE, layout.MANIFEST_FILE, layout.VOCABULARY_FILE, *SHARDS)


@dataclass(frozen=True)
class Victim:
    """A whole cache: its files' bytes, and hashes of what each of its parts decodes to."""

    name: str
    files: dict[str, bytes]
    digests: dict[str, str]


def make_victims(folder: Path) -> None:
    """Write every victim under its name: a train shard of two sequences, a validation shard of one."""
    from kdcache.cache.writer import CacheWriter
    from tests.cache.samples import TOKENS, sample_plan, sample_sequences, selection_plan

    for number, (name, (method, values, thinned)) in enumerate(VICTIMS.items()):
        contents = [sample_sequences(n, seed=7 * number + n, method=method) for n in (2, 1)]
        changes = {"positions": "entropy", "quantile": 0.3} if thinned else {}
        if thinned:
            first = contents[0]
            rows = first.rows.emptied(np.arange(len(first.rows)) % 3 != 1)
            contents[0] = ShardContent(first.lengths, first.token_ids, first.targets, rows)
        selection = selection_plan(method, values=values, **changes)
        writer = CacheWriter(folder / name, sample_plan(contents, selection=selection), TOKENS)
        for index, content in enumerate(contents):
            writer.commit(index, content)
        writer.finalise()


def load_victims(folder: Path) -> list[Victim]:
    """The victims that `make_victims` wrote."""
    from kdcache.cache.reader import open_cache

    victims = []
    for name in VICTIMS:
        cache = open_cache(folder / name)
        files = {file: (folder / name / file).read_bytes() for file in FILES}
        victims.append(Victim(name, files, {file: seen(cache, file) for file in FILES}))
    return victims


def write_files(directory: Path, files: dict[str, bytes]) -> None:
    """Lay a victim out as a directory."""
    (directory / layout.SHARD_DIRECTORY).mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (directory / name).write_bytes(data)


def seen(cache: Cache, file: str) -> str:
    """Hash of what a reader gets from one file of a cache: a decoded shard, the vocabulary, the plan, the cache's id."""
    if file in SHARDS:
        return content_digest(cache.load(SHARDS.index(file)))
    if file == layout.VOCABULARY_FILE:
        return hashlib.sha256(repr(cache.vocabulary()).encode()).hexdigest()
    return cache.id if file == layout.MANIFEST_FILE else cache.plan.digest


def content_digest(content: ShardContent) -> str:
    """Hash of every number of a decoded shard."""
    h, rows = hashlib.sha256(), content.rows
    for array in (
        content.lengths, content.token_ids, content.targets, rows.head, rows.tail, rows.head_ids, rows.head_logits,
        rows.tail_ids, rows.tail_logits, rows.rest, rows.label_log_prob, rows.head_counts, rows.tail_counts,
    ):  # fmt: skip
        h.update(b"none" if array is None else f"{array.dtype}{array.shape}".encode() + array.tobytes())
    return h.hexdigest()
