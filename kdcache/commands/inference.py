"""Commands that measure how fast and how large students are."""

from __future__ import annotations

from typing import Annotated, Any, Optional

import typer

from kdcache.commands.app import RunsArgument, app, console_progress, say, say_lines, say_table
from kdcache.console import byte_size, text_table

_COLUMNS = ("model", "tokens/s", "spread", "1st token", "memory", "on disk")


@app.command()
def bench_inference(
    runs: RunsArgument,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts at a time.")] = 1,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 64,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens generated for each prompt.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Measurements, after one that does not count.")] = 5,
    teacher: Annotated[
        Optional[str],  # noqa: UP045 (typer reads the annotation at run time)
        typer.Option(help="Teacher, if it lies elsewhere now.", show_default=False),
    ] = None,
) -> None:
    """Speed, memory and size on disk of teacher and student, merged and quantised, each in a process of its own."""
    from kdcache.evaluate.inference import InferenceBench, Workload
    from kdcache.evaluate.saved_run import run_directories

    progress = console_progress()
    bench = InferenceBench(Workload(batch_size, prompt_tokens, new_tokens, repeats), teacher=teacher, progress=progress)
    found = run_directories(runs, progress)
    # All of them before the first is measured.
    for run in found:
        bench.check(run)
    for run in found:
        values = bench.run(run)
        say_table(text_table(_COLUMNS, [_cells(row) for row in values["rows"]]))
        for row in values["rows"]:
            if row["error"] is not None:
                say(f"{row['model']} failed: {row['error']}")
        say_lines([_memory_note(values["rows"]), f"written: {run / 'inference.json'}"])
    say(
        f"greedy, {batch_size} x {new_tokens} new tokens after {prompt_tokens}, the prompt's time included: median of {repeats}, spread from "
        "least to most; on disk: what save_pretrained writes, without the tokenizer"
    )


def _memory_note(rows: list[dict[str, Any]]) -> str:
    libraries = [row["libraries_bytes"] for row in rows if row["memory_of"] == "process"]
    if not libraries:
        return "memory: most that was allocated on the GPU"
    return f"memory: peak of a fresh process; libraries alone take {byte_size(max(libraries))} of it"


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    if row["error"] is not None:
        return (row["model"], "failed", *[""] * (len(_COLUMNS) - 2))
    return (
        row["model"],
        f"{row['tokens_per_second']:,.0f}",
        f"{(row['tokens_per_second_max'] - row['tokens_per_second_min']) / row['tokens_per_second']:.0%}",
        f"{1000 * row['time_to_first_token']:,.0f} ms",
        byte_size(row["memory_bytes"]),
        byte_size(row["disk_bytes"]),
    )
