"""A recipe with a section `sweep` -> its rows, each a whole recipe with a name and a directory.

Named rows come first, then the grid: every combination of its values, the last key varying fastest. Names of the grid's
rows are made of their values, so that a row keeps its name, and with it its finished run, when others are added.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdcache.errors import RecipeError
from kdcache.recipe import Recipe, parse_recipe
from kdcache.recipe_keys import recipe_keys, value_at
from kdcache.recipe_yaml import assign

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._=,+-]*")
_TRIAL = re.compile(r"trial-\d+")
_UNSAFE = re.compile(r"[^A-Za-z0-9_.+-]+")
_LONGEST_NAME = 80
# What lies beside the rows in the directory of a sweep.
RESERVED = ("sweep.json", "leaderboard.md", "search.log", "errors.log", "report", "report.html", "report.md")
_OF_THE_CACHE = ("data", "teacher", "selection", "embedded", "cache")
# Which caches are read, and not how one is made.
_PLACES = ("cache.directory", "cache.weight", "cache.mixture")


@dataclass(frozen=True)
class Row:
    """One student of a sweep.

    ``changes`` are the keys that it was made by, with their validated values; ``directory`` is relative to the sweep's.
    """

    name: str
    changes: dict[str, Any]
    directory: str
    recipe: Recipe


def expand(recipe: Recipe) -> list[Row]:
    """The named rows and the grid's, each of them valid.

    Raises:
        RecipeError: there is nothing to sweep; a row's name, key or value is not acceptable, named with its row; two rows are
            the same experiment or would share a directory.
    """
    sweep = recipe.sweep
    if sweep is None:
        raise RecipeError(
            "nothing to sweep: give --grid 'loss.temperature=[1,2]', or the recipe a section sweep with rows, grid or search"
        )
    for name in sweep.rows:
        _refuse_name(name)
        if sweep.search and is_trial(name):
            raise RecipeError(f"row {name} has a name of the search's trials; give it another")
    wanted = dict(sweep.rows)
    for name, changes in _grid(sweep.grid):
        if name in wanted:
            raise RecipeError(f"the row {name} of sweep.rows has the name of a row of sweep.grid; give it another")
        wanted[name] = changes
    rows = [make_row(recipe, name, changes) for name, changes in wanted.items()]
    refuse_same(rows)
    return rows


def make_row(recipe: Recipe, name: str, changes: dict[str, Any]) -> Row:
    """The recipe with some keys changed, as a row of the sweep in the recipe's output directory.

    Raises:
        RecipeError: naming row and key: unknown, not acceptable, or a key that makes another cache.
    """
    where = f"row {name}"
    values = base_values(recipe)
    directory = name.replace(" ", "_")
    for key, value in changes.items():
        _refuse_key(key, value, changes, where)
        assign(values, key, copy.deepcopy(value), f"{where}: {key}")
    if "cache.directory" in changes:
        # It says how the recipe's own cache is made, and this is another.
        values.pop("selection", None)
    values["output"] = str(Path(recipe.output) / directory)
    try:
        parsed = parse_recipe(values)
    except RecipeError as exc:
        # Some messages speak of two keys that do not go together: say which this row has changed.
        named = "" if any(key in str(exc) for key in changes) else f" (it changes {', '.join(changes)})"
        raise RecipeError(f"{where}: {exc}{named}") from exc
    dumped = parsed.model_dump(mode="json")
    return Row(name, {key: value_at(dumped, key) for key in changes}, directory, parsed)


def base_values(recipe: Recipe) -> dict[str, Any]:
    """What the recipe says, without its sweep; keys that it leaves out stay left out."""
    values: dict[str, Any] = recipe.model_dump(mode="json", exclude={"sweep"}, exclude_unset=True)
    return values


def is_trial(name: str) -> bool:
    """Whether a row has the name of a search's trial."""
    return _TRIAL.fullmatch(name) is not None


def factors(rows: list[Row]) -> list[str]:
    """The keys that vary, in the order in which they first stand in a row."""
    return list(dict.fromkeys(key for row in rows for key in row.changes))


