"""The folder of an export: made beside OUT, held by one process, gone on with after a stop, and renamed when it is whole.

``export.json`` in it says what is exported, and once it is finished which files it has. Nothing that no export made is removed.
"""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from kdcache.cache.files import write_file
from kdcache.errors import StorageError
from kdcache.progress import Progress

FORMAT, RECORD, CARD = "kdcache-export", "export.json", "README.md"
MERGED = "merged"
# Files up to this size are known by their SHA-256 as well: hashing the weights would take as long as writing them.
_HASHED_BYTES = 64 << 20
# What a form is made in.
_UNFINISHED = ("*.making", "*.partial", "*.partial.*")

Rows = dict[str, dict[str, Any]]


@contextmanager
def working_folder(beside: Path, identity: dict[str, Any], progress: Progress) -> Iterator[Rows]:
    """Hold the folder beside OUT; gives the rows that a stopped export of the same thing left.

    After an error the forms that are finished stay, and without any the folder goes.

    Raises:
        StorageError: it holds something else, another process holds it, or it cannot be written.
    """
    held = None
    try:
        _left(beside, identity)
        held = _held(beside)
        rows = _left(beside, identity)
        if rows is None:
            _empty(beside)
            rows = {}
        remember(beside, rows, identity)
    except OSError as exc:
        _release(held)
        raise StorageError(f"cannot write beside {beside}: {exc.strerror or exc}; give OUT another place") from exc
    except BaseException:
        _release(held)
        raise
    try:
        yield rows
    except (OSError, SafetensorError) as exc:
        _tidy(beside, progress)
        raise StorageError(
            f"cannot write the export {beside}: {getattr(exc, 'strerror', None) or exc}; look after the disk and run the same command again"
        ) from exc
    except Exception:
        _tidy(beside, progress)
        raise
    finally:
        _release(held)


def remember(beside: Path, rows: Rows, identity: dict[str, Any] | None = None) -> None:
    """Write down what is known of the forms so far."""
    state = identity if identity is not None else {k: v for k, v in (_state(beside) or {}).items() if k != "rows"}
    write_file(beside / RECORD, json.dumps({**state, "rows": rows}, indent=1).encode() + b"\n")


def record_finished(folder: Path, rows: Rows, identity: dict[str, Any]) -> None:
    """Write down that the export is finished, and the files it has."""
    values = {**identity, "finished": True, "rows": rows, "files": _listed(folder)}
    write_file(folder / RECORD, json.dumps(values, indent=1).encode() + b"\n")


