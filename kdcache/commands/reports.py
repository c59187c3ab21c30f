"""The command that turns runs and sweeps into a report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from kdcache.commands.app import app, say, say_table
from kdcache.console import text_table

_ON_A_TERMINAL = ("perplexity", "loss", "KL", "steps", "minutes")


@app.command()
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN_OR_SWEEP...",
            help="Run directories of kdcache train-student, directories of kdcache sweep and kdcache chain.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Optional[Path],  # noqa: UP045 (typer reads the annotation at run time)
        typer.Option(
            help="Folder for the report; by default report/ inside the directory given, runs/report for several.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Leaderboard, plots and recipes of runs and sweeps: report.md, PNG and SVG, and one page that needs no network."""
    from kdcache.report.blocks import Table
    from kdcache.report.write import write_report

    written = write_report(runs, output)
    board = next(b for s in written.document.sections for b in s.blocks if isinstance(b, Table))
    # A terminal has no room for everything; the page has.
    shown = [i for i, column in enumerate(board.columns) if i == 0 or column.label.startswith(_ON_A_TERMINAL)]
    say_table(
        text_table(
            [board.columns[i].label for i in shown], [[line.cells[i].text for i in shown] for line in board.lines]
        )
    )
    for row in written.found.rows:
        if row.state != "finished":
            say(f"{row.name} {row.state}" + (f": {' '.join(row.reason.split())}" if row.reason else ""))
    pages = [path for path in written.files if path.suffix in (".html", ".md")]
    say(
        "written: "
        + ", ".join(str(path) for path in pages)
        + f" and {len(written.files) - len(pages)} more files beside them"
    )