def refuse_same(rows: list[Row], repeats: Collection[str] = ()) -> None:
    """Rows should differ, in what they train and in where they lie.

    Args:
        rows: all of a sweep.
        repeats: names of rows that may train what another does: a search over few values comes back to some of them.

    Raises:
        RecipeError: two are the same experiment, or would share a directory; both are named.
    """
    seen: dict[str, str] = {}
    places: dict[str, str] = {}
    for row in rows:
        content = json.dumps(row.recipe.model_dump(mode="json", exclude={"output"}), sort_keys=True)
        if content in seen and row.name not in repeats:
            raise RecipeError(f"the rows {seen[content]} and {row.name} are the same experiment; leave one of them out")
        # Some file systems do not tell capitals apart.
        place = row.directory.lower()
        if place in places:
            raise RecipeError(f"the rows {places[place]} and {row.name} would share a directory; rename one of them")
        if row.name not in repeats:
            seen[content] = row.name
        places[place] = row.name


def _grid(grid: dict[str, list[Any]]) -> list[tuple[str, dict[str, Any]]]:
    if not grid:
        return []
    short = Counter(key.rpartition(".")[2] for key in grid)
    labels = {key: last if short[last := key.rpartition(".")[2]] == 1 else key for key in grid}
    combinations = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    names = [",".join(f"{labels[k]}={_said(v)}" for k, v in changes.items()) for changes in combinations]
    times = Counter(name.lower() for name in names)
    return [
        (name if times[name.lower()] == 1 and len(name) <= _LONGEST_NAME else _with_digest(name, changes), changes)
        for name, changes in zip(names, combinations, strict=True)
    ]


def _said(value: Any) -> str:
    """A value as a part of a file name: short, and without letters that a shell or a file system minds."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, int | float):
        text = f"{value:g}"
        return text if float(text) == value else repr(value)
    text = value if isinstance(value, str) else json.dumps(value)
    return _UNSAFE.sub("-", text).strip("-.") or "empty"


def _with_digest(name: str, changes: dict[str, Any]) -> str:
    """Names that are too long, or that two rows would have, end in a digest of what the row changes."""
    digest = hashlib.sha256(json.dumps(changes, sort_keys=True).encode()).hexdigest()[:8]
    return f"{name[: _LONGEST_NAME - 9]}-{digest}"


def _refuse_name(name: str) -> None:
    if not _NAME.fullmatch(name) or len(name) > _LONGEST_NAME or name[-1] in " .":
        raise RecipeError(
            f"the row name {name!r} is to be a directory as well: letters, digits, spaces and any of ._=,+- , at most "
            f"{_LONGEST_NAME} of them, a letter or digit first"
        )
    if name.replace(" ", "_").lower() in RESERVED:
        raise RecipeError(f"the row name {name} is that of a file of the sweep; give it another")


def _refuse_key(key: str, value: Any, changes: dict[str, Any], where: str) -> None:
    section = key.partition(".")[0]
    if section in ("output", "sweep"):
        raise RecipeError(
            f"{where} changes {key}; the recipe's output is the sweep's directory, and every row lies in it by its name"
        )
    if section not in _OF_THE_CACHE or key in _PLACES:
        if isinstance(value, dict) and any(known.startswith(f"{key}.") for known in recipe_keys(Recipe)):
            # It would put all other keys of the section back to their defaults, unnoticed.
            example = f", such as {key}.{next(iter(value))}" if value else ""
            raise RecipeError(
                f"{where} gives the section {key} as a whole, {value!r}; name the keys it changes one by one{example}"
            )
        return
    # Held against a cache of another origin they would say that it is the wrong one.
    if key in ("data", "teacher") and value is None and "cache.directory" in changes:
        return
    raise RecipeError(
        f"{where} changes {key}, which makes another cache, and a sweep trains from caches that are there. Make one cache for "
        f"each value (kdcache teacher-cache RECIPE {key}=... cache.directory=...) and let rows differ in cache.directory"
    )
