"""How the rows' recipes differ, and the command that repeats each row."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from typing import Any

import yaml

from kdcache.report.collect import Collection, Row

_PLAIN = re.compile(r"[A-Za-z_/][\w./\[\]%:+-]*")
# Keys that say where and not what: two rows with other values here are the same student.
_PLACES = ("output", "cache.directory", "student.device", "teacher.device", "training.report_to", "training.workers")


@dataclass(frozen=True)
class Base:
    """The recipe that a group of rows is held against, and the file that the report writes it to."""

    name: str
    file: str
    recipe: dict[str, Any]
    rows: tuple[Row, ...]

    def changed(self, row: Row) -> dict[str, tuple[Any, Any]]:
        """Dotted key -> (base value, row's value), the output directory left out."""
        if row.recipe is None:
            return {key: (value_at(self.recipe, key), value) for key, value in row.changes.items()}
        return {key: pair for key, pair in differences(self.recipe, row.recipe).items() if key != "output"}

    def command(self, row: Row, folder: str) -> str:
        """The command that trains this row again, beside its first run; ``folder`` is where the base's file lies."""
        output = str((row.recipe or self.recipe).get("output") or row.name)
        if row.recipe is None:
            output = str(row.directory)
        words = ["kdcache", "train-student", f"{folder}/{self.file}", f"output={_yaml(output + '-again')}"]
        words += [f"{key}={_yaml(value)}" for key, (_, value) in self.changed(row).items()]
        return shlex.join(words)

    def yaml(self) -> str:
        """The base as a recipe file."""
        dumped: str = yaml.safe_dump(self.recipe, sort_keys=False, allow_unicode=False, width=120)
        return dumped


def bases(found: Collection) -> list[Base]:
    """The base of each sweep, and for runs given by themselves the recipe of the first one that can be read."""
    groups: list[tuple[str, dict[str, Any], list[Row]]] = [
        (sweep.name, sweep.recipe, [row for row in found.rows if row.sweep == number])
        for number, sweep in enumerate(found.sweeps)
    ]
    alone = [row for row in found.rows if row.sweep is None and row.recipe is not None]
    if alone:
        groups.append((alone[0].name, alone[0].recipe or {}, alone))
    single = len(groups) == 1
    return [
        Base(name, "recipe.yaml" if single else f"recipe-{i}.yaml", recipe, tuple(rows))
        for i, (name, recipe, rows) in enumerate(groups, 1)
    ]


def differences(base: dict[str, Any], other: dict[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (base's value, the other's), each key as deep as an override of it can be written.

    A key that the other lacks is not one: another version does not know it.
    """
    found: dict[str, tuple[Any, Any]] = {}
    for key, value in other.items():
        before = base.get(key)
        if isinstance(before, dict) and isinstance(value, dict) and (not prefix or before.keys() == value.keys()):
            found |= differences(before, value, f"{prefix}{key}.")
        elif before != value:
            found[prefix + key] = (before, value)
    return found


def varied(base: Base) -> list[str]:
    """Keys that the rows of a base differ in, without those that only say where things lie."""
    keys: dict[str, None] = {}
    for row in base.rows:
        keys |= dict.fromkeys(base.changed(row))
    return [key for key in keys if key not in _PLACES and key.partition(".")[0] != "embedded"]


def value_at(values: dict[str, Any], key: str) -> Any:
    """The value of a dotted key; None where there is none."""
    found: Any = values
    for part in key.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return found


def value_text(value: Any) -> str:
    """A recipe's value on one line."""
    if isinstance(value, dict) and {"start", "end"} <= value.keys():
        return f"{value_text(value['start'])} to {value_text(value['end'])}"
    if isinstance(value, bool) or value is None or not isinstance(value, int | float | str):
        return json.dumps(value)
    return value if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else str(value)


def _yaml(value: Any) -> str:
    """A value as an override takes it."""
    if isinstance(value, str) and _PLAIN.fullmatch(value) and yaml.safe_load(value) == value:
        return value
    return json.dumps(value)
