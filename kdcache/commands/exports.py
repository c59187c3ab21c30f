"""The command that hands a finished student to others."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Optional

import typer

from kdcache.commands.app import app, console_progress, say, say_table
from kdcache.console import text_table


@app.command()
def export(
    run: Annotated[
        Path,
        typer.Argument(metavar="RUN", help="Run directory of kdcache train-student or reinforce.", show_default=False),
    ],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="Folder to make; it appears whole or not at all.", show_default=False)
    ],
    to: Annotated[
        list[str],
        typer.Option(
            "--to",
            metavar="FORM",
            show_default=False,
            help="merged, nf4, int8, gguf-f16, gguf-q8_0, gguf-q4_0 or adapter; give it several times, or several with commas. One form "
            "lies in OUT itself, of several each in its own folder.",
        ),
    ],
    cache: Annotated[
        Optional[str],  # noqa: UP045 (typer reads the annotation at run time)
        typer.Option(
            metavar="DIR_OR_URL", show_default=False, help="The run's cache, where it is not where the recipe says."
        ),
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare/--no-compare", help="Load every form again and hold it against the run.")
    ] = True,
    base_model: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            metavar="USER/NAME", show_default=False, help="The base's id on the Hub, for the card and the adapter."
        ),
    ] = None,
    licence: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--license", show_default=False, help="For the model card; by default the base's, if that is known."
        ),
    ] = None,
    push: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            metavar="USER/NAME", show_default=False, help="Send the export to this model repository of the Hub."
        ),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private/--public", help="Who sees a Hub repository that is created.")
    ] = True,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier export in OUT, and what lies in the repository.")
    ] = False,
) -> None:
    """Write a student as ordinary model folders, GGUF files or its adapter; each is loaded again and compared with the run."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    from kdcache.export.publish import checked_repository, publish

    repository = None if push is None else checked_repository(push)
    from kdcache.export.card import EXPORT_COLUMNS, export_rows, note_of
    from kdcache.export.run import export as exported

    progress = console_progress()
    names = [name.strip() for given in to for name in given.split(",") if name.strip()]
    made = exported(
        run, out, names, cache=cache, compare=compare, base_model=base_model, licence=licence, overwrite=overwrite, progress=progress
    )  # fmt: skip
    say_table(text_table(EXPORT_COLUMNS, export_rows(made.rows)))
    say(note_of(made.rows))
    say(f"written: {made.folder}, with a model card")
    if repository is not None:
        commit = publish(made.folder, repository, private=private, overwrite=overwrite, progress=progress)
        say(f"https://huggingface.co/{repository} holds it: commit {commit[:12]}")
