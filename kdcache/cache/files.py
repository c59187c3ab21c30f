"""Bytes that appear under a name whole and durable, or not at all.

A file is written under a temporary name beside its final one, flushed to disk, closed, and then renamed, or linked where
nothing may be replaced; the directory is flushed last. A flush that failed is never tried again: after it the kernel
takes the pages for clean.

A temporary name says who writes it, so that what killed processes left is told from what others are writing now. Should
that ever go wrong, a writer whose temporary file is taken away writes it again: tidying up can cost work, never content.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from kdcache.cache import layout
from kdcache.errors import StorageError

FileState = tuple[int, int, int, int]

# Each other process that tidies up can take a temporary file away once.
_TRIES = 16
# Temporary files of other machines that nobody has written to for so long are left over.
_IDLE_SECONDS = 3600.0
_MARK = "~"
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
_NO_DIRECTORY_FLUSH = {errno.EINVAL, errno.EOPNOTSUPP}
_FULL = {errno.ENOSPC, errno.EDQUOT}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}
_being_written: set[str] = set()


def write_file(path: Path, data: bytes) -> FileState:
    """Put ``data`` at ``path``, replacing what is there; returns the state of the new file as `file_state` has it.

    Raises:
        StorageError: any step failed; the temporary file is gone and ``path`` is as it was, or, where only the flush
            of the directory failed, whole.
    """
    with _translated(path):
        return _publish(path, data, Path.rename)


def create_file(path: Path, data: bytes) -> FileState | None:
    """Put ``data`` at ``path`` unless something is there: then None. Of several processes one succeeds.

    Where the file system knows no links, two at the same moment may both succeed; the last one's bytes stay.

    Raises:
        StorageError: as `write_file`.
    """
    with _translated(path):
        try:
            return _publish(path, data, _link)
        except FileExistsError:
            return None


def file_state(status: os.stat_result) -> FileState:
    """Device, inode, size and time of modification (ns): equal for a file that nobody has written to since."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def make_directory(path: Path) -> None:
    """Make a directory and those above it, durably, where they are not there.

    Raises:
        StorageError: it cannot be made.
    """
    try:
        if not path.is_dir():
            make_directory(path.parent)
            path.mkdir(exist_ok=True)
            sync_directory(path.parent)
    except OSError as exc:
        raise StorageError(f"cannot make the directory {path}: {exc.strerror or exc}") from exc


def sync_directory(path: Path) -> None:
    """Make what has been renamed, linked or made in ``path`` durable, where the file system can."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as exc:
        if exc.errno not in _NO_DIRECTORY_FLUSH:
            raise
    finally:
        os.close(descriptor)


def flush(path: Path) -> None:
    """Have what a file or directory holds written through to the disk; errors are the system's own."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_left_over(directory: Path) -> None:
    """Remove temporary files whose writer is gone; what cannot be removed stays and does no harm."""
    for path in directory.glob(f"{layout.TEMPORARY_PREFIX}*"):
        with suppress(OSError):
            if _left_over(path):
                path.unlink()


def _publish(path: Path, data: bytes, commit: Callable[[Path, Path], object]) -> FileState:
    for left in reversed(range(_TRIES)):
        name = _MARK.join((layout.TEMPORARY_PREFIX + path.name, _place(), str(os.getpid()), secrets.token_hex(6)))
        temporary = path.with_name(name)
        _being_written.add(name)
        try:
            state = _written(temporary, data)
            try:
                commit(temporary, path)
            except FileNotFoundError:
                # Somebody took it for left over; a directory that is gone fails in the next try.
                if not left:
                    raise
                continue
        finally:
            # Gone after a rename. Whatever happens here must not hide what happened before.
            with suppress(OSError):
                temporary.unlink()
            _being_written.discard(name)
        break
    sync_directory(path.parent)
    return state


def _written(temporary: Path, data: bytes) -> FileState:
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        rest = memoryview(data)
        while rest:
            count = os.write(descriptor, rest)
            if count == 0:
                raise OSError(errno.EIO, "the disk takes no bytes")
            rest = rest[count:]
        os.fsync(descriptor)
        state = file_state(os.fstat(descriptor))
    except BaseException:
        with suppress(OSError):
            os.close(descriptor)
        raise
    # Network file systems report here what they could not write.
    os.close(descriptor)
    return state


def _link(temporary: Path, path: Path) -> None:
    """Give a file its final name, which must not be taken."""
    try:
        os.link(temporary, path)
    except OSError as exc:
        if exc.errno not in _NO_LINKS:
            raise
        if path.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from exc
        temporary.rename(path)


def _left_over(path: Path) -> bool:
    parts = path.name.rsplit(_MARK, 3)
    if len(parts) != 4 or not parts[2].isdecimal():
        return True
    _, place, writer, _ = parts
    if place != _place():
        # The clock decides about litter only: see the module's first lines.
        return time.time() - path.stat().st_mtime > _IDLE_SECONDS
    if int(writer) == os.getpid():
        return path.name not in _being_written
    try:
        os.kill(int(writer), 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        return False
    return False


@cache
def _place() -> str:
    """Where a process number means one process: a machine since it was started, and a namespace of numbers there."""
    parts = [os.uname().nodename]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        way_out = "look after the disk"
        if exc.errno in _FULL:
            way_out = "free some space"
        elif exc.errno in _FORBIDDEN:
            way_out = f"get write access to {path.parent}"
        raise StorageError(
            f"cannot write {path}: {exc.strerror or exc}; everything committed before is intact, {way_out} and run the "
            "same command again"
        ) from exc
