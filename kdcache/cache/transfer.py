"""One object moved and checked: retried with growing, jittered waits; used only once its bytes are right.

What arrives goes under a temporary name onto the disk where it is to lie, is held to a size limit while it arrives,
checked, flushed and only then renamed. Whoever dies on the way leaves nothing under a final name.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from kdcache.cache import layout
from kdcache.cache.files import flush, sync_directory
from kdcache.cache.pace import Guard, Meter, Retry, StoppedError
from kdcache.cache.remote import Place, explain, worth_retrying
from kdcache.errors import CorruptCacheError, DamagedObjectError, StorageError, TransferError
from kdcache.progress import Progress

Result = TypeVar("Result")


class Transfer:
    """Moves the objects of one cache from or to one place.

    Args:
        place: the other side.
        retry: how patient to be.
        progress: told of bytes and of objects that had to be tried again.
    """

    def __init__(self, place: Place, *, retry: Retry | None = None, progress: Progress | None = None) -> None:
        self.place = place
        self.retry = retry or Retry()
        self.meter = Meter(progress)
        self._stop = threading.Event()

    def fetch(
        self, name: str, path: Path, *, scratch: Path, limit: int, check: Callable[[Path], None] | None = None
    ) -> None:
        """Bring an object of at most ``limit`` bytes to ``path``, where it only appears once ``check`` has passed.

        Until then it lies in ``scratch``, a directory of the same disk.

        Raises:
            DamagedObjectError: too large, or ``check`` raised CorruptCacheError, every time.
            TransferError: missing, refused, or not reached.
            StorageError: this machine's disk refuses.
        """
        self.attempt(name, lambda: self._fetch_once(name, path, scratch, limit, check))

    def read(self, name: str, *, limit: int = layout.JSON_LIMIT) -> bytes:
        """All bytes of a small object.

        Raises:
            DamagedObjectError: more than ``limit`` bytes.
            TransferError: missing, refused, or not reached.
        """
        with tempfile.TemporaryDirectory(prefix="kdcache-") as folder:
            path = Path(folder) / "object"
            self.fetch(name, path, scratch=Path(folder), limit=limit)
            return path.read_bytes()

    def find(self, name: str, *, limit: int = layout.JSON_LIMIT) -> bytes | None:
        """All bytes of a small object, or None where there is none.

        Raises:
            TransferError: refused, or not reached.
        """
        try:
            return self.read(name, limit=limit)
        except TransferError as exc:
            if isinstance(exc.__cause__, FileNotFoundError):
                return None
            raise

    def size(self, name: str) -> int | None:
        """Bytes of an object as the other side states them, or None where there is none.

        Raises:
            TransferError: refused, or not reached.
        """

        def ask() -> int | None:
            try:
                return self.place.size(name)
            except FileNotFoundError:
                return None

        return self.attempt(name, ask)

    def upload(self, name: str, data: bytes) -> None:
        """Write an object and see that the other side has as many bytes of it.

        Raises:
            DamagedObjectError: it never has.
            TransferError: refused, or not reached.
        """

        def once() -> None:
            self.place.upload(name, data)
            stated = self.place.size(name)
            if stated != len(data):
                raise DamagedObjectError(
                    f"{self.place}/{name} has {stated} bytes after {len(data)} were sent; run the same command again"
                )

        self.attempt(name, once)

    def reads_back(self, name: str, data: bytes) -> bool:
        """Whether an object has these very bytes: it is fetched and compared.

        An S3 ETag is no SHA-256 and differs between ways to upload, so it would tell nothing.

        Raises:
            TransferError: missing, refused, or not reached.
        """
        try:
            return self.read(name, limit=len(data)) == data
        except DamagedObjectError:
            return False

    def remove(self, name: str) -> None:
        """Delete an object, if it is there.

        Raises:
            TransferError: refused, or not reached.
        """

        def once() -> None:
            try:
                self.place.remove(name)
            except FileNotFoundError:
                return

        self.attempt(name, once)

    def attempt(self, name: str, action: Callable[[], Result]) -> Result:
        """Call ``action`` until it succeeds or nothing is left to hope for.

        Raises:
            KdcacheError: what the last attempt failed with, translated.
        """
        return persist(f"{self.place}/{name}", action, retry=self.retry, stop=self._stop)

    def in_parallel(self, actions: Iterable[Callable[[], None]], *, workers: int) -> None:
        """Run all actions in a few threads; the first failure stops the others, those under way too.

        Raises:
            KdcacheError: what failed first.
        """
        try:
            with ThreadPoolExecutor(max_workers=max(1, workers), thread_name_prefix="kdcache-transfer") as pool:
                try:
                    futures = [pool.submit(action) for action in actions]
                    done, _ = wait(futures, return_when=FIRST_EXCEPTION)
                    failed = [error for future in done if (error := future.exception()) is not None]
                    # What stopped is a consequence; the cause is what the user has to hear of.
                    for error in sorted(failed, key=lambda e: isinstance(e, StoppedError)):
                        raise error
                except BaseException:
                    self._stop.set()
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
        finally:
            self._stop.clear()

    def _fetch_once(
        self, name: str, path: Path, scratch: Path, limit: int, check: Callable[[Path], None] | None
    ) -> None:
        temporary = scratch / f"{layout.TEMPORARY_PREFIX}{path.name}-{secrets.token_hex(6)}"
        guard = Guard(f"{self.place}/{name}", limit, self.meter, self._stop)
        arrived = False
        try:
            with _on_disk(path):
                os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
            self.place.download(name, temporary, guard)
            if check is not None:
                check(temporary)
            with _on_disk(path):
                flush(temporary)
                temporary.rename(path)
                sync_directory(path.parent)
            arrived = True
        except CorruptCacheError as exc:
            raise DamagedObjectError(f"{self.place}/{name} is damaged: {exc}") from exc
        finally:
            temporary.unlink(missing_ok=True)
            if not arrived:
                self.meter.add(-guard.received)


def persist(what: str, action: Callable[[], Result], *, retry: Retry, stop: threading.Event | None = None) -> Result:
    """Call ``action`` until it succeeds or nothing is left to hope for.

    Raises:
        KdcacheError: what the last attempt failed with, translated.
    """
    stop = stop or threading.Event()
    failures = 0
    while True:
        if stop.is_set():
            raise StoppedError(f"{what} was not moved: the transfer has stopped")
        try:
            return action()
        except Exception as exc:
            failures += 1
            error = explain(exc, what)
            if isinstance(error, StorageError) or not worth_retrying(exc) or failures >= retry.attempts:
                if error is exc:
                    raise
                raise error from exc
            stop.wait(retry.pause(failures))


def match(path: Path, *, size: int, sha256: str) -> None:
    """See that a file has the bytes that a manifest promises.

    Raises:
        CorruptCacheError: another size or another hash.
    """
    found = path.stat().st_size
    if found != size:
        raise CorruptCacheError(f"expected {size} bytes, found {found}")
    with path.open("rb") as f:
        digest = hashlib.file_digest(f, "sha256").hexdigest()
    if digest != sha256:
        raise CorruptCacheError(f"expected SHA-256 {sha256[:12]}…, found {digest[:12]}…")


def refuse_full_disk(directory: Path, wanted: int) -> None:
    """See that ``wanted`` more bytes fit onto the disk of a directory, which need not be there yet.

    Raises:
        StorageError: they do not.
    """
    existing = next(p for p in (directory.absolute(), *directory.absolute().parents) if p.exists())
    with _on_disk(existing):
        free = shutil.disk_usage(existing).free
    if wanted > free:
        raise StorageError(
            f"{wanted:,} more bytes are to come into {directory}, its disk has {free:,} left; free some space, or take a "
            "directory on another disk (for what is opened by URL, by KDCACHE_HOME)"
        )


@contextmanager
def _on_disk(path: Path) -> Iterator[None]:
    """Errors of this machine's disk, told apart from those of the other side."""
    try:
        yield
    except OSError as exc:
        raise StorageError(
            f"cannot write {path}: {exc.strerror or exc}; what has arrived stays, run the same command again"
        ) from exc
