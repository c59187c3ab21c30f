"""Commands that make a cache from caches: part of one, several as one, a damaged one made whole."""

from __future__ import annotations

import re
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from kdcache.commands.app import app, chosen_recipe, console_progress, ready_embedded, say
from kdcache.console import byte_size

if TYPE_CHECKING:
    from collections.abc import Callable

    from kdcache.cache.derive import DerivedCache
    from kdcache.cache.manifest import Plan
    from kdcache.cache.repair import Repair
    from kdcache.progress import Progress

Source = Annotated[str, typer.Argument(metavar="SRC", help="Cache directory, or the URL of one.", show_default=False)]
# What `subset` records of itself, beside the splits, and the options that ask for it.
_OPTIONS = {"k": "--k", "max_length": "--max-length", "sequences": "--sequences"}
_RANGE = re.compile(r"(-?\d{1,15})?:(-?\d{1,15})?")


@app.command()
def subset(
    source: Source,
    destination: Annotated[str, typer.Argument(metavar="DEST", help="Directory of the subset.", show_default=False)],
    split: Annotated[
        Optional[list[str]],  # noqa: UP045 (typer reads the annotation at run time)
        typer.Option(help="Split to take; may be given several times. All by default.", show_default=False),
    ] = None,
    sequences: Annotated[
        str,
        typer.Option(metavar="A:B", help="Sequences A up to B (not included) of every split taken, as Python counts."),
    ] = ":",
    max_length: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            help="Cut sequences to so many tokens; those without a target left are dropped.", show_default=False
        ),
    ] = None,
    k: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            "--k", help="Keep the K largest entries of each row (top_k and threshold alone).", show_default=False
        ),
    ] = None,
) -> None:
    """Make a cache of part of another, without the teacher; run again to go on where it stopped."""
    from kdcache.cache.store import open_cache
    from kdcache.cache.subset import subset as take

    _refuse_url(destination)
    progress = console_progress()
    made = take(
        open_cache(source, keep=2, progress=progress), destination, splits=split or (), sequences=_range(sequences), max_length=max_length, k=k,
        progress=progress,
    )  # fmt: skip
    _say_derived(made, "subset")


@app.command()
def merge(
    caches: Annotated[
        list[str],
        typer.Argument(
            metavar="SRC SRC... DEST", help="Cache directories or URLs, then the new directory.", show_default=False
        ),
    ],
) -> None:
    """Make one cache of several by the same teacher, tokenizer and selection; run again to go on where it stopped."""
    from kdcache.cache.merge import merge as join
    from kdcache.cache.store import open_cache

    *sources, destination = caches
    if len(sources) < 2:
        raise typer.BadParameter(f"expected at least two caches and a destination, found {' '.join(caches)}")
    _refuse_url(destination)
    progress = console_progress()
    _say_derived(join([open_cache(s, progress=progress) for s in sources], destination, progress=progress), "merge")


@app.command()
def repair(
    cache: Annotated[str, typer.Argument(help="Cache directory.", show_default=False)],
    source: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--from", help="Another copy of the cache, to fetch damaged files from.", show_default=False),
    ] = None,
    recipe: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="The cache's recipe, to make damaged shards again with the teacher.", show_default=False),
    ] = None,
) -> None:
    """Fetch, make again or rebuild what kdcache verify names; exit 0 when the cache is whole then, 1 when it is not."""
    from kdcache.cache.remote import parse_location
    from kdcache.cache.repair import repair as mend
    from kdcache.cache.share import fetcher
    from kdcache.errors import TransferError

    location = parse_location(cache)
    if not location.local:
        raise TransferError(
            f"repair mends a directory of this machine, not {location}; kdcache pull {location} DIRECTORY brings what is good "
            "there, kdcache push DIRECTORY --overwrite sends a repaired cache back"
        )
    directory, progress = location.path, console_progress()
    fetch = None if source is None else fetcher(source)
    make = None if recipe is None else _teacher_run(recipe, directory, progress)
    done = mend(directory, fetch=fetch, make=make, progress=progress)
    left = {f.file for f in done.after.findings}
    for finding in done.refused:
        say(f"{finding.file}: not taken from {source}: {finding.problem}")
    for name in dict.fromkeys([*done.fetched, *(f.file for f in done.before)]):
        if name not in left:
            say(
                f"{name}: {'fetched' if name in done.fetched else 'made again' if 'shards/' in name else 'written again'}"
            )
    for finding in done.after.findings:
        say(f"{finding.file}: {finding.problem}")
    if left:
        count = len(done.after.findings)
        say(f"{cache} is not whole: {count} finding{'s' if count > 1 else ''}. {_way_out(directory, done)}")
        raise typer.Exit(1)
    say(f"{cache} is whole: {done.after.shards} shards, {byte_size(done.after.bytes)}, cache id {done.after.cache_id}")


