"""Rows held against the caches they are to be trained from, before anything heavy is imported."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from kdcache.cache.store import open_cache
from kdcache.errors import KdcacheError, RecipeError
from kdcache.recipe import Recipe
from kdcache.recipe_training import span_of
from kdcache.student.agreement import refuse_unfit
from kdcache.sweep.rows import Row, expand, make_row

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
    opened: dict[str, Cache] = {}
    for row in [*rows, *ends]:
        place = row.recipe.cache.directory
        try:
            if row.recipe.student is None:
                raise RecipeError("the recipe has no section student")
            if place == recipe.cache.directory and cache_to_come:
                _refuse_undeclared(row.recipe)
                continue
            if place not in opened:
                opened[place] = open_cache(place)
            refuse_unfit(row.recipe, opened[place])
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


def _refuse_undeclared(recipe: Recipe) -> None:
    low, declared = span_of(recipe.loss.temperature)[0], min(recipe.selection.temperatures)
    if low < declared:
        raise RecipeError(
            f"loss.temperature {low:g} is below the smallest of selection.temperatures, {declared:g}; raise it, or declare it there"
        )
