"""What the store holds: a directory and a record for each cache, locks on what is in use, and what may go.

Only directories that a record of the store names are ever removed, and a record names nothing but itself: the directory
is called as the record is. A lock is shared while a cache is in use and exclusive while it is made or removed. Lock files
stay: a lock that is deleted can be held twice.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from kdcache.cache import layout
from kdcache.cache.files import make_directory, write_file
from kdcache.cache.manifest import Count, Sha256
from kdcache.cache.selection import Strict
from kdcache.cache.strict_json import readable
from kdcache.errors import CacheError, StorageError

_RECORD_LIMIT = 64 << 10
_KEY = re.compile(r"[0-9a-f]{32}")


class Record(Strict):
    """One stored cache: where it came from, its id, its bytes, and when it was last opened (seconds since 1970)."""

    format: Literal["kdcache-store"] = "kdcache-store"
    version: Literal[1] = 1
    url: Annotated[str, Field(max_length=4096)]
    cache_id: Sha256
    bytes: Count
    used: Annotated[float, Field(ge=0)]


class Lease:
    """A lock on a stored cache, held until `release` or the end of the process."""

    def __init__(self, path: Path, exclusive: bool, wait: bool) -> None:
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as exc:
            raise StorageError(f"cannot open {path}: {exc.strerror}; set KDCACHE_HOME to a directory of yours") from exc
        try:
            self._lock(exclusive, wait)
        except BaseException:
            os.close(self._descriptor)
            raise

    def share(self) -> None:
        """Make an exclusive lock a shared one; for a moment there is none."""
        self._lock(False, True)

    def release(self) -> None:
        """Let go; more than once does no harm."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _lock(self, exclusive: bool, wait: bool) -> None:
        mode = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
        try:
            fcntl.flock(self._descriptor, mode | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise
        except OSError as exc:
            raise StorageError(
                f"the store's file system knows no locks ({exc.strerror}); set KDCACHE_HOME to a directory on a local disk"
            ) from exc


class Shelf:
    """The store's directory with its records.

    Args:
        home: where the store lies.
        limit: bytes that all stored caches may have together.
    """

    def __init__(self, home: Path, limit: int) -> None:
        self.home = home
        self.limit = limit
        make_directory(home)

    @staticmethod
    def key(url: str, cache_id: str) -> str:
        """Name of a stored cache, which says nothing and is no path of a stranger's."""
        return hashlib.sha256(f"{url}\n{cache_id}".encode()).hexdigest()[:32]

    def directory(self, key: str) -> Path:
        """Where the cache lies."""
        return self.home / key

    def lease(self, key: str, *, exclusive: bool, on_wait: Callable[[], None]) -> Lease:
        """Lock a stored cache, waiting for whoever has it."""
        path = self.home / f"{key}.lock"
        try:
            return Lease(path, exclusive, wait=False)
        except BlockingIOError:
            on_wait()
            return Lease(path, exclusive, wait=True)

    def records(self) -> dict[str, Record]:
        """Everything that is stored, by key; what is no record of ours is not looked at."""
        found = {}
        for path in self.home.glob("*.json"):
            if _KEY.fullmatch(path.stem) and (record := _read(path)) is not None:
                found[path.stem] = record
        return found

    def stored(self, url: str, pin: str = "") -> list[tuple[str, Record]]:
        """Caches that came from a URL and whose id begins with ``pin``, the one used last first."""
        own = [
            (k, r) for k, r in self.records().items() if k == self.key(url, r.cache_id) and r.cache_id.startswith(pin)
        ]
        return sorted(own, key=lambda item: -item[1].used)

    def touch(self, key: str, record: Record) -> None:
        """Write a record with the present time."""
        current = record.model_copy(update={"used": time.time()})
        write_file(self.home / f"{key}.json", readable(current.model_dump(mode="json")))

    def admit(self, key: str, record: Record) -> None:
        """Make room for a cache and record it; the caller has its lock. Nothing is removed for one that does not fit.

        Raises:
            CacheError: it does not fit, whatever is removed.
        """
        if record.bytes > self.limit:
            raise self._no_room(record, "more than the limit of")
        with ExitStack() as held:
            held.callback(Lease(self.home / "store.lock", exclusive=True, wait=True).release)
            others = {k: r for k, r in self.records().items() if k != key}
            excess = sum(r.bytes for r in others.values()) + record.bytes - self.limit
            leaving = []
            for name in sorted(others, key=lambda k: others[k].used):
                if excess <= 0:
                    break
                if (lease := self.idle(name)) is not None:
                    held.callback(lease.release)
                    leaving.append(name)
                    excess -= others[name].bytes
            if excess > 0:
                raise self._no_room(record, f"{excess:,} too many, the others are in use; limit")
            for name in leaving:
                self._remove(name)
            self.touch(key, record)

    def _no_room(self, record: Record, why: str) -> CacheError:
        return CacheError(
            f"a cache of {record.bytes:,} bytes does not fit into the store {self.home} ({why} {self.limit:,} bytes); raise "
            "KDCACHE_STORE_LIMIT, or kdcache pull it into a directory"
        )

    def idle(self, key: str) -> Lease | None:
        """The exclusive lock of a stored cache that nobody uses; none of what the store did not make itself."""
        if self.directory(key).is_symlink():
            return None
        try:
            return Lease(self.home / f"{key}.lock", exclusive=True, wait=False)
        except BlockingIOError:
            return None

    def _remove(self, key: str) -> None:
        """Remove a stored cache; the caller has its lock."""
        directory = self.directory(key)
        try:
            # Without its manifest it is no complete cache, should this be interrupted.
            (directory / layout.MANIFEST_FILE).unlink(missing_ok=True)
            if directory.exists():
                shutil.rmtree(directory)
            (self.home / f"{key}.json").unlink(missing_ok=True)
        except OSError as exc:
            raise StorageError(f"cannot remove {directory} from the store: {exc.strerror}") from exc


def _read(path: Path) -> Record | None:
    try:
        if path.stat().st_size > _RECORD_LIMIT:
            return None
        return Record.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None
