"""reinforce.json read without torch, by itself and as the record of a run, so that a reinforced student is judged and exported like any other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kdcache.errors import BrokenRunError, TrainingError
from kdcache.run_record import RECORD_FILE, REINFORCED_FILE, STARTED_FILE, RunRecord, load_record, read_json

REINFORCED_FORMAT = "kdcache-reinforce"
# Of the run that a reinforcement started from: what judging and exporting need beside the student.
DISTILLED = ("recipe", "cache_id", "forward_pass", "parameters")
REFERENCE_FOLDER = "reference"


def began_here(path: Path) -> bool:
    """Whether started.json in a directory is that of a reinforcement."""
    try:
        values = json.loads((path / STARTED_FILE).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(values, dict) and "run digest" in values


def is_reinforcement(path: Path) -> bool:
    """Whether a directory is that of a reinforcement, finished or not."""
    return (path / REINFORCED_FILE).exists() or began_here(path)


def load_reinforced(path: Path) -> dict[str, Any]:
    """The record of a finished reinforcement. Where the base of its student is gone from its place, but a folder lies as it lay
    beside this directory, both have been moved.

    Raises:
        TrainingError: it has not finished, or the directory holds a training as well.
        BrokenRunError: the record is not readable, or not one of these.
    """
    file = path / REINFORCED_FILE
    if (path / RECORD_FILE).exists():
        raise TrainingError(
            f"{path} holds both a training ({RECORD_FILE}) and a reinforcement ({REINFORCED_FILE}), of which only one can be right; "
            "remove the record that is not of its student"
        )
    try:
        values = read_json(file)
    except FileNotFoundError as exc:
        raise TrainingError(
            f"{path} holds a reinforcement that has not finished; finish it with kdcache reinforce --resume"
        ) from exc
    except (OSError, ValueError) as exc:
        raise BrokenRunError(f"{file} is not readable: {exc}; start over by kdcache reinforce --overwrite") from exc
    known = isinstance(values, dict) and values.get("format") == REINFORCED_FORMAT
    if not known or not isinstance(values.get("student"), dict) or not isinstance(values["student"].get("model"), str):
        raise BrokenRunError(
            f"{file} is not the record of a reinforcement; start over by kdcache reinforce --overwrite"
        )
    student, beside = values["student"], values.get("base_beside")
    moved = (path / beside).resolve() if isinstance(beside, str) else None
    if moved is not None and moved.is_dir() and not Path(student["model"]).is_dir():
        # That it is the same is found by its hash.
        values["student"] = {**student, "model": str(moved)}
    return dict(values)


def load_trained(path: Path) -> RunRecord:
    """The record of a finished training, or of a finished reinforcement as if it were one: the recipe and the cache of the run
    that it started from, its own student, and no scores.

    Raises:
        TrainingError: there is none, or an earlier version reinforced it without a note of the run that it started from.
        BrokenRunError: it is not readable.
    """
    if not is_reinforcement(path):
        return load_record(path)
    values = load_reinforced(path)
    run = distilled_part(values)
    if run is None:
        raise TrainingError(
            f"{path / REINFORCED_FILE} does not say which recipe and cache the distilled student came from, since an earlier kdcache "
            f"wrote it; reinforce {values.get('run', 'the run')} again, from the distilled run on"
        )
    origin = run["recipe"].get("student")
    recipe = {**run["recipe"], "student": values["student"]}
    return RunRecord(path, {**values, **run, "recipe": recipe, "distilled_student": origin, "scores": {}})


def distilled_part(values: dict[str, Any]) -> dict[str, Any] | None:
    """What a reinforcement's record says of the run that was distilled; None where it does not, or in another form."""
    run = values.get("distilled")
    if not isinstance(run, dict) or not isinstance(run.get("recipe"), dict) or not isinstance(run.get("cache_id"), str):
        return None
    return {key: run[key] for key in DISTILLED if key in run}