def _refuse_url(destination: str) -> None:
    from kdcache.cache.remote import is_url
    from kdcache.errors import CacheError

    if is_url(destination):
        raise CacheError(
            f"the new cache is made in a directory of this machine, found {destination}; kdcache push it then"
        )


def _say_derived(made: DerivedCache, what: str) -> None:
    """What a derived cache holds."""
    manifest = made.manifest
    size, positions = sum(s.bytes for s in manifest.shards), sum(s.positions for s in manifest.splits)
    did = f"{what} of {len(manifest.shards)} shards" if made.shards_made else "complete already"
    say(f"cache {made.directory}: {did}; {positions:,} positions, {byte_size(size)}, {size / positions:.1f} bytes each")
    for split, planned in zip(manifest.splits, made.plan.data.splits, strict=True):
        say(
            f"  {split.name}: {split.sequences:,} sequences, {split.tokens:,} tokens, {split.positions:,} positions, teacher "
            f"perplexity {split.teacher_perplexity:.3f}; {planned.truncated:,} cut, {planned.dropped_no_target:,} dropped "
            "with no target left"
        )
    say(f"cache id {manifest.cache_id}")


def _range(text: str) -> tuple[int | None, int | None]:
    """First and one past the last of ``A:B``."""
    match = _RANGE.fullmatch(text.strip())
    if match is None:
        raise typer.BadParameter(
            f"--sequences should be A:B with whole numbers, either of which may be left out; found {text}"
        )
    first, last = (None if number is None else int(number) for number in match.groups())
    return first, last


def _teacher_run(path: Path, cache: Path, progress: Progress) -> Callable[[], object]:
    """A teacher run into the cache, by its own recipe."""
    from kdcache.errors import RecipeError

    recipe = chosen_recipe(path, None)
    if Path(recipe.cache.directory).resolve() != cache.resolve():
        raise RecipeError(
            f"the recipe {path} makes the cache {recipe.cache.directory}, not {cache}; give the recipe that made it, with the "
            "key cache.directory changed if it has moved"
        )

    def run() -> object:
        from kdcache.teacher.capture import capture

        ready_embedded(recipe, progress)
        return capture(recipe, progress)

    return run


def _way_out(cache: Path, done: Repair) -> str:
    """What else mends what is left."""
    from kdcache.cache.layout import PLAN_FILE

    files = {f.file for f in done.after.findings}
    if PLAN_FILE in files:
        return "Its shards are good and are not those that its plan was made for: fetch the whole cache again"
    return (
        f"kdcache repair {quote(str(cache))} --from COPY fetches these from another copy (a directory or a URL); "
        f"{_remake(cache, done.plan)}"
    )


def _remake(cache: Path, plan: Plan) -> str:
    """The command that makes damaged shards again."""
    derived = plan.derived
    if derived is None:
        return f"kdcache repair {quote(str(cache))} --recipe RECIPE makes them again with the teacher"
    # Whoever made the plan wrote the settings, and the command is there to be pasted into a shell.
    settings = derived.settings
    options = [f"--split {quote(name)}" for name in settings.get("splits", "").split(",") if name]
    options += [f"{option} {quote(settings[key])}" for key, option in _OPTIONS.items() if key in settings]
    sources = " ".join(f"CACHE-{parent[:12]}" for parent in derived.parents[:4])
    more = " ..." if len(derived.parents) > 4 else ""
    return f"{' '.join(['kdcache', derived.operation, sources + more, quote(str(cache)), *options])} makes them again"
