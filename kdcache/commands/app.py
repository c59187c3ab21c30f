"""What all commands share: the application, its arguments, and the only functions that print."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from kdcache.console import printable, text_table

if TYPE_CHECKING:
    from rich.table import Table

    from kdcache.progress import Progress
    from kdcache.recipe import Recipe
    from kdcache.student.record import RunRecord

app = typer.Typer(
    name="kdcache",
    help="Offline knowledge distillation: run the teacher once, share its cache, train many students from it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

RecipeArgument = Annotated[Path, typer.Argument(help="Recipe file, such as recipes/embedded.yaml.", show_default=False)]
Overrides = Annotated[
    Optional[list[str]],  # noqa: UP045 (typer reads the annotation at run time)
    typer.Argument(metavar="[KEY.PATH=VALUE]...", help="Recipe keys to override.", show_default=False),
]
CacheArgument = Annotated[str, typer.Argument(help="Cache directory, or the URL of one.", show_default=False)]
RunsArgument = Annotated[
    list[Path],
    typer.Argument(
        metavar="RUN",
        help="Run directories of kdcache train-student or reinforce; a directory of kdcache sweep or chain stands for what is finished.",
        show_default=False,
    ),
]


ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on with this run; a finished one is shown again.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Forget the earlier run in the output directory.")]


def _version(wanted: bool) -> None:
    if wanted:
        from kdcache import __version__

        say(f"kdcache {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def chosen_recipe(path: Path, overrides: list[str] | None) -> Recipe:
    """The recipe of a file with its overrides."""
    from kdcache.recipe import load_recipe

    return load_recipe(path, overrides)


def ready_embedded(recipe: Recipe, progress: Progress) -> None:
    """Make the recipe's embedded data and models where it has some and they are not there."""
    if recipe.embedded is not None:
        from kdcache.embedded.make import make_embedded

        make_embedded(recipe.embedded, progress)


def is_complete(directory: str) -> bool:
    """Whether a cache can be opened."""
    from kdcache.cache.store import open_cache
    from kdcache.errors import CacheError

    try:
        open_cache(directory)
    except CacheError:
        return False
    return True


def console_progress() -> Progress:
    """A bar on a terminal, plain lines elsewhere."""
    from rich.console import Console

    from kdcache.console import PlainProgress, TerminalProgress

    console = Console(stderr=False)
    return TerminalProgress(console) if console.is_terminal else PlainProgress(console)


def is_first_process() -> bool:
    """Whether this is the first, or the only, of the processes that a launcher started; it speaks for all."""
    return os.environ.get("RANK", "0") == "0"


def say(text: str) -> None:
    """Print one line."""
    print(printable(text), flush=True)


def say_lines(lines: list[str]) -> None:
    """Print lines."""
    for line in lines:
        say(line)


def say_scores(record: RunRecord) -> None:
    """Print a run's result table."""
    from kdcache.report import kl_note, result_columns, result_rows

    say_table(text_table(result_columns(record.scores), result_rows(record.scores)))
    say(kl_note(record.scores))


def say_table(table: Table) -> None:
    """Print a table."""
    from rich.console import Console

    Console().print(table)
