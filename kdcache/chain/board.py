"""How the stages of a chain stand: chain.json, and the rules for working in its directory.

The directory holds chain.json and, for every stage, ``STAGE/run``, ``STAGE/cache`` (but for the first) and
``STAGE/merged``; one process at a time works in it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdcache import __version__
from kdcache.cache.files import write_file
from kdcache.chain.stages import Stage
from kdcache.chain_record import CHAIN_FILE, CHAIN_FORMAT, PARTS, read_chain
from kdcache.errors import TrainingError
from kdcache.recipe import Recipe
from kdcache.run_directory import LOCK, DirectoryLock

WAITING, RUNNING, FINISHED, FAILED, STOPPED = "waiting", "running", "finished", "failed", "stopped"


@dataclass
class StageState:
    """A stage and how it stands; the fields are those of chain.json (`kdcache.chain_record.checked_stage`)."""

    stage: Stage
    state: str = WAITING
    error: str | None = None
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    cache_id: str | None = None
    cache_bytes: int | None = None
    run: str | None = None
    taught_by: str | None = None
    merged: str | None = None
    scores: dict[str, dict[str, float]] | None = None
    kl_to_first: float | None = None

    @property
    def name(self) -> str:
        """Of the stage."""
        return self.stage.name

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add what this takes to the seconds of a part, however it ends."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds[part] += time.monotonic() - started

    def as_record(self) -> dict[str, Any]:
        """What chain.json holds of it."""
        values = {key: value for key, value in vars(self).items() if key != "stage"}
        seconds = {part: round(spent, 1) for part, spent in self.seconds.items()}
        return {
            "name": self.name,
            "teacher": self.stage.teacher,
            "student": self.stage.student,
            **values,
            "seconds": seconds,
        }


@dataclass
class Board:
    """All stages in order, the direct way last, and the file that says how they stand."""

    recipe: Recipe
    stages: list[StageState]

    @property
    def path(self) -> Path:
        """The chain's directory."""
        return Path(self.recipe.output)

    def __getitem__(self, name: str) -> StageState:
        return next(state for state in self.stages if state.name == name)

    def write(self) -> None:
        """Write chain.json.

        Raises:
            StorageError: it cannot be written.
        """
        values = {
            "format": CHAIN_FORMAT,
            "kdcache": __version__,
            "recipe": self.recipe.model_dump(mode="json", exclude_unset=True),
            "stages": [state.as_record() for state in self.stages],
        }
        write_file(self.path / CHAIN_FILE, json.dumps(values, indent=1).encode() + b"\n")


def earlier_states(path: Path, stages: list[Stage]) -> list[StageState]:
    """The stages as an earlier sitting left them; those that the recipe has no more are forgotten, their files are not.

    Raises:
        TrainingError: chain.json is not readable.
    """
    found = {} if not (path / CHAIN_FILE).exists() else {s["name"]: s for s in read_chain(path)["stages"]}
    states = []
    for stage in stages:
        # What has been removed is done anew.
        earlier = found.get(stage.name, {}) if stage.run.parent.is_dir() else {}
        kept = {key: earlier[key] for key in StageState.__dataclass_fields__ if key in earlier}
        states.append(StageState(stage, **kept))
    return states


@contextmanager
def held(recipe: Recipe) -> Iterator[None]:
    """Hold the directory of a recipe's chain; it is made where it is not there.

    Raises:
        TrainingError: it holds something else, or another process is at work in it.
        StorageError: it cannot be made.
    """
    refuse_occupied(recipe)
    lock = DirectoryLock(Path(recipe.output), "at work on the chain")
    lock.hold()
    try:
        yield
    finally:
        lock.release()


def refuse_occupied(recipe: Recipe) -> None:
    """The directory should be empty, or that of a chain; the first teacher's cache may lie in it.

    Raises:
        TrainingError: it holds something that is no chain.
    """
    path, cache = Path(recipe.output), Path(recipe.cache.directory).absolute()
    ours = (
        {LOCK, *(part for part in path.iterdir() if cache.is_relative_to(part.absolute()))} if path.is_dir() else set()
    )
    found = sorted(p.name for p in path.iterdir() if not {p, p.name} & ours) if path.is_dir() else []
    if found and not (path / CHAIN_FILE).exists():
        raise TrainingError(
            f"{path} holds something that is no chain ({', '.join(found[:4])}); give the recipe key output another directory"
        )
