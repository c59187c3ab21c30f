"""Rows held against the caches they are to be trained from, before anything heavy is imported."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from kdcache.cache.mixture import open_caches
from kdcache.cache.store import open_cache
from kdcache.errors import BrokenRunError, KdcacheError, RecipeError
from kdcache.recipe import Recipe
from kdcache.recipe_training import span_of
from kdcache.run_record import RECORD_FILE, read_json
from kdcache.student.agreement import refuse_unfit
from kdcache.sweep.board import FINISHED, Earlier, RowState, SweepDirectory
from kdcache.sweep.rows import Row, expand, is_trial, make_row, refuse_same

if TYPE_CHECKING:
    from kdcache.cache.reader import Cache


def ready_rows(recipe: Recipe, *, cache_to_come: bool = False) -> list[Row]:
    """The rows of a sweep, held against their caches as far as no model is needed; a search's are asked for later.

    Args:
        recipe: with a section ``sweep``.
        cache_to_come: the recipe's own cache will be made from it, and is whatever the recipe says.

    Raises:
        KdcacheError: a row is not possible; it is named, and its key.
    """
    rows, ends = expand(recipe), ends_of_search(recipe)
    if ends and importlib.util.find_spec("optuna") is None:
        raise RecipeError("sweep.search needs Optuna: pip install 'kdcache[search]'")
    opened: dict[tuple[tuple[str, float], ...], Cache] = {}
    for row in [*rows, *ends]:
        places = row.recipe.cache.places
        try:
            if row.recipe.student is None:
                raise RecipeError("the recipe has no section student")
            if places[0][0] == recipe.cache.directory and cache_to_come:
                _refuse_undeclared(row.recipe)
                for place, _ in places[1:]:
                    open_cache(place)
                continue
            if places not in opened:
                opened[places] = open_caches(places)
            refuse_unfit(row.recipe, opened[places])
        except KdcacheError as exc:
            raise type(exc)(f"row {row.name}: {exc}") from exc
    return rows


def ends_of_search(recipe: Recipe) -> list[Row]:
    """A row for every value, or end of an interval, that a search may come to: an impossible one should not wait to be drawn."""
    search = {} if recipe.sweep is None else recipe.sweep.search
    return [
        make_row(recipe, f"of the search, {key}={value}", {key: value})
        for key, space in search.items()
        for value in (space if isinstance(space, list) else (space.low, space.high))
    ]


def rows_with_earlier(recipe: Recipe, rows: list[Row], earlier: Earlier) -> list[RowState]:
    """The rows of this sitting with the time they have taken so far, and behind them finished ones of earlier sittings
    that the recipe no longer names: they are results, as long as their runs are there.

    Raises:
        RecipeError: an earlier row cannot be made from the recipe any more, or is the same as another.
    """
    path = Path(recipe.output)
    states = [RowState(row, seconds=(earlier.of(row.name) or {}).get("seconds", 0.0)) for row in rows]
    named = {row.name for row in rows}
    left = [
        row
        for row in earlier.rows
        if row["state"] == FINISHED and row["name"] not in named and (path / row["directory"] / RECORD_FILE).exists()
    ]
    try:
        for row in left:
            made = make_row(recipe, row["name"], row["changes"])
            states.append(RowState(made, seconds=row["seconds"]))
        refuse_same([state.row for state in states], repeats={row["name"] for row in left if is_trial(row["name"])})
    except RecipeError as exc:
        raise RecipeError(
            f"the earlier sweep in {path} does not go with this recipe ({exc}); start over by --overwrite, or give the recipe "
            "key output another directory"
        ) from exc
    return states


def refuse_occupied(recipe: Recipe, rows: list[Row], *, overwrite: bool) -> None:
    """What a sweep would refuse of its directory, for who has long work to do before: the teacher's pass.

    Raises:
        KdcacheError: it holds something else, another process is at work in it, or earlier rows do not go with these.
    """
    with SweepDirectory(Path(recipe.output)) as directory:
        if not overwrite:
            refuse_other_rows(recipe, rows, directory.earlier())


def refuse_other_rows(recipe: Recipe, rows: list[Row], earlier: Earlier) -> None:
    """Runs of earlier sittings should have the settings of their rows; nothing is written.

    Raises:
        KdcacheError: one has not, or cannot be made from the recipe any more; the row is named.
    """
    begun = [s for s in rows_with_earlier(recipe, rows, earlier) if Path(s.row.recipe.output).is_dir()]
    if not begun:
        return
    from kdcache.student.record import RunDirectory

    for state in begun:
        path = Path(state.row.recipe.output)
        try:
            # The cache may be to come: the settings alone are held against those of the run.
            cache_id = str(read_json(path / "started.json")["cache_id"])
        except (OSError, ValueError, KeyError, TypeError):
            cache_id = ""  # whatever it is, a run cannot be gone on with then, and says so
        try:
            RunDirectory(path).prepare(state.row.recipe, cache_id, resume=True, overwrite=False)
        except BrokenRunError:
            continue  # that row's failure, and no other's
        except KdcacheError as exc:
            raise type(exc)(f"row {state.name}: {exc}") from exc


def _refuse_undeclared(recipe: Recipe) -> None:
    low, declared = span_of(recipe.loss.temperature)[0], min(recipe.selection.temperatures)
    if low < declared:
        raise RecipeError(
            f"loss.temperature {low:g} is below the smallest of selection.temperatures, {declared:g}; raise it, or declare it there"
        )
