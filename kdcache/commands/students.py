"""The command on students that are yet to be made."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from kdcache.commands.app import Overrides, app, chosen_recipe, console_progress, ready_embedded, say_lines

_CONTEXT = 512


@app.command()
def student_shapes(
    what: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE_OR_MODEL",
            help="Recipe whose student.model gives the family, or the folder or id of a model.",
            show_default=False,
        ),
    ],
    overrides: Overrides = None,
    parameters: Annotated[
        Optional[str],  # noqa: UP045 (typer reads the annotation at run time)
        typer.Option(
            metavar="SIZE",
            show_default=False,
            help="Parameters with embeddings, such as 50M or 0.5B; a recipe's student.init.parameters by default.",
        ),
    ] = None,
    context: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            min=1,
            metavar="TOKENS",
            show_default=False,
            help=f"Length of a sequence, for the FLOPs; by default as in the recipe, {_CONTEXT} for a model.",
        ),
    ] = None,
) -> None:
    """What a student of so many parameters can look like: depth, width, memory and FLOPs; only configurations are read."""
    from kdcache.errors import RecipeError
    from kdcache.recipe_student import StudentSection, parse_size
    from kdcache.student.initial import read_source, refuse_unknown_family
    from kdcache.student.shapes import shape_lines

    length = _CONTEXT
    if Path(what).suffix in (".yaml", ".yml"):
        recipe = chosen_recipe(Path(what), overrides)
        ready_embedded(recipe, console_progress())
        if recipe.student is None:
            raise RecipeError(f"{what} has no section student, whose model gives the family")
        student = recipe.student
        length = recipe.training.max_length or (length if recipe.data is None else recipe.data.max_length)
    elif overrides:
        raise RecipeError(f"{overrides[0]} is a recipe key, but {what} is a model; give a recipe to change keys")
    else:
        student = StudentSection(model=what)
    size = None if student.init is None else student.init.parameters
    if parameters is not None:
        try:
            size = parse_size(parameters)
        except ValueError as exc:
            raise RecipeError(f"--parameters: {exc}") from exc
    if size is None:
        raise RecipeError("student-shapes needs a size: --parameters 50M, or student.init.parameters in the recipe")
    if size < 1:
        raise RecipeError(f"--parameters should be at least 1, found {size}")
    source = read_source(student)
    refuse_unknown_family(source, student.model)
    say_lines(shape_lines(source, student.model, size, context or length))
