"""A recipe with a section `chain` -> its stages, each with a whole recipe.

Stage k trains its student from the cache of the student of stage k - 1, merged; stage 1 and the direct way share the
first teacher's cache, which lies where the recipe says. All that differs from stage to stage is written out in the recipes,
so that what carries out a stage are `capture` and `distill` as they are.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdcache.errors import RecipeError
from kdcache.recipe import Recipe, TeacherSection, parse_recipe
from kdcache.recipe_chain import DIRECT
from kdcache.recipe_student import StudentSection
from kdcache.recipe_yaml import assign

MERGED = "merged"


@dataclass(frozen=True)
class Stage:
    """One student of a chain and its teacher.

    Attributes:
        name: of the stage; its directory lies under it in the chain's.
        changes: the recipe keys that it was made by.
        recipe: what `capture` and `distill` carry out.
        teacher, student: what people call them.
        taught_by: the stage whose student is the teacher; None for the recipe's teacher.
        merged: where its own student goes as one model; None where it teaches nobody and is for comparison.
    """

    name: str
    changes: dict[str, Any]
    recipe: Recipe
    teacher: str
    student: str
    taught_by: Stage | None
    merged: Path | None

    @property
    def run(self) -> Path:
        """Its run directory."""
        return Path(self.recipe.output)

    @property
    def cache(self) -> str:
        """Directory or URL of the cache that it learns from."""
        return self.recipe.cache.directory

    @property
    def student_section(self) -> StudentSection:
        """What it trains."""
        assert self.recipe.student is not None
        return self.recipe.student

    @property
    def teacher_section(self) -> TeacherSection:
        """Who teaches it."""
        assert self.recipe.teacher is not None
        return self.recipe.teacher


def expand(recipe: Recipe) -> list[Stage]:
    """The stages in order, and the direct way behind them.

    Raises:
        RecipeError: the recipe has no chain, lacks what every stage needs, or a stage's key or value is not acceptable.
    """
    chain = recipe.chain
    if chain is None:
        raise RecipeError(
            "kdcache chain needs a recipe with a section chain: {stages: {NAME: {student.model: ...}, ...}}"
        )
    _refuse_incomplete(recipe)
    root, stages = Path(recipe.output), list[Stage]()
    for name, changes in chain.stages.items():
        before = stages[-1] if stages else None
        values = _values(recipe, root / name)
        if before is not None:
            assert before.merged is not None
            values["cache"] = {
                "directory": str(root / name / "cache"),
                "positions_per_shard": recipe.cache.positions_per_shard,
            }
            # Another model than the recipe's: of what that section says, only how it is loaded.
            values["teacher"] = {**values["teacher"], "model": str(before.merged), "revision": None}
        made = _made(name, changes, values)
        teacher = _short(recipe.teacher) if before is None else f"{before.student} of {before.name}"
        stages.append(
            Stage(name, changes, made, teacher, _short(made.student), before, root / name / MERGED)
        )  # fmt: skip
    if chain.direct:
        last = stages[-1]
        own = {key: v for key, v in last.changes.items() if key.partition(".")[0] not in ("teacher", "selection")}
        made = _made(DIRECT, own, _values(recipe, root / DIRECT))
        stages.append(Stage(DIRECT, own, made, _short(recipe.teacher), _short(made.student), None, None))
    return stages


def _refuse_incomplete(recipe: Recipe) -> None:
    if recipe.sweep is not None:
        raise RecipeError("the recipe has a section sweep beside its chain; leave one of them out")
    if recipe.cache.mixture:
        raise RecipeError(
            "a chain starts from one teacher: leave cache.mixture out, or train from the mixture and go on from there"
        )
    for section in ("data", "teacher"):
        if getattr(recipe, section) is None:
            raise RecipeError(f"a chain makes caches, and needs the recipe section {section}")
    if getattr(recipe.data, "source", None) == "generate":
        raise RecipeError(
            "data.source generate would give every stage other texts, its own teacher's; make the first teacher's cache with it and "
            "chain on a data set"
        )


def _values(recipe: Recipe, directory: Path) -> dict[str, Any]:
    """What the recipe says; keys that it leaves out stay left out, so that they are no claim on a cache."""
    values: dict[str, Any] = recipe.model_dump(mode="json", exclude={"chain", "embedded"}, exclude_unset=True)
    return {**values, "output": str(directory / "run")}


def _made(name: str, changes: dict[str, Any], values: dict[str, Any]) -> Recipe:
    for key, value in changes.items():
        assign(values, key, copy.deepcopy(value), f"stage {name}: {key}")
    try:
        recipe = parse_recipe(values)
    except RecipeError as exc:
        named = "" if any(key in str(exc) for key in changes) else f" (it changes {', '.join(changes) or 'nothing'})"
        raise RecipeError(f"stage {name}: {exc}{named}") from exc
    if recipe.student is None:
        raise RecipeError(f"stage {name} has no student: give it student.model, or the recipe a section student")
    if recipe.student.init is not None and recipe.student.init.method == "teacher":
        raise RecipeError(
            f"stage {name}: student.init.method teacher copies the teacher, and a chain is of students of their own; give "
            "it a model"
        )
    return recipe


def _short(section: TeacherSection | StudentSection | None) -> str:
    """What a model is called: the last part of its name, and how it is made."""
    assert section is not None
    name = Path(section.model).name
    init = getattr(section, "init", None)
    return name if init is None else f"{name}, {init.method}"


def named(stages: Iterable[Stage], name: str) -> Stage:
    """The stage of a name, which is one of theirs."""
    return next(stage for stage in stages if stage.name == name)
