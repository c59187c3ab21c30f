"""Caches by URL: brought into a bounded local store when they are first opened, and read from there.

``KDCACHE_HOME`` (default ``~/.cache/kdcache``) says where the store lies, ``KDCACHE_STORE_LIMIT`` (default ``20GiB``) how
much it may hold. What was opened longest ago goes first; nothing goes that a process has open, or that the store did not
bring itself.

Opening a URL again costs its manifest and plan, which tell whether it still holds the same cache. A URL that names one
cache for good (``#cache-id=HEX``, or ``@CACHE-ID`` and ``@COMMIT`` of a Hub repository) is not asked again at all, so it
also opens without a network. Any other is never answered from the store alone: what lies there may be out of date.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import time
import weakref
from dataclasses import dataclass
from pathlib import Path

from kdcache.cache import layout, reader
from kdcache.cache.directory import missing_shards, read_plan, read_vocabulary, shard_path
from kdcache.cache.files import write_file
from kdcache.cache.leases import Lease, Record, Shelf
from kdcache.cache.manifest import Manifest, parse_manifest
from kdcache.cache.pace import Retry
from kdcache.cache.receive import Head, fetch_shard, pull_into, read_head
from kdcache.cache.remote import Location, Place, is_url, parse_location
from kdcache.cache.shard import read_file
from kdcache.cache.transfer import Transfer
from kdcache.errors import CacheError, CorruptCacheError, StorageError, TransferError
from kdcache.progress import Progress, Silent

_HOME, _LIMIT = "KDCACHE_HOME", "KDCACHE_STORE_LIMIT"
_DEFAULT_LIMIT = "20GiB"
_UNITS = (
    {"": 1, "b": 1}
    | {f"{u}ib": 1024**n for n, u in enumerate("kmgt", 1)}
    | {f"{u}b": 1000**n for n, u in enumerate("kmgt", 1)}
)
_COMMIT = re.compile(r"@[0-9a-f]{40}(/|$)")
_WORKERS = 8
# Between the end of a download and its use another process may make room by removing it.
_TRIES = 5
_PAUSE = (0.02, 0.3)
# Objects whose size the manifest does not state, and what they may have at most.
_UNLISTED = {layout.VOCABULARY_FILE: layout.VOCABULARY_LIMIT, layout.CARD_FILE: layout.JSON_LIMIT}
# Leases of directories that commands work on: they are in use until the process ends.
_for_good: list[Lease] = []


def open_cache(url_or_directory: str | Path, *, keep: int = 8, progress: Progress | None = None) -> reader.Cache:
    """Open a complete cache; at most ``keep`` decoded shards stay in memory. A URL is brought into the store first.

    Raises:
        TransferError: the URL cannot be read, or its cache does not arrive as promised.
        IncompleteCacheError: a directory without manifest or with missing shards, all named.
        CorruptCacheError: plan or manifest are not what they should be. A stored shard that has been damaged since is
            fetched again once as it is read; this is raised if it is not to be had.
        CacheError: not a cache directory, or one that does not fit into the store.
    """
    location = parse_location(url_or_directory)
    if location.local:
        found = reader.open_cache(location.path, keep=keep)
        _refuse_unpinned(location, found.id)
        return found
    directory, lease = _stored(location, progress or Silent(), None)
    try:
        cache = reader.open_cache(directory, keep=keep)
    except BaseException:
        lease.release()
        raise
    weakref.finalize(cache, lease.release)
    cache.mend = Mender(location, directory, cache.manifest)
    return cache


def local_directory(
    url_or_directory: str | Path, *, progress: Progress | None = None, retry: Retry | None = None
) -> Path:
    """The directory of a cache: the one that is named, or, for a URL, the store's, kept until the process ends.

    Raises:
        TransferError: the URL cannot be read, or its cache does not arrive as promised.
        CacheError: it does not fit into the store.
    """
    location = parse_location(url_or_directory)
    if location.local:
        if location.pin:
            _refuse_unpinned(location, reader.open_cache(location.path, keep=1).id)
        return location.path
    directory, lease = _stored(location, progress or Silent(), retry)
    _for_good.append(lease)
    return directory


@dataclass(frozen=True)
class Mender:
    """Fetches a shard of a stored cache again. It holds no connection, so a cache takes it along into other processes."""

    location: Location
    directory: Path
    manifest: Manifest

    def __call__(self, index: int) -> None:
        """Put the shard that the manifest promises in place of the one that lies there.

        Raises:
            CorruptCacheError: the place does not have it, or cannot be reached.
            StorageError: this machine's disk refuses.
        """
        path = shard_path(self.directory, index)
        try:
            fetch_shard(Transfer(Place(self.location)), path, self.manifest.shards[index], index, scratch=path.parent)
        except TransferError as exc:
            raise CorruptCacheError(f"{path} is damaged, and a good one is not to be had from its URL: {exc}") from exc


def _refuse_unpinned(location: Location, cache_id: str) -> None:
    """A directory that a pin goes with holds that cache."""
    if not cache_id.startswith(location.pin):
        raise CacheError(f"{location} holds the cache {cache_id[:16]}, not {location.pin}")


def store_limit() -> int:
    """Bytes that the store may hold.

    Raises:
        StorageError: ``KDCACHE_STORE_LIMIT`` is no size.
    """
    text = os.environ.get(_LIMIT) or _DEFAULT_LIMIT
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text.lower())
    if found is None or found[2] not in _UNITS:
        raise StorageError(f"{_LIMIT} should be a number of bytes such as 20GiB, 500MB or 1000000, not {text!r}")
    return int(float(found[1]) * _UNITS[found[2]])


def store_home() -> Path:
    """Where stored caches lie."""
    home = os.environ.get(_HOME)
    if home and is_url(home):
        raise StorageError(f"{_HOME} should be a directory of this machine, found {home}")
    return (Path(home).expanduser().absolute() if home else Path.home() / ".cache" / "kdcache") / "store"


def _stored(location: Location, progress: Progress, retry: Retry | None) -> tuple[Path, Lease]:
    shelf = Shelf(store_home(), store_limit())
    if location.pin or (location.protocol == "hf" and _COMMIT.search(location.url)):
        for key, record in shelf.stored(location.url, location.pin):
            lease = _use(shelf, key, record, progress)
            if lease is not None:
                return shelf.directory(key), lease
    try:
        transfer = Transfer(Place(location), retry=retry, progress=progress)
        head = read_head(transfer, location)
    except TransferError as exc:
        if stored := shelf.stored(location.url, location.pin):
            raise TransferError(
                f"{exc}. A copy of the cache {stored[0][1].cache_id[:12]} is stored and may be out of date; to use it "
                f"without asking, write {location}#cache-id={stored[0][1].cache_id[:16]}"
            ) from exc
        raise
    key = shelf.key(location.url, head.cache_id)
    size = head.size + sum(_stated(transfer.size(name), limit) for name, limit in _UNLISTED.items())
    record = Record(url=str(location)[:4096], cache_id=head.cache_id, bytes=size, used=0.0)
    for _ in range(_TRIES):
        lease = _use(shelf, key, record, progress) or _bring(shelf, key, record, transfer, head, progress)
        if lease is not None:
            return shelf.directory(key), lease
    raise CacheError(
        f"{shelf.directory(key)}, where the store has the cache {head.cache_id[:12]}, is removed as often as it is brought "
        f"there, or damaged while it is in use; end what has it open, raise {_LIMIT}, or kdcache pull it into a directory"
    )


def _stated(size: int | None, limit: int) -> int:
    """Bytes to reckon with for an object of which only the other side says how large it is; more never arrive."""
    return 0 if size is None else size if 0 <= size <= limit else limit


def _use(shelf: Shelf, key: str, record: Record, progress: Progress) -> Lease | None:
    """A shared lock on a stored cache, if it is whole."""
    lease = shelf.lease(
        key,
        exclusive=False,
        on_wait=lambda: progress.message("waiting for the store: another process works on this cache"),
    )
    if not _is_whole(shelf.directory(key), record.cache_id):
        lease.release()
        return None
    shelf.touch(key, record)
    return lease


def _bring(shelf: Shelf, key: str, record: Record, transfer: Transfer, head: Head, progress: Progress) -> Lease | None:
    """Bring a cache into the store; None where it was removed again before it could be used, or cannot be mended now."""
    lease = shelf.idle(key)
    if lease is None:
        # Somebody is bringing it and is waited for; or it is in use, maybe in this process, which would wait for itself.
        if (lease := _use(shelf, key, record, progress)) is None:
            time.sleep(random.uniform(*_PAUSE))  # so that processes that look at the same time get out of step
        return lease
    try:
        directory = shelf.directory(key)
        if not _is_whole(directory, record.cache_id):
            shelf.admit(key, record)
            _clear_damage(directory, head)
            pull_into(directory, transfer, head, workers=_WORKERS)
        lease.share()
        if _is_whole(directory, record.cache_id):
            return lease
    except BaseException:
        lease.release()
        raise
    lease.release()
    return None


def _clear_damage(directory: Path, head: Head) -> None:
    """Plan and manifest of a stored copy that are not this cache's have rotted: nobody else writes there."""
    if not directory.exists():
        return
    plan, manifest = directory / layout.PLAN_FILE, directory / layout.MANIFEST_FILE
    if not _holds(manifest, head.cache_id):
        try:
            manifest.unlink(missing_ok=True)
        except OSError as exc:
            raise StorageError(f"cannot remove the damaged {manifest}: {exc.strerror}") from exc
    if not _holds(plan, hashlib.sha256(head.plan_bytes).hexdigest()):
        write_file(plan, head.plan_bytes)


def _is_whole(directory: Path, cache_id: str) -> bool:
    """Whether every file is there, the small ones unharmed; shards are checked when they are read, as in any cache."""
    manifest = directory / layout.MANIFEST_FILE
    try:
        if not _holds(manifest, cache_id):
            return False
        plan = read_plan(directory)
        parse_manifest(read_file(manifest, limit=layout.JSON_LIMIT), plan)
        read_vocabulary(directory, plan)
    except CacheError:
        return False
    return not missing_shards(directory, plan)


def _holds(path: Path, sha256: str) -> bool:
    """Whether a small file is there and unharmed."""
    try:
        return path.exists() and hashlib.sha256(read_file(path, limit=layout.JSON_LIMIT)).hexdigest() == sha256
    except CacheError:
        return False
