"""Commands that judge finished runs."""

from __future__ import annotations

from typing import Annotated

import typer

from kdcache.commands.app import RunArgument, app, console_progress, say_scores


@app.command()
def evaluate(
    run: RunArgument,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences per forward pass.")] = 8,
) -> None:
    """Score a finished run again, from its saved student and its cache."""
    from kdcache.evaluate.saved_run import score_saved_run

    record = score_saved_run(run, batch_size=batch_size, progress=console_progress())
    say_scores(record)
