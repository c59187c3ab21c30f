"""Commands that move caches between machines."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from kdcache.commands.app import app, console_progress, say
from kdcache.console import byte_size

if TYPE_CHECKING:
    from kdcache.cache.receive import Moved

Workers = Annotated[int, typer.Option(min=1, max=64, help="Objects under way at once.")]


@app.command()
def push(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="Complete cache directory, or the URL of one.", show_default=False)
    ],
    destination: Annotated[
        str,
        typer.Argument(
            metavar="DEST", help="s3://, gs://, hf://datasets/USER/NAME, file:// or a directory.", show_default=False
        ),
    ],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what lies there; of the same cache, read every object back.")
    ] = False,
    workers: Workers = 4,
    private: Annotated[
        bool, typer.Option("--private/--public", help="Who sees a Hub repository that is created.")
    ] = True,
    licence: Annotated[
        Optional[str],  # noqa: UP045 (typer reads the annotation at run time)
        typer.Option("--license", help="Licence for the data card on the Hub, such as cc-by-4.0.", show_default=False),
    ] = None,
) -> None:
    """Send a cache: shards first, the manifest last; the same command goes on after an interruption."""
    from kdcache.cache.remote import parse_location
    from kdcache.cache.store import local_directory
    from kdcache.errors import TransferError

    progress = console_progress()
    # The bar is ours, and that nothing has changed is no warning. Both are read when the package is first imported.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    directory = local_directory(source, progress=progress)
    if parse_location(destination).protocol != "hf":
        from kdcache.cache.share import push as send

        if licence is not None:
            raise TransferError("--license is for hf://; elsewhere the data card goes as it is, so edit its README.md")
        moved = send(directory, destination, overwrite=overwrite, workers=workers, progress=progress)
        say(f"{destination} holds the cache {moved.cache_id[:12]}: {_counts(moved)}")
        return
    from kdcache.cache.hub import publish

    published = publish(
        directory, destination, private=private, licence=licence, overwrite=overwrite, progress=progress
    )
    say(
        f"{published.repository} holds the cache {published.tag[:12]}: commit {published.commit[:12]}, {byte_size(published.bytes)}"
    )
    say(f"for good: {published.repository}@{published.tag}")


@app.command()
def pull(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC", help="s3://, gs://, hf://, https:// or file:// URL of a cache.", show_default=False
        ),
    ],
    destination: Annotated[str, typer.Argument(metavar="DEST", help="Directory on this machine.", show_default=False)],
    cache_id: Annotated[
        Optional[str],  # noqa: UP045 (typer reads the annotation at run time)
        typer.Option("--cache-id", help="Refuse any other cache; 12 to 64 hex digits.", show_default=False),
    ] = None,
    workers: Workers = 8,
) -> None:
    """Bring a cache, every object checked before it is used; the same command goes on after an interruption."""
    from kdcache.cache.share import pull as bring

    moved = bring(source, destination, cache_id=cache_id, workers=workers, progress=console_progress())
    say(f"{destination} holds the cache {moved.cache_id[:12]}: {_counts(moved)}")


def _counts(moved: Moved) -> str:
    return f"{moved.objects:,} objects moved ({byte_size(moved.bytes)}), {moved.kept:,} there already"
