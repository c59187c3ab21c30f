"""Run, sweep and chain directories -> the rows of a report.

Everything read here may be broken, of another version, or a stranger's. A row that cannot be read is a failed row with
its reason; nothing is left out in silence.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from kdcache.chain_record import CHAIN_FILE, read_chain, run_of
from kdcache.errors import TrainingError
from kdcache.recipe_keys import value_at
from kdcache.reinforce_record import is_reinforcement
from kdcache.report.judged import Evaluation, Inference, read_evaluation, read_inference
from kdcache.run_record import AFTER, LOG_FILE, RunRecord, load_record, number, read_log
from kdcache.sweep_record import SWEEP_FILE, State, checked_row, read_sweep_head

_SAME_LOSS = 1e-3


@dataclass
class Row:
    """One student.

    Attributes:
        name: unique in the report.
        directory: of its run.
        state: what the sweep says of it, or what its directory shows.
        reason: why it failed or is not finished.
        changes: keys that a sweep changed in it.
        sweep: the sweep it belongs to, by number in the report.
        seconds: of all its sittings; None where nobody knows.
        seconds_of: whether these seconds are the sweep's, or the last sitting's that run.json knows of.
        record: of the finished run.
        log: its log lines.
        notes: what was found odd about it.
    """

    name: str
    directory: Path
    state: State = "finished"
    reason: str | None = None
    changes: dict[str, Any] = field(default_factory=dict)
    sweep: int | None = None
    seconds: float | None = None
    seconds_of: Literal["all sittings", "last sitting"] = "last sitting"
    record: RunRecord | None = None
    log: list[dict[str, float]] = field(default_factory=list)
    evaluation: Evaluation = field(default_factory=Evaluation)
    inference: Inference = field(default_factory=Inference)
    notes: list[str] = field(default_factory=list)

    @property
    def recipe(self) -> dict[str, Any] | None:
        """The recipe it was trained with, as run.json has it."""
        return None if self.record is None else self.record.values["recipe"]

    def score(self, model: str, key: str) -> float | int | None:
        """A figure of run.json, as it stands there."""
        return None if self.record is None else number(self.record.scores.get(model, {}).get(key))


@dataclass(frozen=True)
class Sweep:
    """What sweep.json says beside its rows."""

    name: str
    directory: Path
    recipe: dict[str, Any]
    factors: tuple[str, ...]
    seconds: float | None
    jobs: int | None
    version: str


@dataclass
class Collection:
    """All rows of a report, in the order given, and the sweeps they came from."""

    rows: list[Row] = field(default_factory=list)
    sweeps: list[Sweep] = field(default_factory=list)

    @property
    def finished(self) -> list[Row]:
        """Rows that have scores."""
        return [row for row in self.rows if row.record is not None]


def collect(paths: Sequence[Path]) -> Collection:
    """The rows of run directories, sweep directories and chain directories; a directory given twice counts once.

    Raises:
        TrainingError: a path does not exist or is no directory.
    """
    for path in paths:
        if not path.is_dir():
            what = "is a file" if path.exists() else "does not exist"
            raise TrainingError(
                f"{path} {what}; expected run directories of kdcache train-student or sweep directories of kdcache sweep"
            )
    if not any((path / file).exists() for path in paths for file in (SWEEP_FILE, CHAIN_FILE, *_RUN_FILES)):
        raise TrainingError(
            f"{' and '.join(map(str, paths))} {'holds' if len(paths) == 1 else 'hold'} neither a run nor a sweep; expected run "
            "directories of kdcache train-student or sweep directories of kdcache sweep"
        )
    found = Collection()
    for path in {path.resolve(): path for path in paths}.values():
        if (path / SWEEP_FILE).exists():
            found.rows += _sweep(path, found)
        else:
            found.rows += _chain(path) if (path / CHAIN_FILE).exists() else [_run(path)]
    # A sweep knows more of a run than its directory does.
    swept = {os.path.realpath(row.directory) for row in found.rows if row.sweep is not None}
    found.rows = [row for row in found.rows if row.sweep is not None or os.path.realpath(row.directory) not in swept]
    _name_apart(found)
    return found


def _sweep(path: Path, found: Collection) -> list[Row]:
    """The rows of one sweep; where sweep.json is broken, a failed row of its name and whatever runs lie there."""
    try:
        head = read_sweep_head(path)
    except TrainingError as exc:
        broken = Row(path.resolve().name, path, "failed", str(exc))
        inside = sorted(p for p in path.iterdir() if p.is_dir() and any((p / f).exists() for f in _RUN_FILES))
        return [broken, *(_run(p) for p in inside)]
    found.sweeps.append(
        Sweep(
            name=head["name"].strip() or path.resolve().name,
            directory=path,
            recipe=head["recipe"],
            factors=tuple(head["factors"]),
            seconds=head["seconds"] or None,
            jobs=head["jobs"],
            version=head["kdcache"],
        )
    )
    return [_swept(path, len(found.sweeps) - 1, i, row) for i, row in enumerate(head["rows"])]


def _chain(path: Path) -> list[Row]:
    """The stages of a chain, each a run by itself; where chain.json is broken, as with a sweep."""
    try:
        stages = read_chain(path)["stages"]
    except TrainingError as exc:
        broken = Row(path.resolve().name, path, "failed", str(exc))
        inside = sorted(p for p in path.glob("*/run") if any((p / f).exists() for f in _RUN_FILES))
        return [broken, *(_run(p) for p in inside)]
    rows = []
    for stage in stages:
        row = _run(run_of(path, stage["name"]))
        row.name = stage["name"]
        if row.record is None and stage["state"] != "finished":
            row.state, row.reason = stage["state"], stage["error"]
        rows.append(row)
    return rows


_RUN_FILES = ("run.json", "started.json", LOG_FILE)


def _swept(path: Path, sweep: int, index: int, values: object) -> Row:
    """One row of a sweep, with its run where there is one."""
    name = f"row {index + 1}"
    told = values.get("name") if isinstance(values, dict) else None
    name = told if isinstance(told, str) and told.strip() else name
    try:
        known = checked_row(values)
    except ValueError as exc:
        # What it says of itself is not to be trusted; where it should lie neither.
        return Row(
            name,
            path / f"row {index + 1}",
            "failed",
            f"{SWEEP_FILE} has no row here that can be read: {exc}",
            sweep=sweep,
        )
    row = Row(name, path / known["directory"], known["state"], known["error"], known["changes"], sweep)
    row.seconds, row.seconds_of = known["seconds"], "all sittings"
    _read_log(row)
    if row.state == "failed":
        row.reason = row.reason or f"{SWEEP_FILE} says failed and gives no reason"
        return row
    try:
        record = load_record(row.directory)
    except TrainingError as exc:
        if row.state == "finished":
            row.state, row.reason = "failed", str(exc)
        return row
    _take(row, record)
    odd = [key for key, value in row.changes.items() if not _agrees(value_at(record.values["recipe"], key), value)]
    if odd:
        row.notes.append(f"run.json was trained with another {', '.join(odd)} than {SWEEP_FILE} says")
    return row


def _run(path: Path) -> Row:
    """A run directory given by itself."""
    row = Row(path.resolve().name, path)
    _read_log(row)
    try:
        record = load_record(path)
    except TrainingError as exc:
        started = (path / "started.json").exists() and not (path / "run.json").exists()
        row.state, row.reason = "stopped" if started else "failed", str(exc)
        if is_reinforcement(path):
            row.state, row.reason = "failed", "a reinforcement, which reports do not show; kdcache evaluate judges it"
        return row
    _take(row, record)
    return row


def _take(row: Row, record: RunRecord) -> None:
    """Fill a row from its finished run."""
    row.state, row.reason, row.record = "finished", None, record
    if not row.seconds:
        row.seconds, row.seconds_of = number(record.values.get("seconds")), "last sitting"
    row.evaluation, notes = read_evaluation(row.directory, record.values["cache_id"])
    row.inference, more = read_inference(row.directory)
    row.notes += notes + more
    told, measured = row.score(AFTER, "loss"), row.evaluation.score(AFTER, "loss")
    if told is not None and measured is not None and abs(told - measured) > _SAME_LOSS * abs(told):
        row.notes.append(
            f"evaluation.json measured the loss {measured:.4f}, run.json has {told:.4f}: evaluate it again"
        )


def _read_log(row: Row) -> None:
    path = row.directory / LOG_FILE
    try:
        row.log = [line for line in read_log(path) if "step" in line] if path.exists() else []
    except (OSError, ValueError) as exc:
        row.notes.append(f"{LOG_FILE} is not readable and left out: {exc}")


def _name_apart(found: Collection) -> None:
    """Rows of several sweeps, or of the same name, are told apart by what lies above them."""
    if len(found.sweeps) > 1 or (found.sweeps and any(row.sweep is None for row in found.rows)):
        for row in found.rows:
            if row.sweep is not None:
                row.name = f"{found.sweeps[row.sweep].name}/{row.name}"
    names = [row.name for row in found.rows]
    for row in found.rows:
        if names.count(row.name) > 1:
            row.name = str(row.directory)
    taken: set[str] = set()
    for row in found.rows:
        name, count = row.name, 1
        while row.name in taken:
            count += 1
            row.name = f"{name} ({count})"
        taken.add(row.name)


def _agrees(found: Any, wanted: Any) -> bool:
    """Whether a recipe's value is the one asked for; what a mapping does not name was filled in."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        return all(_agrees(found.get(k), v) for k, v in wanted.items())
    return bool(found == wanted)
