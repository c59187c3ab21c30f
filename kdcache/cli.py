"""The commands. The only module that prints; everything heavy is imported inside the command that needs it."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from kdcache.console import printable, text_table
from kdcache.errors import KdcacheError
from kdcache.summary import cache_lines, capture_lines, estimate_lines

if TYPE_CHECKING:
    from rich.table import Table

    from kdcache.progress import Progress
    from kdcache.recipe import Recipe
    from kdcache.student.record import RunRecord

_INTERRUPTED = 130

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
CacheArgument = Annotated[Path, typer.Argument(help="Cache directory.", show_default=False)]
RunArgument = Annotated[Path, typer.Argument(help="Run directory of kdcache train-student.", show_default=False)]


def _version(wanted: bool) -> None:
    if wanted:
        from kdcache import __version__

        _print(f"kdcache {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def teacher_cache(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Measure a small sample, predict size, time and memory; no cache is written."),
    ] = False,
    if_incomplete: Annotated[
        bool, typer.Option("--if-incomplete", help="Do nothing when the cache directory is complete already.")
    ] = False,
) -> None:
    """Run the teacher once and write its cache; run again to go on where it stopped."""
    chosen, progress = _recipe(recipe, overrides), _progress()
    if if_incomplete and _is_complete(chosen.cache.directory):
        _print(f"cache {chosen.cache.directory}: complete already")
        return
    _embedded(chosen, progress)
    if dry_run:
        from kdcache.teacher.estimate import estimate

        _lines(estimate_lines(estimate(chosen, progress)))
        return
    from kdcache.teacher.capture import capture

    lines, warning = capture_lines(capture(chosen, progress))
    _lines(lines)
    if warning is not None:
        progress.warning(warning)


@app.command()
def train_student(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with this run; a finished one is shown again.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Forget the earlier run in the output directory.")
    ] = False,
) -> None:
    """Train a student from a cache and print the result table."""
    chosen, progress = _recipe(recipe, overrides), _progress()
    _embedded(chosen, progress)
    from kdcache.report import write_pages
    from kdcache.student.distill import distill

    record = distill(chosen, resume=resume, overwrite=overwrite, progress=progress)
    pages = write_pages(record)
    _table(record)
    _print(f"student in {record.output / 'model'}; record, log and plot: " + ", ".join(
        p.name for p in (record.output / "run.json", record.output / "log.csv", *pages)
    ) + f" in {record.output}")  # fmt: skip


@app.command()
def evaluate(
    run: RunArgument,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences per forward pass.")] = 8,
) -> None:
    """Score a finished run again, from its saved student and its cache."""
    from kdcache.evaluate.saved_run import score_saved_run

    record = score_saved_run(run, batch_size=batch_size, progress=_progress())
    _table(record)


@app.command()
def inspect(cache: CacheArgument) -> None:
    """Facts about a cache: teacher, data, what is kept, sizes, kept mass."""
    from kdcache.cache.reader import open_cache

    _lines(cache_lines(open_cache(cache)))


@app.command()
def fidelity(
    what: Annotated[
        Path, typer.Argument(help="Cache directory, or a recipe whose cache need not exist.", show_default=False)
    ],
    overrides: Overrides = None,
    teacher: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Folder or id of the cache's teacher, where it is not found under its name."),
    ] = None,
    student: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Student whose gradient is compared; a recipe's own by default."),
    ] = None,
    positions: Annotated[int, typer.Option(min=16, help="About how many positions to measure.")] = 2048,
    compare: Annotated[bool, typer.Option(help="Measure other settings beside the chosen one.")] = True,
    output: Annotated[Path, typer.Option(help="Folder for fidelity.md, .json and .png.")] = Path("runs/fidelity"),
) -> None:
    """How faithful a cache is per byte, or would be: its teacher is run again on a sample, in full."""
    from kdcache.errors import RecipeError
    from kdcache.evaluate.fidelity_run import cache_fidelity, recipe_fidelity
    from kdcache.report import FIDELITY_COLUMNS, PARTS_COLUMNS, fidelity_rows, parts_rows, write_fidelity

    progress = _progress()
    options: dict[str, Any] = {"student": student, "positions": positions, "compare": compare, "progress": progress}
    if what.is_dir() or what.suffix not in (".yaml", ".yml"):
        if overrides:
            raise RecipeError(f"{overrides[0]} is a recipe key, but {what} is a cache; give a recipe to change keys")
        report = cache_fidelity(what, teacher=teacher, **options)
    else:
        recipe = _recipe(what, [*(overrides or []), *([f"teacher.model={teacher}"] if teacher else [])])
        _embedded(recipe, progress)
        report = recipe_fidelity(recipe, **options)
    _print(f"{report.title}; mass: exact entries, mean and first percentile; cos, error: of the student's gradient")
    _rich(text_table(FIDELITY_COLUMNS, fidelity_rows(report)))
    _rich(text_table(PARTS_COLUMNS, parts_rows(report)))
    _print("table, figures and plot: " + ", ".join(str(p) for p in write_fidelity(report, output)))


@app.command()
def verify(cache: CacheArgument) -> None:
    """Check every byte of a cache; exit 0 when it is whole, 1 when it is not."""
    from kdcache.cache.reader import read_plan
    from kdcache.cache.verify import verify as check

    plan, progress = read_plan(cache), _progress()
    progress.begin("verify", len(plan.shards), "shards")
    try:
        findings = check(cache, on_shard=lambda size: progress.advance(1))
    finally:
        progress.end()
    for finding in findings:
        _print(f"{finding.file}: {finding.problem}")
    if findings:
        _print(f"{cache} is not whole: {len(findings)} findings")
        raise typer.Exit(1)
    _print(f"{cache} is whole: {len(plan.shards)} shards, hashes, values and totals agree")


@app.command()
def embedded(recipe: RecipeArgument, overrides: Overrides = None) -> None:
    """Make the built-in data, tokenizer, teacher and student of a recipe, where they are not there yet."""
    from kdcache.errors import RecipeError

    chosen = _recipe(recipe, overrides)
    if chosen.embedded is None:
        raise RecipeError(f"{recipe} has no section embedded")
    _embedded(chosen, _progress())
    _print(f"data and models in {chosen.embedded.directory}")


def main() -> None:
    """Run a command: errors of ours become one line and exit code 2, Ctrl-C one line and 130."""
    # Deprecations and advice of the libraries are for us, not for who runs the command.
    warnings.simplefilter("ignore")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # Threads that spin while they wait halve the speed of a machine that does anything else.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        code = app(standalone_mode=False)
        # typer turns Ctrl-C inside a command into this exit code, without a word.
        if code == _INTERRUPTED:
            raise KeyboardInterrupt
    except KdcacheError as exc:
        _fail(f"error: {exc}", 2)
    except KeyboardInterrupt:
        _fail(
            "stopped; what is committed stays, run the same command again (train-student with --resume) to go on",
            _INTERRUPTED,
        )
    except typer.Abort:
        _fail("stopped", _INTERRUPTED)
    except Exception as exc:
        if type(exc).__name__ == "NoArgsIsHelpError":
            _print(str(exc))
            sys.exit(2)
        # click's own usage errors know how to show themselves; anything else is a bug and keeps its traceback.
        show = getattr(exc, "format_message", None)
        if show is None:
            raise
        _fail(f"error: {show()} (see kdcache --help)", 2)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(line: str, code: int) -> None:
    sys.stdout.flush()
    print(printable(" ".join(line.split())), file=sys.stderr, flush=True)
    sys.exit(code)


def _recipe(path: Path, overrides: list[str] | None) -> Recipe:
    from kdcache.recipe import load_recipe

    return load_recipe(path, overrides)


def _embedded(recipe: Recipe, progress: Progress) -> None:
    if recipe.embedded is not None:
        from kdcache.embedded.make import make_embedded

        make_embedded(recipe.embedded, progress)


def _is_complete(directory: str) -> bool:
    from kdcache.cache.reader import open_cache
    from kdcache.errors import CacheError

    try:
        open_cache(directory)
    except CacheError:
        return False
    return True


def _progress() -> Progress:
    from rich.console import Console

    from kdcache.console import PlainProgress, TerminalProgress

    console = Console(stderr=False)
    return TerminalProgress(console) if console.is_terminal else PlainProgress(console)


def _print(text: str) -> None:
    print(printable(text), flush=True)


def _lines(lines: list[str]) -> None:
    for line in lines:
        _print(line)


def _table(record: RunRecord) -> None:
    from kdcache.report import kl_note, result_columns, result_rows

    _rich(text_table(result_columns(record.scores), result_rows(record.scores)))
    _print(kl_note(record.scores))


def _rich(table: Table) -> None:
    from rich.console import Console

    Console().print(table)
