"""The command that lets students teach students."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kdcache.commands.app import (
    Overrides,
    RecipeArgument,
    app,
    chosen_recipe,
    console_progress,
    ready_embedded,
    say,
    say_lines,
    say_table,
)
from kdcache.console import text_table

if TYPE_CHECKING:
    from kdcache.recipe import Recipe


@app.command()
def chain(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Look at every stage and say what it takes; no model is loaded, and nothing is made but embedded ones.",
        ),
    ] = False,
) -> None:
    """Train students that teach the next one, and the last from the first teacher to compare; run again to go on."""
    chosen, progress = chosen_recipe(recipe, overrides), console_progress()
    if dry_run:
        from kdcache.chain.stages import expand

        expand(chosen)
        ready_embedded(chosen, progress)
        _show_plan(chosen)
        return
    from kdcache.chain.run import CHAIN_PAGE, run_chain
    from kdcache.chain.stages import expand
    from kdcache.chain.table import COLUMNS, COST_COLUMNS, cost_rows, notes, result_rows
    from kdcache.report import write_pages

    # What is wrong with the recipe is told before models are made.
    expand(chosen)
    ready_embedded(chosen, progress)
    board = run_chain(chosen, progress=progress, after_run=write_pages)
    say_table(text_table(COLUMNS, result_rows(board)))
    say_lines(notes(board))
    say_table(text_table(COST_COLUMNS, cost_rows(board)))
    say(f"written: {board.path / CHAIN_PAGE}, {board.path / 'chain.json'}; in a directory for each stage beside them its run, its "
        "cache and its student as one model")  # fmt: skip


def _show_plan(recipe: Recipe) -> None:
    from kdcache.chain.board import earlier_states, refuse_occupied
    from kdcache.chain.ready import estimates, refuse_impossible_stages
    from kdcache.chain.stages import expand
    from kdcache.chain.table import ESTIMATE_COLUMNS, PLAN_COLUMNS, change_lines, estimate_rows, plan_rows

    refuse_occupied(recipe)
    states = earlier_states(Path(recipe.output), expand(recipe))
    refuse_impossible_stages(states)
    say_table(text_table(PLAN_COLUMNS, plan_rows(states)))
    say_lines(change_lines(states))
    found = estimates(recipe, [state.stage for state in states])
    say_table(text_table(ESTIMATE_COLUMNS, estimate_rows(found)))
    say(
        f"teacher: its weights; training: weights, gradients and optimizer of the student, without activations; cache: what "
        f"selection.bytes_per_position makes of {found[0].positions:,} positions. kdcache teacher-cache and train-student --dry-run "
        "measure more, stage by stage"
    )
