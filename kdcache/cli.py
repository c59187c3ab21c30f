"""The commands. The only module that prints; everything heavy is imported inside the command that needs it."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from kdcache.console import byte_size, number_list, printable, text_table
from kdcache.errors import KdcacheError

if TYPE_CHECKING:
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
        bool, typer.Option("--dry-run", help="Measure a small sample, predict size, time and memory, write nothing.")
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

        e = estimate(chosen, progress)
        _print(f"measured on {e.sampled_positions:,} of {e.positions:,} positions; the whole run is predicted to take")
        _print(
            f"  size    {byte_size(e.cache_bytes)} in {e.shards} shards, {e.cache_bytes / e.positions:.1f} bytes per position"
        )
        _print(f"  time    {e.seconds:,.0f} s, {e.positions / e.seconds:,.0f} positions/s")
        _print(f"  memory  {byte_size(e.memory_bytes)} of {e.memory_of} memory at the peak")
        return
    from kdcache.teacher.capture import capture

    result = capture(chosen, progress)
    size = sum(s.bytes for s in result.manifest.shards)
    positions = sum(s.positions for s in result.manifest.splits)
    did = f"{result.shards_made} shards made in {result.seconds:.0f} s" if result.shards_made else "complete already"
    _print(
        f"cache {result.directory}: {did}; {positions:,} positions, {byte_size(size)}, {size / positions:.1f} bytes each"
    )
    for split in result.manifest.splits:
        perplexity = split.teacher_perplexity
        mass = ", ".join(
            f"{m:.4f} at T={t:g}" for m, t in zip(split.kept_mass_mean, chosen.selection.temperatures, strict=True)
        )
        _print(f"  {split.name}: teacher perplexity {perplexity:.3f}, kept mass {mass}")
    thin = [
        t
        for t, m in zip(chosen.selection.temperatures, result.manifest.splits[0].kept_mass_mean, strict=True)
        if m < 0.5
    ]
    if thin:
        progress.warning(
            f"at T = {number_list(tuple(thin))} most of the probability lies outside the kept entries; raise selection.k, "
            "or train at a lower temperature"
        )
    _print(f"cache id {result.manifest.cache_id}")


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

    opened = open_cache(cache)
    plan, manifest = opened.plan, opened.manifest
    size, raw = sum(s.bytes for s in manifest.shards), sum(s.raw_bytes for s in manifest.shards)
    positions = sum(s.positions for s in manifest.splits)
    selection = plan.selection
    facts = [
        ("cache id", opened.id),
        ("format", f"{manifest.format} version {manifest.version}, plan {plan.digest[:12]}"),
        ("teacher", f"{plan.teacher.name} ({plan.teacher.architecture}, {plan.teacher.quantization}, {plan.teacher.dtype})"),
        ("tokenizer", f"{plan.tokenizer.vocab_size:,} tokens, fingerprint {plan.tokenizer.fingerprint[:12]}"),
        ("data", f"{plan.data.shape}, prompt {plan.data.prompt}, at most {plan.data.max_length} tokens"),
        ("kept", f"{selection.method}, k {selection.k}, floor {selection.floor:g}, temperatures {number_list(selection.temperatures)}"),
        ("size", f"{byte_size(size)} in {len(manifest.shards)} shards ({byte_size(raw)} unpacked), {size / positions:.1f} bytes per position"),
    ]  # fmt: skip
    for name, value in facts:
        _print(f"{name:10} {value}")
    for summary, split in zip(manifest.splits, plan.data.splits, strict=True):
        _print(f"\n{summary.name}: {split.source} {split.selected}")
        _print(f"  {summary.sequences:,} sequences, {summary.tokens:,} tokens, {summary.positions:,} positions")
        _print(
            f"  {split.dropped_empty:,} examples dropped as empty, {split.dropped_no_target:,} with no target left, {split.truncated:,} cut"
        )
        _print(
            f"  {summary.entries / summary.positions:.1f} entries per position, teacher perplexity {summary.teacher_perplexity:.3f}"
        )
        _print(
            f"  kept mass at T = {number_list(selection.temperatures)}: mean {number_list(summary.kept_mass_mean, 4)}, first percentile {number_list(summary.kept_mass_p1, 3)}"
        )


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


def _table(record: RunRecord) -> None:
    from rich.console import Console

    from kdcache.report import RESULT_COLUMNS, result_rows

    Console().print(text_table(RESULT_COLUMNS, result_rows(record.scores)))
