"""The receiving side: which cache lies at a place, and its objects brought into a directory, each checked.

Plan and manifest come first, into memory, bounded and strictly parsed; everything else is held against them. The
manifest is written last, so an interrupted pull is an incomplete cache, and what it has is not fetched again.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from kdcache.cache import layout
from kdcache.cache.directory import check_vocabulary, decode_shard, shard_path
from kdcache.cache.files import make_directory, write_file
from kdcache.cache.manifest import Manifest, Plan, ShardEntry, parse_manifest, parse_plan
from kdcache.cache.remote import Location
from kdcache.cache.shard import read_file
from kdcache.cache.transfer import Transfer, match, refuse_full_disk
from kdcache.errors import CacheError, CorruptCacheError, DamagedObjectError, StorageError, TransferError

_NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS}
_SCRATCH = f"{layout.TEMPORARY_PREFIX}pull"
OWN_NAMES = {
    layout.PLAN_FILE,
    layout.VOCABULARY_FILE,
    layout.SHARD_DIRECTORY,
    layout.CARD_FILE,
    layout.MANIFEST_FILE,
}


@dataclass(frozen=True)
class Moved:
    """What a transfer came to: the cache's id, objects and bytes moved, and objects that were there already."""

    cache_id: str
    objects: int
    bytes: int
    kept: int


@dataclass(frozen=True)
class Head:
    """Plan and manifest of a remote cache, parsed, and the bytes they came as."""

    plan_bytes: bytes
    manifest_bytes: bytes
    plan: Plan
    manifest: Manifest

    @property
    def cache_id(self) -> str:
        """Hex SHA-256 of the manifest."""
        return hashlib.sha256(self.manifest_bytes).hexdigest()

    @property
    def size(self) -> int:
        """Bytes of the cache without vocabulary and data card, whose sizes the manifest does not state."""
        return len(self.plan_bytes) + len(self.manifest_bytes) + sum(s.bytes for s in self.manifest.shards)


def foreign_names(found: Iterable[str]) -> list[str]:
    """Of the names at a place, those that pushing there must not touch: a README alone is no data card but somebody's."""
    names = set(found)
    own = OWN_NAMES if layout.SHARD_DIRECTORY in names else OWN_NAMES - {layout.CARD_FILE}
    return sorted(names - own)


def shard_object(index: int) -> str:
    """Where shard ``index`` lies, from the cache's root."""
    return f"{layout.SHARD_DIRECTORY}/{layout.shard_name(index)}"


def read_head(transfer: Transfer, location: Location) -> Head:
    """Plan and manifest of a remote cache, strictly parsed; they are the only objects whose hashes nobody states.

    Raises:
        TransferError: missing, unreachable, damaged, or another cache than the pinned one.
    """

    def once() -> Head:
        manifest_bytes = transfer.read(layout.MANIFEST_FILE)
        plan_bytes = transfer.read(layout.PLAN_FILE)
        try:
            plan = parse_plan(plan_bytes)
            return Head(plan_bytes, manifest_bytes, plan, parse_manifest(manifest_bytes, plan))
        except CorruptCacheError as exc:
            raise DamagedObjectError(
                f"{location} has no good plan and manifest: {exc}; if it is being replaced, try again later"
            ) from exc

    try:
        # Each object is tried again where it does not arrive; here both, where they do not fit together.
        head = transfer.attempt(layout.MANIFEST_FILE, once)
    except TransferError as exc:
        if isinstance(exc.__cause__, FileNotFoundError):
            raise TransferError(
                f"there is no complete cache at {location}: {exc.__cause__ or exc}; check the address, or let its "
                "owner's kdcache push finish"
            ) from exc
        raise
    if location.pin and not head.cache_id.startswith(location.pin):
        raise TransferError(
            f"{location} holds the cache {head.cache_id[:12]}, pinned is {location.pin}; "
            "take the other one by leaving the pin out, or ask its owner for the pinned one"
        )
    return head


