"""The directory of a reinforcement: what it holds, when it may be gone on with, and its record.

::

    model/         the adapter and the tokenizer       reinforce.json   the record; there when it is finished
    reference/     the student after the cold start    log.csv          a line per step
    checkpoints/   what --resume goes on from          reward.png .svg  reward, length and KL over steps
    started.json   whose run this is                   result.md        held-out answers before and after

``reference`` holds an adapter, or of a student that was trained in full the whole model: then ``model`` is an adapter of it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any, TextIO

from kdcache.cache.files import write_file
from kdcache.errors import BrokenRunError, StorageError, TrainingError
from kdcache.recipe_reinforce import ReinforceRecipe
from kdcache.run_record import LOG_FILE, flat_keys, read_json

RECORD_FILE, PAGE_FILE, PLOT = "reinforce.json", "result.md", "reward"
_FORMAT = "kdcache-reinforce"
_STARTED, _LOCK = "started.json", ".lock"
# What may change between two sittings of one run.
_FREE = ("output", "training.save_steps", "training.keep_checkpoints", "training.report_to", "evaluation.batch_size")


class ReinforceRecord:
    """Paths of a reinforcement, and the rules for starting in a directory that is not empty."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.model, self.reference = path / "model", path / "reference"
        self.checkpoints, self.log = path / "checkpoints", path / LOG_FILE
        self._record, self._started = path / RECORD_FILE, path / _STARTED
        self._lock: TextIO | None = None

    @staticmethod
    def is_in(path: Path) -> bool:
        """Whether a directory is that of a reinforcement, finished or not."""
        return (path / RECORD_FILE).exists() or _is_ours(path / _STARTED)

    def prepare(self, recipe: ReinforceRecipe, digest: str, *, resume: bool, overwrite: bool) -> dict[str, Any] | None:
        """Refuse what must not be touched; nothing is changed. Returns the record when ``resume`` meets the finished run.

        Raises:
            TrainingError: the directory holds a run that neither flag allows to touch, another run, or something else.
        """
        found = sorted(p.name for p in self.path.iterdir() if p.name != _LOCK) if self.path.is_dir() else []
        if found and not _is_ours(self._started):
            raise TrainingError(
                f"{self.path} holds something that is no reinforcement ({', '.join(found[:4])}); give the recipe key output another "
                "directory"
            )
        worked = self._record.exists() or self.reference.exists() or any(self.checkpoints.glob("checkpoint-*"))
        if not worked or overwrite:
            return None
        if not resume:
            raise TrainingError(
                f"{self.path} holds an earlier run; go on with it by --resume, start over by --overwrite, or give the recipe key "
                "output another directory"
            )
        then, now = read_json(self._started), _identity(recipe, digest)
        keys = sorted(k for k in now.keys() | then.keys() if now.get(k) != then.get(k) and k not in _FREE)
        if keys:
            shown = "; ".join(f"{k} was {then.get(k)!r}, now {now.get(k)!r}" for k in keys[:6])
            raise TrainingError(
                f"{self.path} holds a run with other settings: {shown}. Put them back, start over by --overwrite, or give the "
                "recipe key output another directory"
            )
        return load_reinforced(self.path) if self._record.exists() else None

    def begin(self, recipe: ReinforceRecipe, digest: str, *, anew: bool) -> None:
        """Make the directory, hold it against other processes, and forget an earlier run where ``anew`` says so.

        Raises:
            StorageError: it cannot be written.
            TrainingError: another process trains in it.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._take()
            if anew:
                for folder in (self.model, self.reference, self.checkpoints):
                    shutil.rmtree(folder, ignore_errors=True)
                for name in (RECORD_FILE, LOG_FILE, PAGE_FILE, f"{PLOT}.png", f"{PLOT}.svg"):
                    (self.path / name).unlink(missing_ok=True)
        except OSError as exc:
            raise StorageError(f"cannot make the run directory {self.path}: {exc.strerror}") from exc
        write_file(self._started, json.dumps(_identity(recipe, digest), indent=1).encode() + b"\n")

    def _take(self) -> None:
        self._lock = (self.path / _LOCK).open("a")
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as exc:
            self.release()
            raise TrainingError(
                f"another process is training in {self.path}; wait for it, stop it, or give the recipe key output another directory"
            ) from exc

    def release(self) -> None:
        """Others may train in the directory again."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def finish(self, values: dict[str, Any]) -> dict[str, Any]:
        """Write the record, whose presence means that the run is finished; returns it."""
        values = {"format": _FORMAT, **values}
        write_file(self._record, json.dumps(values, indent=1).encode() + b"\n")
        return values


def load_reinforced(path: Path) -> dict[str, Any]:
    """The record of a finished reinforcement.

    Raises:
        TrainingError: it has not finished.
        BrokenRunError: the record is not readable, or not one of these.
    """
    file = path / RECORD_FILE
    try:
        values = read_json(file)
    except FileNotFoundError as exc:
        raise TrainingError(
            f"{path} holds a reinforcement that has not finished; finish it with kdcache reinforce --resume"
        ) from exc
    except (OSError, ValueError) as exc:
        raise BrokenRunError(f"{file} is not readable: {exc}; start over by --overwrite") from exc
    if not isinstance(values, dict) or values.get("format") != _FORMAT or "student" not in values:
        raise BrokenRunError(f"{file} is not the record of a reinforcement; start over by --overwrite")
    return values


def reinforced_digest(path: Path) -> str:
    """SHA-256 of the record in a directory."""
    return hashlib.sha256((path / RECORD_FILE).read_bytes()).hexdigest()


def _is_ours(started: Path) -> bool:
    try:
        return "run digest" in json.loads(started.read_bytes())
    except (OSError, ValueError, TypeError):
        return False


def _identity(recipe: ReinforceRecipe, digest: str) -> dict[str, Any]:
    return {**flat_keys(recipe.model_dump(mode="json")), "run digest": digest}
