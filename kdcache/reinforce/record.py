"""The directory of a reinforcement: what it holds, when it may be gone on with, and its record.

::

    model/         the adapter and the tokenizer       reinforce.json   the record; there when it is finished
    reference/     the student after the cold start    log.csv          a line per step
    checkpoints/   what --resume goes on from          reward.png .svg  reward, length and KL over steps
    started.json   whose run this is                   result.md        held-out answers before and after

``reference`` holds an adapter, or of a student that was trained in full the whole model: then ``model`` is an adapter of it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from kdcache.cache.files import write_file
from kdcache.errors import StorageError, TrainingError
from kdcache.recipe_reinforce import ReinforceRecipe
from kdcache.reinforce_record import REFERENCE_FOLDER, REINFORCED_FORMAT, began_here, is_reinforcement, load_reinforced
from kdcache.run_directory import LOCK, DirectoryLock, refuse_other_settings, refuse_without_resume
from kdcache.run_record import (
    JUDGED_FILES,
    LOG_FILE,
    REINFORCED_FILE,
    STARTED_FILE,
    flat_keys,
    read_json,
)

PAGE_FILE, PLOT = "result.md", "reward"
# What may change between two sittings of one run.
_FREE = ("output", "training.save_steps", "training.keep_checkpoints", "training.report_to", "evaluation.batch_size")


class ReinforceRecord:
    """Paths of a reinforcement, and the rules for starting in a directory that is not empty."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.model, self.reference = path / "model", path / REFERENCE_FOLDER
        self.checkpoints, self.log = path / "checkpoints", path / LOG_FILE
        self._record, self._started = path / REINFORCED_FILE, path / STARTED_FILE
        self._lock = DirectoryLock(path)

    @staticmethod
    def is_in(path: Path) -> bool:
        """Whether a directory is that of a reinforcement, finished or not."""
        return is_reinforcement(path)

    def prepare(
        self, recipe: ReinforceRecipe, digest: str, base: str, *, resume: bool, overwrite: bool
    ) -> dict[str, Any] | None:
        """Refuse what must not be touched; nothing is changed. Returns the record when ``resume`` meets the finished run.

        Raises:
            TrainingError: the directory holds a run that neither flag allows to touch, another run, or something else.
        """
        found = sorted(p.name for p in self.path.iterdir() if p.name != LOCK) if self.path.is_dir() else []
        if found and not began_here(self.path):
            raise TrainingError(
                f"{self.path} holds something that is no reinforcement ({', '.join(found[:4])}); give the recipe key output another "
                "directory"
            )
        worked = self._record.exists() or self.reference.exists() or any(self.checkpoints.glob("checkpoint-*"))
        if not worked or overwrite:
            return None
        refuse_without_resume(self.path, resume=resume)
        refuse_other_settings(self.path, read_json(self._started), _identity(recipe, digest, base), _FREE)
        return load_reinforced(self.path) if self._record.exists() else None

    def begin(self, recipe: ReinforceRecipe, digest: str, base: str, *, anew: bool) -> None:
        """Make the directory, hold it against other processes, and forget an earlier run where ``anew`` says so.

        Raises:
            StorageError: it cannot be written.
            TrainingError: another process trains in it.
        """
        self._lock.hold()
        try:
            if anew:
                for folder in (self.model, self.reference, self.checkpoints):
                    shutil.rmtree(folder, ignore_errors=True)
                for name in (REINFORCED_FILE, LOG_FILE, PAGE_FILE, f"{PLOT}.png", f"{PLOT}.svg", *JUDGED_FILES):
                    (self.path / name).unlink(missing_ok=True)
        except OSError as exc:
            raise StorageError(f"cannot make the run directory {self.path}: {exc.strerror}") from exc
        write_file(self._started, json.dumps(_identity(recipe, digest, base), indent=1).encode() + b"\n")

    def release(self) -> None:
        """Others may train in the directory again."""
        self._lock.release()

    def finish(self, values: dict[str, Any]) -> dict[str, Any]:
        """Write the record, whose presence means that the run is finished; returns it."""
        values = {"format": REINFORCED_FORMAT, **values}
        write_file(self._record, json.dumps(values, indent=1).encode() + b"\n")
        return values


def _identity(recipe: ReinforceRecipe, digest: str, base: str) -> dict[str, Any]:
    return {**flat_keys(recipe.model_dump(mode="json")), "run digest": digest, "base": base}