def earlier(out: Path, identity: dict[str, Any], *, overwrite: bool) -> Rows | None:
    """Rows of the same export, finished in OUT and with all of its files; None where there is nothing, or what may be replaced.

    Raises:
        StorageError: something else is there, or a file is not as it was written.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    state = _state(out)
    if state is None:
        raise StorageError(f"{out} is there and holds something that is no export; give another OUT")
    if overwrite:
        return None
    if {k: state.get(k) for k in identity} != identity:
        raise StorageError(
            f"{out} holds another export (of another run, or other forms or options); give another OUT, or replace it with --overwrite"
        )
    if (fault := _fault(out, state)) is not None:
        raise StorageError(f"{out} holds this export, damaged: {fault}; replace it with --overwrite")
    rows: Rows = state["rows"]
    return rows


def put_in_place(beside: Path, out: Path, identity: dict[str, Any], *, overwrite: bool, progress: Progress) -> None:
    """Give the finished folder its name; an earlier export goes only when the new one is there, and what is not of it stays.

    Raises:
        StorageError: something else has come to be there.
    """
    earlier(out, identity, overwrite=overwrite)
    if not (out.is_dir() and any(out.iterdir())):
        beside.rename(out)
        return
    files = (_state(out) or {}).get("files")
    known = {*files, RECORD} if isinstance(files, dict) else None
    old = _free(out)
    out.rename(old)
    beside.rename(out)
    foreign = [] if known is None else sorted(_files(old) - known)
    if foreign:
        progress.warning(f"{old} stays: it has files that no export made ({', '.join(foreign[:4])})")
        for name in known or ():
            (old / name).unlink(missing_ok=True)
    else:
        shutil.rmtree(old, ignore_errors=True)


def _free(out: Path) -> Path:
    """A name beside OUT that nobody has."""
    names = (out.with_name(f"{out.name}.replaced{f'.{n}' if n else ''}") for n in itertools.count())
    return next(name for name in names if not os.path.lexists(name))


def _held(beside: Path) -> int | None:
    """Make the folder and lock it for this process; the lock leaves no file, and ends with the process.

    Raises:
        OSError: it cannot be made.
        StorageError: another process holds it.
    """
    beside.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(beside, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    busy = StorageError(
        f"another process is exporting to {beside.with_suffix('')}; wait for it, stop it, or give another OUT"
    )
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as exc:
        os.close(descriptor)
        raise busy from exc
    except OSError:  # a file system without locks on folders
        os.close(descriptor)
        return None
    # Its holder may have given it its final name in between.
    if not beside.is_dir() or not os.path.samestat(os.fstat(descriptor), beside.stat()):
        os.close(descriptor)
        raise busy
    return descriptor


def _release(held: int | None) -> None:
    if held is not None:
        os.close(held)


def _left(beside: Path, identity: dict[str, Any]) -> Rows | None:
    """Rows of a stopped export of the same thing; None where there is none.

    Raises:
        StorageError: the folder is somebody else's.
    """
    if not os.path.lexists(beside):
        return None
    state = None if beside.is_symlink() else _state(beside)
    if state is None:
        if beside.is_dir() and not beside.is_symlink() and not any(beside.iterdir()):
            return None
        raise StorageError(
            f"{beside}, where the export is made, is there and no stopped export; move it away, or give another OUT"
        )
    same = {k: state.get(k) for k in identity} == identity
    if state.get("finished"):
        if not same and _fault(beside, state) is None:
            raise StorageError(
                f"{beside}, where the export is made, holds a finished export; move it away, or give another OUT"
            )
        return None
    rows: Rows = state.get("rows", {})
    return {n: row for n, row in rows.items() if n == "run" or (beside / n).is_dir()} if same else None


def _tidy(beside: Path, progress: Progress) -> None:
    """After an error: keep the forms that are finished, or nothing."""
    rows = (_state(beside) or {}).get("rows", {})
    kept = [name for name in dict.fromkeys((*rows, MERGED)) if name != "run" and (beside / name).is_dir()]
    if not kept:
        shutil.rmtree(beside, ignore_errors=True)
        return
    for pattern in _UNFINISHED:
        for path in list(beside.glob(pattern)):
            shutil.rmtree(path, ignore_errors=True)
    progress.message(
        f"{beside} keeps what is finished ({', '.join(kept)}); the same command goes on with it, or remove it"
    )


def _empty(beside: Path) -> None:
    """Remove what a folder holds; what says that it is ours last."""
    for path in sorted(beside.iterdir(), key=lambda p: p.name == RECORD):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _state(folder: Path) -> dict[str, Any] | None:
    try:
        state = json.loads((folder / RECORD).read_text())
    except (OSError, ValueError):
        return None
    return state if isinstance(state, dict) and state.get("format") == FORMAT else None


def _files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() or path.is_symlink()}


def _listed(folder: Path) -> dict[str, dict[str, Any]]:
    return {name: _facts(folder / name) for name in sorted(_files(folder) - {RECORD})}


def _facts(path: Path) -> dict[str, Any]:
    """Size of a file, and its SHA-256 where it is cheap."""
    size = path.stat().st_size
    if size > _HASHED_BYTES:
        return {"bytes": size}
    return {"bytes": size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def _fault(folder: Path, state: dict[str, Any]) -> str | None:
    """What is wrong with a finished export, by its record; the card is for people to edit."""
    files, rows = state.get("files"), state.get("rows")
    if not state.get("finished") or not isinstance(files, dict) or not isinstance(rows, dict):
        return f"its {RECORD} does not say which files it has"
    for name, wanted in files.items():
        path = folder / name
        try:
            found = _facts(path)
        except OSError:
            return f"{name} is missing"
        if name != CARD and found != wanted:
            return f"{name} is not as it was written"
    return None