def pull_into(directory: Path, transfer: Transfer, head: Head, *, workers: int) -> Moved:
    """Bring the cache that ``head`` describes into a directory; the body of `pull`.

    Raises:
        TransferError, CacheError, StorageError: as `pull`.
    """
    refuse_other_cache(directory, head)
    # Shards are what takes the room; those that are there take no more of it.
    wanted = sum(e.bytes for i, e in enumerate(head.manifest.shards) if not shard_path(directory, i).exists())
    refuse_full_disk(directory, wanted)
    shards = directory / layout.SHARD_DIRECTORY
    make_directory(shards)
    with _scratch(directory) as scratch:
        return _bring_all(directory, scratch, transfer, head, workers=workers)


def fetch_shard(transfer: Transfer, path: Path, entry: ShardEntry, index: int, *, scratch: Path) -> None:
    """Bring shard ``index`` to ``path``, held against its manifest entry; ``scratch`` is a folder of the same disk.

    Raises:
        DamagedObjectError, TransferError, StorageError: as `Transfer.fetch`.
    """
    limit, check = min(entry.bytes, layout.SHARD_LIMIT), partial(match, size=entry.bytes, sha256=entry.sha256)
    transfer.fetch(shard_object(index), path, scratch=scratch, limit=limit, check=check)


def _bring_all(directory: Path, scratch: Path, transfer: Transfer, head: Head, *, workers: int) -> Moved:
    if not (directory / layout.PLAN_FILE).exists():
        write_file(directory / layout.PLAN_FILE, head.plan_bytes)
    moved: list[int] = []

    def bring_shard(index: int) -> None:
        entry, path = head.manifest.shards[index], shard_path(directory, index)
        if _is_good(path, partial(match, size=entry.bytes, sha256=entry.sha256)):
            transfer.meter.add(entry.bytes)
            return
        _refuse_other_shard(path, head.plan, index)
        fetch_shard(transfer, path, entry, index, scratch=scratch)
        moved.append(entry.bytes)

    try:
        # The vocabulary first: it is small and tells a wrong address from a right one.
        _bring_vocabulary(directory, scratch, transfer, head.plan, moved)
        _bring_card(directory, scratch, transfer, moved)
        transfer.meter.begin("pull", sum(entry.bytes for entry in head.manifest.shards))
        transfer.in_parallel((partial(bring_shard, i) for i in range(len(head.plan.shards))), workers=workers)
    except DamagedObjectError as exc:
        raise _changed_or_damaged(transfer, head, exc) from exc
    finally:
        transfer.meter.end()
    if not (directory / layout.MANIFEST_FILE).exists():
        write_file(directory / layout.MANIFEST_FILE, head.manifest_bytes)
        moved.append(len(head.manifest_bytes))
    return Moved(head.cache_id, len(moved), sum(moved), len(head.plan.shards) + 3 - len(moved))


def refuse_other_cache(directory: Path, head: Head) -> None:
    """A directory may hold parts of one cache and nothing else.

    Raises:
        CacheError: another cache, or other files.
        StorageError: it cannot be read.
    """
    if not directory.exists():
        return
    try:
        found = {p.name for p in directory.iterdir() if not p.name.startswith(layout.TEMPORARY_PREFIX)}
    except OSError as exc:
        raise StorageError(f"cannot read the directory {directory}: {exc.strerror}") from exc
    if foreign := sorted(found - OWN_NAMES):
        raise CacheError(f"{directory} holds {', '.join(foreign[:4])}, which no cache does; give an empty directory")
    if found and layout.PLAN_FILE not in found:
        raise CacheError(f"{directory} holds {', '.join(sorted(found))} and no plan; give an empty directory")
    for name, data in ((layout.PLAN_FILE, head.plan_bytes), (layout.MANIFEST_FILE, head.manifest_bytes)):
        if name in found and read_file(directory / name, limit=layout.JSON_LIMIT) != data:
            raise CacheError(
                f"{directory} holds another cache than {head.cache_id[:12]} (its {name} differs); give another directory"
            )


