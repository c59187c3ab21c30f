"""The command that trains many students from one cache, and what it shows meanwhile."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from kdcache.commands.app import (
    Overrides,
    RecipeArgument,
    app,
    console_progress,
    is_complete,
    ready_embedded,
    say,
    say_lines,
    say_table,
)
from kdcache.console import printable, text_table
from kdcache.summary import capture_lines

if TYPE_CHECKING:
    from rich.console import Console

    from kdcache.progress import Progress
    from kdcache.recipe import Recipe
    from kdcache.sweep.board import Board

_PLAIN_EVERY_SECONDS = 10.0


@app.command()
def sweep(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    grid: Annotated[
        Optional[list[str]],  # noqa: UP045 (typer reads the annotation at run time)
        typer.Option(
            metavar="KEY.PATH=[VALUE,...]",
            show_default=False,
            help="Values of a recipe key; every combination of them is a row. Repeat for further keys; replaces the same "
            "key of the recipe's sweep.grid.",
        ),
    ] = None,
    trials: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, show_default=False, help="Rows that the recipe's sweep.search makes in all."),
    ] = None,
    jobs: Annotated[
        int,
        typer.Option(
            min=1, help="Rows at a time, each in a process and, where there are several, on a GPU of its own."
        ),
    ] = 1,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Forget the earlier sweep in the output directory.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the rows; nothing is trained or written.")] = False,
    make_cache: Annotated[
        bool, typer.Option(help="Run the teacher first where the recipe's cache is not complete yet.")
    ] = True,
) -> None:
    """Train every row of a grid, of named rows or of a search from one cache; run again to go on where it stopped.

    Exit code 1 where a row failed; the others are kept.
    """
    from kdcache.errors import IncompleteCacheError
    from kdcache.recipe import parse_recipe
    from kdcache.recipe_yaml import read_values
    from kdcache.sweep.ready import ready_rows, refuse_occupied, refuse_other_rows

    chosen = parse_recipe(_with_options(read_values(recipe, overrides or []), grid or [], trials))
    complete = is_complete(chosen.cache.directory)
    rows = ready_rows(chosen, cache_to_come=not complete)
    if dry_run:
        from kdcache.sweep.board import read_earlier

        earlier = read_earlier(Path(chosen.output))
        if not overwrite:
            refuse_other_rows(chosen, rows, earlier)
        say_table(text_table(("row", "changes", "state"), [
            (row.name, ", ".join(f"{k}={v}" for k, v in row.changes.items()) or "-", (earlier.of(row.name) or {}).get("state", "new"))
            for row in rows
        ]))  # fmt: skip
        searched = chosen.sweep.trials if chosen.sweep is not None and chosen.sweep.search else 0
        say(f"{len(rows)} rows" + (f", and a search of {searched} trials" if searched else "") + f" in {chosen.output}; "
            f"cache {chosen.cache.directory}: {'complete' if complete else 'to be made first'}")  # fmt: skip
        return
    progress = console_progress()
    if not complete and not make_cache:
        raise IncompleteCacheError(
            f"the cache {chosen.cache.directory} is not complete; make it with kdcache teacher-cache, or leave --no-make-cache out"
        )
    if not complete:
        # Before the teacher's hours, not after them.
        refuse_occupied(chosen, rows, overwrite=overwrite)
    ready_embedded(chosen, progress)
    if not complete:
        _make_cache(chosen, progress)
    board = _train(chosen, jobs, overwrite)
    _show_results(board)
    if any(state.state != "finished" for state in board.rows):
        raise typer.Exit(1)


def _with_options(values: dict[str, Any], grid: list[str], trials: int | None) -> dict[str, Any]:
    """The recipe's values with what the command line says of its sweep."""
    from kdcache.errors import RecipeError
    from kdcache.recipe_yaml import parse_assignment

    if grid or trials is not None:
        section = values.get("sweep")
        values["sweep"] = section = dict(section) if isinstance(section, dict) else {}
        for text in grid:
            key, found = parse_assignment(text)
            if not isinstance(found, list):
                raise RecipeError(f"--grid {key} takes a list of values, such as '{key}=[{found}]', found {found!r}")
            section["grid"] = {**(section.get("grid") or {}), key: found}
        if trials is not None:
            section["trials"] = trials
    return values


def _make_cache(recipe: Recipe, progress: Progress) -> None:
    from kdcache.teacher.capture import capture

    lines, warning = capture_lines(capture(recipe, progress=progress))
    say_lines(lines)
    if warning is not None:
        progress.warning(warning)


def _train(recipe: Recipe, jobs: int, overwrite: bool) -> Board:
    from rich.console import Console

    from kdcache.report import write_pages
    from kdcache.sweep.run import run_sweep

    console = Console(stderr=False)
    display = LiveTable(console) if console.is_terminal else PlainLines(console_progress())
    options: dict[str, Any] = {"jobs": jobs, "overwrite": overwrite, "after_row": write_pages}
    with display:
        return run_sweep(recipe, **options, progress=display.progress, watch=display.show)


def _show_results(board: Board) -> None:
    from kdcache.sweep.run import LEADERBOARD
    from kdcache.sweep.table import leaderboard, notes

    say_table(text_table(*leaderboard(board)))
    say_lines(notes(board))
    say(f"written: {board.path / LEADERBOARD}, {board.path / 'sweep.json'}; a run directory for each row beside them")


class LiveTable:
    """All rows as a table that is redrawn in place."""

    def __init__(self, console: Console) -> None:
        from rich.live import Live

        from kdcache.console import TerminalProgress

        self._live = Live(console=console, auto_refresh=False, vertical_overflow="visible")
        # Its lines appear above the table.
        self.progress: Progress = TerminalProgress(console)

    def __enter__(self) -> LiveTable:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def show(self, board: Board) -> None:
        """Draw it anew."""
        from kdcache.sweep.table import LIVE_COLUMNS, live_rows

        self._live.update(text_table(LIVE_COLUMNS, live_rows(board)), refresh=True)


class PlainLines:
    """A line whenever a row changes its state, and every ten seconds for those at work."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self._states: dict[str, str] = {}
        self._last = time.monotonic()

    def __enter__(self) -> PlainLines:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def show(self, board: Board) -> None:
        """Say what is new."""
        from kdcache.sweep.table import plain_line

        due = time.monotonic() - self._last >= _PLAIN_EVERY_SECONDS
        if due:
            self._last = time.monotonic()
        for state in board.rows:
            # Known from the start, and worth no line.
            new = state.state != self._states.get(state.name, "waiting")
            if new or (due and state.state == "running" and state.done):
                self.progress.message(printable(plain_line(state)))
            self._states[state.name] = state.state
