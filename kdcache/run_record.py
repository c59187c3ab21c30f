"""The record of a finished run and its log, read without torch: what evaluate, sweep and report start from.

A run directory may have been written by another version, or by a stranger. What every reader needs is checked here; what
only some need may be absent.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdcache import __version__
from kdcache.errors import BrokenRunError, TrainingError

RECORD_FILE, LOG_FILE, TABLE_FILE, PLOT_FILE = "run.json", "log.csv", "table.md", "loss.png"
STARTED_FILE = "started.json"  # whose run a directory is, before there is a record
REINFORCED_FILE = "reinforce.json"  # of kdcache reinforce, in place of run.json
# Measured of the finished student afterwards; each names the training it is of by `record_digest`.
EVALUATION_FILE, EVALUATION_PAGE, INFERENCE_FILE = "evaluation.json", "evaluation.md", "inference.json"
SEQUENCES_FILE = "by_sequence.csv"
# What was measured of a student, which goes with it.
JUDGED_FILES = (EVALUATION_FILE, EVALUATION_PAGE, INFERENCE_FILE, SEQUENCES_FILE)
# The models that are scored, as run.json and evaluation.json name them.
MODELS = BEFORE, AFTER, TEACHER = "student before", "student after", "teacher"
_NEEDED = ("recipe", "cache_id", "scores")
_LIMIT = 256 << 20
_DEPTH = 64  # what walks through a recipe afterwards takes several frames for each


@dataclass(frozen=True)
class RunRecord:
    """What run.json holds of a finished run."""

    output: Path
    values: dict[str, Any]

    @property
    def scores(self) -> dict[str, dict[str, float]]:
        """Row name -> loss, perplexity, kl_to_teacher, tokens on the validation split."""
        scores: dict[str, dict[str, float]] = self.values["scores"]
        return scores


def load_record(path: Path) -> RunRecord:
    """The record of a finished run.

    Raises:
        TrainingError: there is none.
        BrokenRunError: it is not readable, or another version wrote it without what is needed here.
    """
    file = path / RECORD_FILE
    try:
        values = read_json(file)
    except FileNotFoundError as exc:
        if not path.is_dir():
            raise TrainingError(f"there is no run directory {path}; name one of kdcache train-student") from exc
        raise TrainingError(
            f"{path} holds no finished run (no run.json); finish it with kdcache train-student --resume"
        ) from exc
    except (OSError, ValueError) as exc:
        raise BrokenRunError(f"{file} is not readable: {exc}; remove {path} to train it again") from exc
    if not isinstance(values, dict) or values.get("format") != "kdcache-run":
        raise BrokenRunError(f"{file} is not the record of a kdcache run; remove {path} to train it again")
    lacking = [key for key in _NEEDED if key not in values] or _faults(values)
    if lacking:
        raise BrokenRunError(
            f"{file} was written by kdcache {_line(values.get('kdcache'))}, lacks {', '.join(lacking)}; this is kdcache "
            f"{__version__}: train the run again, or read it with the version that wrote it"
        )
    return RunRecord(path, values)


def record_digest(path: Path) -> str:
    """SHA-256 of a run directory's run.json, or of a reinforcement's reinforce.json: another one is another training.

    Raises:
        TrainingError: it is not there, or cannot be read.
    """
    own, reinforced = path / RECORD_FILE, path / REINFORCED_FILE
    file = reinforced if reinforced.exists() and not own.exists() else own
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as exc:
        raise TrainingError(f"{file} is not readable: {exc.strerror}") from exc


def _faults(values: dict[str, Any]) -> list[str]:
    """What is there but not of the kind that it should be."""
    scores = values["scores"]
    faults = [] if isinstance(values["recipe"], dict) else ["a recipe that is a mapping"]
    faults += [] if isinstance(values["cache_id"], str) else ["a cache_id that is text"]
    if not isinstance(scores, dict) or not all(isinstance(s, dict) for s in scores.values()):
        return [*faults, "scores that are mappings"]
    if AFTER not in scores:
        return [*faults, "scores of the student after training"]
    for name, score in scores.items():
        faults += [f"{key} of {_line(name)}" for key in ("loss", "perplexity") if number(score.get(key)) is None]
    return faults


def read_log(path: Path) -> list[dict[str, float]]:
    """Rows of a log.csv; a value that was not logged is absent.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not a table of numbers.
    """
    try:
        with path.open(newline="") as f:
            return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(f)]
    except (csv.Error, TypeError) as exc:
        raise ValueError(f"not the table that training logs: {exc}") from exc


def read_json(path: Path) -> Any:
    """One JSON value from a file of at most 256 MiB; NaN and infinity are numbers, as a diverged run writes them.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not JSON, too deep, or too large.
    """
    if path.stat().st_size > _LIMIT:
        raise ValueError(f"more than {_LIMIT >> 20} MiB")
    try:
        value = json.loads(path.read_bytes())
    except RecursionError as exc:
        raise ValueError("nested too deeply") from exc
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(_DEPTH):
        level = [v for c in level for v in (c.values() if isinstance(c, dict) else c) if isinstance(v, dict | list)]
        if not level:
            return value
    raise ValueError("nested too deeply")


def number(value: object) -> float | int | None:
    """A JSON number as it is, NaN and infinity included; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        math.isfinite(value)
    except OverflowError:  # an integer that no float holds
        return None
    return value


def is_amount(value: object) -> bool:
    """Whether a value of a record is a finite number that is not negative."""
    known = number(value)
    return known is not None and math.isfinite(known) and known >= 0


def flat_keys(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, keys joined by dots: ``{"loss": {"temperature": 2}}`` -> ``{"loss.temperature": 2}``."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flat_keys(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _line(value: object) -> str:
    """A short text of something that may be anything."""
    return value[:40] if isinstance(value, str) else "of an unnamed version" if value is None else repr(value)[:40]
