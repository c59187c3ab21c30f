"""Caches moved between machines: `push` sends one, `pull` brings one.

Names derive from plan and manifest alone, so a plain web server is enough to pull from. The manifest is what makes a
directory a complete cache: it is written last on either side, so an interrupted transfer is an incomplete cache that
the same call finishes. Objects that are already right are not moved again.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

from kdcache.cache import layout
from kdcache.cache.directory import read_vocabulary
from kdcache.cache.pace import Retry
from kdcache.cache.reader import Cache, open_cache
from kdcache.cache.receive import Moved, foreign_names, pull_into, read_head, shard_object
from kdcache.cache.remote import Place, parse_location
from kdcache.cache.shard import read_file
from kdcache.cache.transfer import Transfer
from kdcache.errors import CacheError, CorruptCacheError, TransferError
from kdcache.progress import Progress

_SHARD_NAME = re.compile(rf"(\d{{5,}}){re.escape(layout.SHARD_SUFFIX)}")


def push(
    source: str | Path,
    destination: str | Path,
    *,
    overwrite: bool = False,
    workers: int = 4,
    retry: Retry | None = None,
    progress: Progress | None = None,
) -> Moved:
    """Send a complete cache: shards first, the manifest last. The Hub has a function of its own, `hub.publish`.

    Every shard is held against the manifest as it is sent. Where the destination's manifest is ours byte for byte,
    sizes decide what is there; otherwise, and in a directory of this machine, objects of the right size are read back.

    Args:
        source: a cache directory.
        destination: a URL or directory.
        overwrite: replace another cache that lies there, or repair this one, trusting no size. The manifest that is
            there goes first, so no reader ever takes a mixture for a cache.
        workers: objects under way at once; each is held in memory.
        retry: how patient to be.
        progress: told of bytes.

    Raises:
        CacheError: the source is incomplete or damaged, or the destination holds something else.
        TransferError: the destination cannot be written.
    """
    location = parse_location(destination)
    if location.protocol in ("http", "https"):
        raise TransferError(f"{location} can only be pulled from; push to s3://, gs://, hf:// or a directory")
    cache = whole_cache(source)
    if location.local and location.path.resolve().is_relative_to(cache.directory.resolve()):
        raise CacheError(f"{location.path} is the cache itself or within it; give another directory")
    transfer = Transfer(Place(location), retry=retry, progress=progress)
    manifest = read_file(cache.directory / layout.MANIFEST_FILE, limit=layout.JSON_LIMIT)
    there = transfer.find(layout.MANIFEST_FILE)
    if not overwrite:
        _refuse_other_contents(transfer, cache, manifest, there)
    names = object_names(cache)
    sizes = [(cache.directory / name).stat().st_size for name in names]
    trusted = there == manifest and not overwrite and not location.local
    withdrawn = there is None
    one_at_a_time = threading.Lock()
    sent: list[int] = []

    def withdraw() -> None:
        """What is about to be changed is no complete cache any more, and must not look like one."""
        nonlocal withdrawn
        with one_at_a_time:
            if not withdrawn:
                transfer.remove(layout.MANIFEST_FILE)
                withdrawn = True

    def send(name: str) -> None:
        data = source_bytes(cache, name)
        believed = trusted and name != layout.CARD_FILE  # which people edit
        if transfer.size(name) != len(data) or not (believed or transfer.reads_back(name, data)):
            if name != layout.CARD_FILE:
                withdraw()
            transfer.upload(name, data)
            sent.append(len(data))
        transfer.meter.add(len(data))

    transfer.meter.begin("push", sum(sizes))
    try:
        if there != manifest:
            withdraw()
        shards = len(cache.plan.shards)
        transfer.in_parallel([partial(send, name) for name in names[:shards]], workers=workers)
        for name in names[shards:]:
            send(name)
        if overwrite:
            _remove_surplus(transfer, shards)
        if withdrawn:
            transfer.upload(layout.MANIFEST_FILE, manifest)
            sent.append(len(manifest))
    finally:
        transfer.meter.end()
    return Moved(cache.id, len(sent), sum(sent), len(names) + 1 - len(sent))


def pull(
    source: str | Path,
    destination: str | Path,
    *,
    cache_id: str | None = None,
    workers: int = 8,
    retry: Retry | None = None,
    progress: Progress | None = None,
) -> Moved:
    """Bring a cache into a directory, which is empty or holds a part of the same cache.

    Args:
        source: a URL, ``URL#cache-id=HEX``, or a directory.
        destination: a directory.
        cache_id: at least the first 12 hex digits of the cache that is wanted.
        workers: objects under way at once.
        retry: how patient to be.
        progress: told of bytes.

    Raises:
        TransferError: the source cannot be read, is not the wanted cache, or changed meanwhile.
        CacheError: the source is no cache, or the destination holds something else.
        StorageError: this machine's disk refuses.
    """
    target = parse_location(destination)
    if not target.local:
        raise TransferError(
            f"pull writes into a directory of this machine, not to {target}; push sends a cache elsewhere"
        )
    location = parse_location(source, cache_id)
    transfer = Transfer(Place(location), retry=retry, progress=progress)
    return pull_into(target.path, transfer, read_head(transfer, location), workers=workers)


def fetcher(source: str | Path, *, retry: Retry | None = None) -> Callable[[str, int], bytes]:
    """A function that gives a file of another copy, by its name in the cache and the bytes it may have at most.

    For ``kdcache repair``; nothing is checked but the size.

    Raises:
        TransferError: the source cannot be reached at all.
    """
    transfer = Transfer(Place(parse_location(source)), retry=retry)
    return lambda name, limit: transfer.read(name, limit=limit)


def whole_cache(directory: str | Path) -> Cache:
    """A complete local cache that may be sent.

    Raises:
        CacheError: incomplete, or its plan, manifest or vocabulary is damaged.
    """
    location = parse_location(directory)
    if not location.local:
        raise TransferError(
            f"push sends a directory of this machine, not {location}; kdcache pull brings that one here"
        )
    cache = open_cache(location.path, keep=1)
    read_vocabulary(cache.directory, cache.plan)
    return cache


def object_names(cache: Cache) -> list[str]:
    """The files of a cache in the order in which they are sent, without the manifest: shards first."""
    names = [*map(shard_object, range(len(cache.plan.shards))), layout.VOCABULARY_FILE]
    if (cache.directory / layout.CARD_FILE).exists():
        names.append(layout.CARD_FILE)
    return [*names, layout.PLAN_FILE]


def source_bytes(cache: Cache, name: str) -> bytes:
    """The bytes of a file that is to be sent; a shard's are held against the manifest.

    Raises:
        CorruptCacheError: missing, or damaged since it was made.
    """
    data = read_file(cache.directory / name, limit=layout.SHARD_LIMIT)
    found = _SHARD_NAME.fullmatch(name.rpartition("/")[2])
    if found is not None:
        entry = cache.manifest.shards[int(found[1])]
        if not entry.promises(data):
            raise CorruptCacheError(
                f"{cache.directory / name} is damaged: not the {entry.bytes} bytes with SHA-256 {entry.sha256[:12]}… of the "
                "manifest; nothing more is sent, see kdcache verify"
            )
    return data


def _refuse_other_contents(transfer: Transfer, cache: Cache, manifest: bytes, there: bytes | None) -> None:
    """Nothing of somebody else's is written over."""
    place = transfer.place
    if there is not None and there != manifest:
        raise CacheError(
            f"{place} holds another cache ({hashlib.sha256(there).hexdigest()[:12]}, not {cache.id[:12]}); "
            "push elsewhere, or replace it with --overwrite"
        )
    plan = transfer.find(layout.PLAN_FILE)
    if plan is not None and plan != read_file(cache.directory / layout.PLAN_FILE, limit=layout.JSON_LIMIT):
        raise CacheError(f"{place} holds another cache's plan; push elsewhere, or replace it with --overwrite")
    if plan is None and there is None:
        found = {n for n in transfer.attempt("", place.names) if not n.startswith(layout.TEMPORARY_PREFIX)}
        if foreign := foreign_names(found):
            raise CacheError(
                f"{place} is neither empty nor a cache (it holds {', '.join(foreign[:4])}); push elsewhere, "
                "or push there all the same with --overwrite"
            )


def _remove_surplus(transfer: Transfer, shards: int) -> None:
    """Shards of a replaced cache that had more of them."""
    for name in transfer.attempt(layout.SHARD_DIRECTORY, partial(transfer.place.names, layout.SHARD_DIRECTORY)):
        found = _SHARD_NAME.fullmatch(name)
        if found is not None and int(found[1]) >= shards:
            transfer.remove(f"{layout.SHARD_DIRECTORY}/{name}")
