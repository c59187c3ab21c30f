"""How the rows' recipes differ, and the command that repeats each row."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from typing import Any

import yaml
from pydantic import ValidationError

from kdcache.errors import RecipeError
from kdcache.recipe_keys import value_at
from kdcache.recipe_selection import SelectionSection, claimed_keys
from kdcache.report.collect import Collection, Row

_PLAIN = re.compile(r"[A-Za-z_/][\w./\[\]%:+-]*")
_MIXTURE = "cache.mixture"
# Keys that say where and not what: two rows with other values here are the same student.
_PLACES = ("output", "cache.directory", "student.device", "teacher.device", "training.report_to", "training.workers")


@dataclass(frozen=True)
class Base:
    """The recipe that a group of rows is held against, and the file that the report writes it to."""

    name: str
    file: str
    recipe: dict[str, Any]
    rows: tuple[Row, ...]
    note: str = ""

    def changed(self, row: Row) -> dict[str, tuple[Any, Any]]:
        """Dotted key -> (base value, row's value), the output directory left out."""
        base, own = self.recipe, row.recipe
        if own is None:
            return {key: (value_at(base, key), value) for key, value in row.changes.items()}
        if not _selection_holds(row):
            own = {key: value for key, value in own.items() if key != "selection"}
        # A sweep writes what its recipe says, a run all that it leaves out besides: both with their defaults.
        whole, other = _completed(base), _completed(own)
        found = differences(base, own) if whole is None or other is None else differences(whole, other)
        return {key: pair for key, pair in found.items() if key != "output"}

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
    found_bases = []
    for i, (name, recipe, rows) in enumerate(groups, 1):
        note = ""
        if "selection" in recipe and not all(_agrees_with_cache(recipe["selection"], row) for row in rows):
            recipe = {key: value for key, value in recipe.items() if key != "selection"}
            note = "Its selection is left out: the cache holds another one, and these are defaults of a recipe that named none."
        found_bases.append(Base(name, "recipe.yaml" if single else f"recipe-{i}.yaml", recipe, tuple(rows), note))
    return found_bases


def _selection_holds(row: Row) -> bool:
    return row.recipe is None or _agrees_with_cache(row.recipe.get("selection"), row)


def _agrees_with_cache(selection: Any, row: Row) -> bool:
    """Whether the cache that a row was trained from holds what a recipe's section asks for, as far as run.json tells.

    A recipe that names no selection takes any cache, and is recorded with the defaults: claims that it never made, with
    which it would be refused.
    """
    held = None if row.record is None else row.record.values.get("selection")
    if not isinstance(selection, dict) or not isinstance(held, dict):
        return True
    try:
        chosen = SelectionSection.model_validate(selection)
    except ValidationError:
        return True
    return all(held[key] == selection[key] for key in claimed_keys(chosen) if key in held and key in selection)


def _completed(recipe: dict[str, Any]) -> dict[str, Any] | None:
    """A recipe with the defaults of what it leaves out; None where this version does not read it."""
    from kdcache.recipe import parse_recipe

    try:
        return parse_recipe(recipe).model_dump(mode="json")
    except RecipeError:
        return None


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
    if all(_weights(row, base) == _weights(base.rows[0], base) for row in base.rows):
        keys.pop(_MIXTURE, None)
    return [key for key in keys if key not in _PLACES and key.partition(".")[0] != "embedded"]


def _weights(row: Row, base: Base) -> object:
    """What a row mixes its caches by; where they lie says nothing of the student."""
    before = value_at(base.recipe, _MIXTURE)
    mixture = base.changed(row).get(_MIXTURE, (before, before))[1] or []
    try:
        return [part.get("weight", 1.0) for part in mixture]
    except (TypeError, AttributeError):
        return mixture


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
