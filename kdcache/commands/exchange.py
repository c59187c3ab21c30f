"""Commands that bring caches to other tools' formats and back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from kdcache.commands.app import CacheArgument, app, console_progress, say, say_lines
from kdcache.errors import DataError

_KINDS = "axolotl, distillkit or jsonl"


@app.command()
def export_cache(
    cache: CacheArgument,
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="Folder to make; it appears whole or not at all.", show_default=False)
    ],
    to: Annotated[
        str, typer.Option("--to", metavar="FORMAT", show_default=False, help=f"{_KINDS}; jsonl holds all of a cache.")
    ],
    temperature: Annotated[
        Optional[float],  # noqa: UP045 (typer reads the annotation at run time)
        typer.Option(
            metavar="T",
            show_default=False,
            help="axolotl: bake in this temperature; by default 1, or the cache's smallest.",
        ),
    ] = None,
    k: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--k", min=1, metavar="K", show_default=False, help="The K largest entries of each row alone."),
    ] = None,
    keep_mass: Annotated[
        bool, typer.Option("--keep-mass", help="axolotl: do not scale each row to one, as it expects by default.")
    ] = False,
) -> None:
    """Write a cache in the format of another tool, and say what that cannot hold."""
    from kdcache.cache.store import open_cache
    from kdcache.exchange.exporting import Options
    from kdcache.exchange.exporting import export_cache as exported

    progress = console_progress()
    opened = open_cache(cache, progress=progress)
    made = exported(opened, out, _kind(to, "--to"), Options(temperature, k, keep_mass), progress)
    say(f"{made.folder} holds {', '.join(f'{len(s):,} sequences of {n}' for n, s in opened.splits.items())}, for {to}")
    say_lines([f"lost: {note}" for note in made.notes] or ["lost: nothing, import-cache makes the same cache of it"])


@app.command()
def import_cache(
    source: Annotated[
        Path, typer.Argument(metavar="SRC", help="File or folder of the other tool's data.", show_default=False)
    ],
    cache: Annotated[Path, typer.Argument(metavar="CACHE", help="Cache directory to make.", show_default=False)],
    source_format: Annotated[str, typer.Option("--from", metavar="FORMAT", show_default=False, help=f"{_KINDS}.")],
    tokenizer: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            metavar="FOLDER_OR_ID", show_default=False, help="Whose token numbers they are; a jsonl export needs none."
        ),
    ] = None,
    teacher: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            metavar="NAME_OR_FOLDER", show_default=False, help="Who made them, for the cache's plan and card."
        ),
    ] = None,
    temperature: Annotated[float, typer.Option(metavar="T", help="Temperature of the log-probabilities.")] = 1.0,
    holdout: Annotated[
        int,
        typer.Option(min=0, metavar="N", help="The last N sequences become the validation split, where there is none."),
    ] = 0,
    positions_per_shard: Annotated[
        int, typer.Option(min=1, metavar="N", help="About so many rows go into a shard.")
    ] = 65_536,
) -> None:
    """Make a cache of another tool's data; every number is checked, and what they do not say is told and kept in its card."""
    from kdcache.exchange.imported_plan import Given
    from kdcache.exchange.importing import import_cache as imported

    given = Given(tokenizer, teacher, temperature, holdout, positions_per_shard)
    made = imported(source, cache, _kind(source_format, "--from"), given, console_progress())
    splits = ", ".join(f"{s.sequences:,} sequences of {s.name}" for s in made.cache.manifest.splits)
    say(f"{made.cache.directory} holds the cache {made.cache.manifest.cache_id[:12]}: {splits}")
    say_lines(
        [f"note: {note}" for note in made.notes]
        or ["note: the same cache as the one that was exported, which its id shows"]
    )


def _kind(name: str, option: str) -> Any:
    from kdcache.exchange.importing import KINDS

    if name not in KINDS:
        raise DataError(f"expected {option} {_KINDS}, found {name}")
    return name
