"""The state of a sweep: what sweep.json says, and how its rows stand while they run.

The directory of a sweep holds sweep.json, leaderboard.md and a run directory for each row; one process at a time works in it.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdcache import __version__
from kdcache.cache.files import write_file
from kdcache.errors import StorageError, TrainingError
from kdcache.recipe import Recipe
from kdcache.run_directory import LOCK, DirectoryLock
from kdcache.sweep.rows import Row, base_values, factors
from kdcache.sweep_record import SWEEP_FILE, SWEEP_FORMAT, read_sweep

WAITING, RUNNING, FINISHED, FAILED, STOPPED = "waiting", "running", "finished", "failed", "stopped"
_PERPLEXITY = re.compile(r"perplexity ([0-9.]+[0-9])")
_OURS = {SWEEP_FILE, LOCK, "leaderboard.md", "search.log", "errors.log"}


@dataclass
class RowState:
    """A row and how it stands.

    ``seconds`` is the time of all its sittings; ``scores`` are those of run.json, of a finished row. What lies below ``live``
    is of a row at work alone: the task in hand, its units done and in all, its last note, and the last perplexity that was
    measured.
    """

    row: Row
    state: str = WAITING
    error: str | None = None
    seconds: float = 0.0
    scores: dict[str, dict[str, float]] | None = None
    pid: int | None = None
    task: str = ""
    done: int = 0
    total: int = 0
    note: str = ""
    perplexity: float | None = None
    since: float = 0.0  # of the task, monotonic
    started: float | None = None  # of the sitting, monotonic

    @property
    def name(self) -> str:
        """Of the row."""
        return self.row.name

    def begin(self, pid: int | None) -> None:
        """A process has taken it."""
        self.state, self.error, self.pid = RUNNING, None, pid
        self.task, self.done, self.total, self.note, self.perplexity = "starting", 0, 0, "", None
        self.started = self.since = time.monotonic()

    def leave(self, state: str, error: str | None = None) -> None:
        """No process has it any longer."""
        self.seconds, self.started = self.spent(), None
        self.state, self.error, self.pid, self.task = state, error, None, ""

    def hear(self, kind: str, content: list[Any]) -> None:
        """What its process tells of the work, as `kdcache.progress.Progress` has it."""
        if kind == "begin":
            self.task, self.total = content[0], content[1]
            self.done, self.note, self.since = 0, "", time.monotonic()
        elif kind == "advance":
            self.done, self.note = self.done + content[0], content[1] or self.note
        measured = _PERPLEXITY.search(content[-1]) if kind in ("advance", "message") else None
        if measured:
            self.perplexity = float(measured[1])

    def spent(self) -> float:
        """Seconds of all sittings, the present one with them."""
        return self.seconds + (0.0 if self.started is None else time.monotonic() - self.started)

    def eta(self) -> float | None:
        """Seconds that the task in hand will still take, at its present rate; None where nothing is done yet."""
        if not self.done or self.state != RUNNING:
            return None
        return (self.total - self.done) * (time.monotonic() - self.since) / self.done


@dataclass
class Board:
    """All rows of a sweep, in order, and the file that says so."""

    recipe: Recipe
    jobs: int
    rows: list[RowState] = field(default_factory=list)
    earlier_seconds: float = 0.0
    started: float = field(default_factory=time.monotonic)
    ended: float | None = None

    @property
    def path(self) -> Path:
        """The sweep's directory."""
        return Path(self.recipe.output)

    @property
    def seconds(self) -> float:
        """Wall clock of all sittings."""
        return self.earlier_seconds + (time.monotonic() if self.ended is None else self.ended) - self.started

    def __getitem__(self, name: str) -> RowState:
        return next(row for row in self.rows if row.name == name)

    def having(self, *states: str) -> list[RowState]:
        """Rows in any of these states."""
        return [row for row in self.rows if row.state in states]

    def write(self) -> None:
        """Write sweep.json.

        Raises:
            StorageError: it cannot be written.
        """
        values = {
            "format": SWEEP_FORMAT,
            "kdcache": __version__,
            "name": self.path.absolute().name,
            # What it leaves out stays out: a default that is written down would be a claim on the cache.
            "recipe": base_values(self.recipe),
            "factors": factors([state.row for state in self.rows]),
            "rows": [
                {
                    "name": s.name,
                    "changes": s.row.changes,
                    "directory": s.row.directory,
                    "state": s.state,
                    "error": s.error,
                    "seconds": round(s.spent(), 1),
                }
                for s in self.rows
            ],
            "seconds": round(self.seconds, 1),
            "jobs": self.jobs,
        }
        write_file(self.path / SWEEP_FILE, json.dumps(values, indent=1).encode() + b"\n")


@dataclass(frozen=True)
class Earlier:
    """What an earlier sitting left in sweep.json."""

    rows: list[dict[str, Any]]
    seconds: float

    def of(self, name: str) -> dict[str, Any] | None:
        """The row of this name."""
        return next((row for row in self.rows if row["name"] == name), None)


class SweepDirectory:
    """The rules for working in a directory that is not empty. Use as a context manager: it is held until the end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = DirectoryLock(path, "at work on the sweep")

    def __enter__(self) -> SweepDirectory:
        found = sorted(p.name for p in self.path.iterdir() if p.name != LOCK) if self.path.is_dir() else []
        if found and not (self.path / SWEEP_FILE).exists():
            raise TrainingError(
                f"{self.path} holds something that is no sweep ({', '.join(found[:4])}); give the recipe key output another "
                "directory"
            )
        self._lock.hold()
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def earlier(self) -> Earlier:
        """What sweep.json says, nothing where there is none.

        Raises:
            TrainingError: it is not readable, or of another format.
        """
        return read_earlier(self.path)

    def forget(self, directories: list[str]) -> None:
        """Remove the runs in these directories, the search and the record of the sweep; other things stay."""
        try:
            for name in directories:
                # Only what is a run, or the beginning of one.
                if (self.path / name / "started.json").exists():
                    shutil.rmtree(self.path / name)
            for name in _OURS - {LOCK}:
                (self.path / name).unlink(missing_ok=True)
        except OSError as exc:
            raise StorageError(f"cannot remove the earlier sweep in {self.path}: {exc.strerror}") from exc

    def note_failure(self, row: str, text: str) -> None:
        """Keep the traceback of an error that is none of ours in errors.log.

        Raises:
            StorageError: it cannot be written.
        """
        try:
            with (self.path / "errors.log").open("a") as f:
                f.write(f"row {row}, {time.strftime('%Y-%m-%d %H:%M:%S')}\n{text}\n")
        except OSError as exc:
            raise StorageError(f"cannot write {self.path / 'errors.log'}: {exc.strerror}") from exc


def read_earlier(path: Path) -> Earlier:
    """`SweepDirectory.earlier`, without holding the directory."""
    if not (path / SWEEP_FILE).exists():
        return Earlier([], 0.0)
    values = read_sweep(path)
    return Earlier(values["rows"], values["seconds"])