def _refuse_other_shard(path: Path, plan: Plan, index: int) -> None:
    """A damaged shard is fetched again; a good one with other content is somebody's work."""
    if not path.exists():
        return
    try:
        decode_shard(path, read_file(path, limit=layout.SHARD_LIMIT), plan, index)
    except CorruptCacheError:
        return
    raise CacheError(
        f"{path} is a good shard of this plan with other content than the remote cache's (made by another teacher run?); "
        "give another directory, or remove the shard"
    )


def _is_good(path: Path, check: Callable[[Path], None]) -> bool:
    try:
        if not path.is_file():
            return False
        check(path)
    except CorruptCacheError:
        return False
    except OSError as exc:
        raise StorageError(f"cannot read {path}: {exc.strerror}") from exc
    return True


def _bring_vocabulary(directory: Path, scratch: Path, transfer: Transfer, plan: Plan, moved: list[int]) -> None:
    path, limit = directory / layout.VOCABULARY_FILE, layout.VOCABULARY_LIMIT

    def check(arrived: Path) -> None:
        check_vocabulary(read_file(arrived, limit=limit), plan)

    if not _is_good(path, check):
        transfer.fetch(layout.VOCABULARY_FILE, path, scratch=scratch, limit=limit, check=check)
        moved.append(path.stat().st_size)


def _bring_card(directory: Path, scratch: Path, transfer: Transfer, moved: list[int]) -> None:
    """The data card, which people edit and no hash covers: two reads have to agree with each other and the stated size."""
    stated = transfer.size(layout.CARD_FILE)
    if stated is None or (directory / layout.CARD_FILE).exists():
        return

    def check(path: Path) -> None:
        data = path.read_bytes()
        if stated >= 0 and len(data) != stated:
            raise CorruptCacheError(f"expected {stated} bytes, found {len(data)}")
        if transfer.read(layout.CARD_FILE) != data:
            raise CorruptCacheError("two reads differ")

    transfer.fetch(
        layout.CARD_FILE, directory / layout.CARD_FILE, scratch=scratch, limit=layout.JSON_LIMIT, check=check
    )
    moved.append((directory / layout.CARD_FILE).stat().st_size)


def _changed_or_damaged(transfer: Transfer, head: Head, exc: DamagedObjectError) -> TransferError:
    """What an object with other bytes than promised means: the manifest is asked for once more."""
    try:
        now = transfer.find(layout.MANIFEST_FILE)
    except TransferError:
        return exc
    if now != head.manifest_bytes:
        return TransferError(
            f"{transfer.place} changed while it was pulled: the cache {head.cache_id[:12]} is being replaced ({exc}); "
            "pull again, into an empty directory"
        )
    return DamagedObjectError(
        f"{exc}, at each of {transfer.retry.attempts} tries; run the same command again, or have its owner repair it with "
        "kdcache push --overwrite"
    )


@contextmanager
def _scratch(directory: Path) -> Iterator[Path]:
    """A folder for what has not been checked; one pull at a time into a directory, so that what killed ones left can go.

    Raises:
        CacheError: another process is at it.
        StorageError: the disk refuses.
    """
    scratch = directory / _SCRATCH
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            raise CacheError(f"another process is pulling into {directory}; wait until it has finished") from exc
        except OSError as exc:
            if exc.errno not in _NO_LOCKS:
                raise StorageError(f"cannot lock {directory}: {exc.strerror}") from exc
            # Without locks two pulls can tread on each other's temporary files; what they rename is whole all the same.
        try:
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(exist_ok=True)
        except OSError as exc:
            raise StorageError(f"cannot make the directory {scratch}: {exc.strerror}") from exc
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    finally:
        os.close(descriptor)
