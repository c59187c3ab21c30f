"""What a recipe says of its cache must be what the cache is."""

from __future__ import annotations

import re
from itertools import islice
from pathlib import Path
from typing import Any

from kdcache.cache.mixture import Mixture
from kdcache.cache.reader import Cache
from kdcache.errors import CacheError, PlanMismatchError, TrainingError
from kdcache.models import effective_dtype
from kdcache.recipe import Recipe
from kdcache.recipe_selection import claimed_keys
from kdcache.recipe_training import Scheduled, span_of

TRAIN, VALIDATION = "train", "validation"
_COMMIT = re.compile(r"[0-9a-f]{40}")


def refuse_other_cache(recipe: Recipe, cache: Cache) -> None:
    """Compare every key that the plan records; sections that the recipe leaves out are not compared.

    Files and folders are compared by their last name: a cache holds no paths, and may have been made elsewhere. Of a
    cache derived from others, only teacher and prompt are: it is meant to hold other sequences and entries. Of a mixture
    the first cache is compared, the one that the recipe's teacher makes.

    Raises:
        PlanMismatchError: naming the keys that differ.
    """
    cache = cache.first if isinstance(cache, Mixture) else cache
    plan, captured = cache.plan, cache.plan.derived is None
    pairs: list[tuple[str, Any, Any]] = []
    if captured and "selection" in recipe.model_fields_set:
        chosen = recipe.selection
        pairs += [
            (f"selection.{key}", getattr(chosen, key), getattr(plan.selection, key)) for key in claimed_keys(chosen)
        ]
    teacher = recipe.teacher
    if teacher is not None:
        pairs += [
            ("teacher.model", last_name(teacher.model), last_name(plan.teacher.name)),
            ("teacher.quantization", teacher.quantization, plan.teacher.quantization),
            ("teacher.dtype", effective_dtype(teacher.quantization, teacher.dtype), plan.teacher.dtype),
        ]
        if teacher.revision is not None and _COMMIT.fullmatch(teacher.revision):
            pairs.append(("teacher.revision", teacher.revision, plan.teacher.revision))
    data = recipe.data
    if data is not None:
        pairs += [
            ("data.prompt", data.prompt, plan.data.prompt),
            ("data.system", data.system, plan.data.system),
            ("data.date", data.date, plan.data.date),
        ]
    if data is not None and captured:
        pairs += [
            ("data.max_length", data.max_length, plan.data.max_length),
            ("data.columns", dict(data.columns), dict(plan.data.columns)),
        ]
        if data.shape != "auto":
            pairs.append(("data.shape", data.shape, plan.data.shape))
        for name, source in ((TRAIN, data.train), (VALIDATION, data.validation)):
            number = plan.split_index(name)
            if number is not None:
                split = plan.data.splits[number]
                pairs += [
                    (f"data.{name}.path", last_name(source.path), last_name(split.source)),
                    (f"data.{name}.revision", source.revision, split.revision),
                    (f"data.{name}.split", data.selected(name), split.selected),
                ]
    differing = [f"{key} is {asked!r}, in the cache {found!r}" for key, asked, found in pairs if asked != found]
    if differing:
        raise PlanMismatchError(
            f"the cache {cache.directory} was made from another recipe: {'; '.join(differing)}. Make it again in "
            "another directory with kdcache teacher-cache, put these keys back, or train from it as it is with data=null teacher=null"
        )


def refuse_unfit(recipe: Recipe, cache: Cache) -> None:
    """Whether a recipe's student can be trained from a cache, as far as both say so without a look at the shards.

    Raises:
        PlanMismatchError: it was made from another recipe.
        CacheError: it has not the splits, or cannot give the temperature.
    """
    refuse_other_cache(recipe, cache)
    for name in (TRAIN, VALIDATION):
        if name not in cache:
            raise CacheError(
                f"the cache {cache.directory} has no split {name}, only {', '.join(cache)}; students are trained on {TRAIN} and "
                f"scored on {VALIDATION}: take a cache that has both (kdcache subset keeps all splits, kdcache merge adds some)"
            )
    refuse_low_temperature(recipe.loss.temperature, cache)


def refuse_low_temperature(temperature: Scheduled, cache: Cache) -> None:
    """The teacher can be rebuilt at every temperature from the smallest declared one up; a schedule should stay there. What a
    mixture declares is what all of its caches declare.

    Raises:
        CacheError: the temperature is below.
    """
    lowest, _ = span_of(temperature)
    if lowest < min(cache.temperatures):
        raise CacheError(
            f"loss.temperature {lowest:g} is below the cache's smallest declared temperature "
            f"{min(cache.temperatures):g}; raise it, or make a cache whose selection.temperatures include it"
        )


def refuse_cut_away(recipe: Recipe, cache: Cache) -> None:
    """A training that cuts sequences should leave targets to learn from and to score on; the first one is looked for.

    Raises:
        TrainingError: a split has none within ``training.max_length`` tokens.
        CorruptCacheError: a shard on the way is damaged.
    """
    length = recipe.training.max_length
    if length is None:
        return
    for name, share in ((VALIDATION, 1.0), (TRAIN, recipe.training.fraction)):
        split = cache.split(name)
        if not any(s.targets[:length].any() for s in islice(split, max(1, round(len(split) * share)))):
            raise TrainingError(
                f"no sequence of split {name} has a target within its first {length} tokens; raise training.max_length"
                + ("" if share == 1 else ", or training.fraction")
            )


def last_name(path: str) -> str:
    """The last component of a path or repository id."""
    return Path(path).absolute().name
