"""reinforce.json read without torch, by itself and as the record of a run, so that a reinforced student is judged and exported like any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kdcache.errors import BrokenRunError, TrainingError
from kdcache.run_record import RECORD_FILE, REINFORCED_FILE, RunRecord, load_record, read_json

REINFORCED_FORMAT = "kdcache-reinforce"
# Of the run that a reinforcement started from: what judging and exporting need beside the student.
DISTILLED = ("recipe", "cache_id", "forward_pass", "parameters")


def load_reinforced(path: Path) -> dict[str, Any]:
    """The record of a finished reinforcement.

    Raises:
        TrainingError: it has not finished.
        BrokenRunError: the record is not readable, or not one of these.
    """
    file = path / REINFORCED_FILE
    try:
        values = read_json(file)
    except FileNotFoundError as exc:
        raise TrainingError(
            f"{path} holds a reinforcement that has not finished; finish it with kdcache reinforce --resume"
        ) from exc
    except (OSError, ValueError) as exc:
        raise BrokenRunError(f"{file} is not readable: {exc}; start over by --overwrite") from exc
    if not isinstance(values, dict) or values.get("format") != REINFORCED_FORMAT or "student" not in values:
        raise BrokenRunError(f"{file} is not the record of a reinforcement; start over by --overwrite")
    return values


def load_trained(path: Path) -> RunRecord:
    """The record of a finished training, or of a finished reinforcement as if it were one: the recipe and the cache of the run
    that it started from, its own student, and no scores.

    Raises:
        TrainingError: there is none, or an earlier version reinforced it without a note of the run that it started from.
        BrokenRunError: it is not readable.
    """
    if (path / RECORD_FILE).exists() or not (path / REINFORCED_FILE).exists():
        return load_record(path)
    values = load_reinforced(path)
    run = values.get("distilled")
    known = isinstance(run, dict) and isinstance(run.get("recipe"), dict) and isinstance(run.get("cache_id"), str)
    if not isinstance(run, dict) or not known:
        raise TrainingError(
            f"{path / REINFORCED_FILE} does not say which recipe and cache the distilled student came from, since an earlier kdcache "
            "wrote it; reinforce the run again"
        )
    recipe = {**run["recipe"], "student": values["student"]}
    return RunRecord(path, {**values, **run, "recipe": recipe, "scores": {}})
