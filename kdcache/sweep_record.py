"""sweep.json read without torch: what a sweep, an evaluation and a report know of its rows.

The file may have been written by another version, or by a stranger, and the directories of its rows are written into and
removed. What it says of them is checked here, once for all readers.
"""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath
from typing import Any, Literal, get_args

from kdcache import __version__
from kdcache.errors import TrainingError
from kdcache.run_record import is_amount, read_json

State = Literal["waiting", "running", "finished", "failed", "stopped"]
STATES: tuple[State, ...] = get_args(State)
SWEEP_FILE, SWEEP_FORMAT = "sweep.json", "kdcache-sweep"
_MAX_ROWS = 10_000
_LONGEST_PART = 255  # bytes, of one name in a path


def read_sweep(directory: Path) -> dict[str, Any]:
    """What sweep.json says, every row of it held to what a sweep writes.

    Args:
        directory: of the sweep.

    Returns:
        ``kdcache``, ``name``, ``recipe``, ``factors``, ``rows`` as `checked_row` gives them, ``seconds`` and ``jobs``; what the
        file lacks of them is empty.

    Raises:
        TrainingError: the file is missing, not readable, of another format, or has a row that is none; two rows have one name
            or one directory.
    """
    head = read_sweep_head(directory)
    rows: list[dict[str, Any]] = []
    for index, found in enumerate(head["rows"], 1):
        try:
            rows.append(checked_row(found))
        except ValueError as exc:
            raise _refusal(directory, f"row {index}: {exc}") from exc
    for key in ("name", "directory"):
        values = [row[key] for row in rows]
        if len(set(values)) < len(values):
            twice = next(value for i, value in enumerate(values) if value in values[:i])
            raise _refusal(directory, f"two rows have the {key} {twice!r}")
    return {**head, "rows": rows}


def read_sweep_head(directory: Path) -> dict[str, Any]:
    """`read_sweep` with ``rows`` as they were found, for who would rather show a broken row than refuse the sweep.

    Raises:
        TrainingError: the file is missing, not readable or of another format.
    """
    try:
        values = read_json(directory / SWEEP_FILE)
    except (OSError, ValueError) as exc:
        raise _refusal(directory, str(exc)) from exc
    if not isinstance(values, dict) or values.get("format") != SWEEP_FORMAT:
        found = values.get("format") if isinstance(values, dict) else None
        raise _refusal(directory, f"its format is {str(found)[:40]!r}")
    kinds = {"kdcache": str, "name": str, "recipe": dict, "factors": list, "rows": list}
    odd = [key for key, kind in kinds.items() if not isinstance(values.get(key, kind()), kind)]
    odd += [key for key in ("seconds", "jobs") if not is_amount(values.get(key, 0))]
    odd += [] if "rows" in values else ["rows"]
    if odd:
        raise _refusal(directory, f"written by kdcache {str(values.get('kdcache'))[:40]}, lacks {', '.join(odd)}")
    if len(values["rows"]) > _MAX_ROWS:
        raise _refusal(directory, f"it has more than {_MAX_ROWS:,} rows")
    return {
        "kdcache": values.get("kdcache", "unnamed"),
        "name": values.get("name", directory.absolute().name),
        "recipe": values.get("recipe", {}),
        "factors": [factor for factor in values.get("factors", []) if isinstance(factor, str)],
        "rows": values["rows"],
        "seconds": float(values.get("seconds", 0.0)),
        "jobs": int(values.get("jobs", 1)),
    }


def checked_row(row: object) -> dict[str, Any]:
    """One row of sweep.json: ``name``, ``changes``, ``directory`` (relative, inside), ``state``, ``error``, ``seconds``.

    Raises:
        ValueError: saying what is wrong with it.
    """
    if not isinstance(row, dict):
        raise ValueError("it is no mapping")
    name, folder, state = row.get("name"), row.get("directory"), row.get("state")
    changes, error, seconds = row.get("changes", {}), row.get("error"), row.get("seconds", 0.0)
    if not isinstance(name, str) or not name:
        raise ValueError("it has no name")
    if not isinstance(folder, str) or not stays_inside(folder):
        raise ValueError(f"its directory {str(folder)[:80]!r} does not lie in the sweep's")
    if state not in STATES:
        raise ValueError(f"{SWEEP_FILE} gives it the state {str(state)[:40]!r}, which this version does not know")
    if not isinstance(changes, dict):
        raise ValueError("its changes are no mapping")
    if error is not None and not isinstance(error, str):
        raise ValueError("its error is no text")
    if not is_amount(seconds):
        raise ValueError("its seconds are no number of 0 or more")
    return {
        "name": name,
        "changes": changes,
        "directory": folder,
        "state": state,
        "error": error,
        "seconds": float(seconds),
    }


def stays_inside(folder: str) -> bool:
    """Whether a relative path leads to something below, and is one that a file system takes."""
    pure = PurePosixPath(folder)
    try:
        long = any(len(os.fsencode(part)) > _LONGEST_PART for part in pure.parts)
    except UnicodeEncodeError:
        return False
    return "\0" not in folder and not long and bool(pure.parts) and not pure.is_absolute() and ".." not in pure.parts


def _refusal(directory: Path, reason: str) -> TrainingError:
    return TrainingError(
        f"{directory / SWEEP_FILE} is not the record of a sweep that kdcache {__version__} reads: {reason}; read it with the "
        "version that wrote it, or sweep again into another directory"
    )
