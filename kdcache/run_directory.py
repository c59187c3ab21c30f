"""What directories of trainings, sweeps and chains have in common: one process at a time, and what may be gone on with."""

from __future__ import annotations

import fcntl
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TextIO

from kdcache.errors import StorageError, TrainingError

LOCK = ".lock"


class DirectoryLock:
    """Holds a directory for this process: two trainings would write into each other.

    Args:
        path: the directory.
        work: what another process that holds it is doing there.
    """

    def __init__(self, path: Path, work: str = "training") -> None:
        self._path, self._work = path, work
        self._file: TextIO | None = None

    def hold(self) -> None:
        """Make the directory, and hold it until `release` or the end of the process.

        Raises:
            StorageError: it cannot be made.
            TrainingError: another process holds it.
        """
        if self._file is not None:
            return
        try:
            self._path.mkdir(parents=True, exist_ok=True)
            self._file = (self._path / LOCK).open("a")
        except OSError as exc:
            raise StorageError(f"cannot make the directory {self._path}: {exc.strerror}") from exc
        try:
            # Of this process alone: workers that outlive it for some seconds should not hold up who goes on.
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as exc:
            self.release()
            raise TrainingError(
                f"another process is {self._work} in {self._path}; wait for it, stop it (its workers too), or give the recipe key "
                "output another directory"
            ) from exc

    def release(self) -> None:
        """Others may train in the directory again."""
        if self._file is not None:
            self._file.close()
            self._file = None


def refuse_without_resume(path: Path, *, resume: bool) -> None:
    """A run that has come somewhere is only touched by who says so.

    Raises:
        TrainingError: not ``resume``.
    """
    if not resume:
        raise TrainingError(
            f"{path} holds an earlier run; go on with it by --resume, start over by --overwrite, or give the recipe key output "
            "another directory"
        )


def refuse_other_settings(path: Path, then: Mapping[str, Any], now: Mapping[str, Any], free: Collection[str]) -> None:
    """A run is gone on with by the settings that it began with.

    Args:
        path: the run directory.
        then: flat keys of the run that is there.
        now: those of the one that is asked for.
        free: keys that may change between two sittings.

    Raises:
        TrainingError: naming the keys that differ.
    """
    keys = sorted(k for k in now.keys() | then.keys() if now.get(k) != then.get(k) and k not in free)
    if keys:
        shown = "; ".join(f"{k} was {then.get(k)!r}, now {now.get(k)!r}" for k in keys[:6])
        raise TrainingError(
            f"{path} holds a run with other settings: {shown}. Put them back, start over (--overwrite of train-student and "
            "reinforce, or without the directory), or give the recipe key output another one"
        )
