"""Commands that judge finished runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from kdcache.commands.app import RunsArgument, app, console_progress, say, say_lines, say_table
from kdcache.console import text_table
from kdcache.errors import KdcacheError

if TYPE_CHECKING:
    from kdcache.evaluate.evaluation import Evaluation


@app.command()
def evaluate(
    runs: RunsArgument,
    batch_size: Annotated[
        Optional[int],  # noqa: UP045 (typer reads the annotation at run time)
        typer.Option(
            min=1,
            metavar="N",
            show_default=False,
            help="Sequences per forward pass; by default as many as in the run for the scores, which come out the same to the "
            "last bit, and 8 for everything else.",
        ),
    ] = None,
    generate: Annotated[
        int,
        typer.Option(min=0, metavar="N", help="Answer N validation prompts greedily; ROUGE-L, exact match, retention."),
    ] = 0,
    max_new_tokens: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            min=1,
            metavar="N",
            show_default=False,
            help="Tokens that an answer may have; by default as many as the longest reference, at most 256.",
        ),
    ] = None,
    samples: Annotated[
        int, typer.Option(min=0, metavar="K", help="Show the answers to the first K validation prompts side by side.")
    ] = 0,
    tasks: Annotated[
        str,
        typer.Option(
            metavar="NAME,...",
            show_default=False,
            help="Tasks of lm-evaluation-harness. With --task-data these come with kdcache and need no network: agieval, "
            "arc_challenge, gsm8k, gsm8k_8shot, hellaswag, mgsm_en, mgsm_es, mmlu, openbookqa, squad. Any other name, and "
            "all of them without --task-data, are the harness's own.",
        ),
    ] = "",
    task_data: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="DIR", show_default=False, help="Folder below which the tasks' JSON Lines files lie."),
    ] = None,
    limit: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, show_default=False, metavar="N", help="The first N examples of each task alone."),
    ] = None,
    chat_template: Annotated[
        bool, typer.Option("--chat-template", help="Put the tasks' prompts through the student's chat template.")
    ] = False,
    teacher: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            metavar="FOLDER_OR_ID", show_default=False, help="The teacher, where it is not where the recipe says."
        ),
    ] = None,
    cache: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            metavar="DIR_OR_URL", show_default=False, help="The cache, where it is not where the recipe says."
        ),
    ] = None,
) -> None:
    """Judge finished runs against their cache, on generations and on benchmarks; results are kept in evaluation.json."""
    chosen = tuple(name.strip() for name in tasks.split(",") if name.strip())
    if tasks and not chosen:
        raise KdcacheError(f"--tasks {tasks!r} names no task; give names with commas between them, or leave it out")
    asked = bool(generate or samples)
    for option, given, used, needs in (
        ("--max-new-tokens", max_new_tokens is not None, asked, "--generate or --samples"),
        ("--task-data", task_data is not None, bool(chosen), "--tasks"),
        ("--limit", limit is not None, bool(chosen), "--tasks"),
        ("--chat-template", chat_template, bool(chosen), "--tasks"),
        ("--teacher", teacher is not None, asked or bool(chosen), "--generate, --samples or --tasks"),
    ):
        if given and not used:
            raise KdcacheError(f"{option} goes with {needs}; add that, or leave {option} out")
    from kdcache.evaluate.evaluation import Wanted
    from kdcache.evaluate.evaluation import evaluate as evaluated
    from kdcache.evaluate.tables import leaderboard, write_page
    from kdcache.run_record import EVALUATION_FILE, EVALUATION_PAGE

    wanted = Wanted(
        batch_size=batch_size,
        generate=generate,
        max_new_tokens=max_new_tokens,
        samples=samples,
        tasks=chosen,
        task_data=task_data,
        limit=limit,
        chat_template=chat_template,
        teacher=teacher,
        cache=cache,
    )
    done = []
    for evaluation in evaluated(runs, wanted, console_progress()):
        write_page(evaluation)
        _say(evaluation)
        done.append(evaluation)
    if len(done) > 1:
        columns, rows = leaderboard(done)
        say_table(text_table(columns, rows))
    say(f"written: {EVALUATION_FILE} and {EVALUATION_PAGE} in " + ", ".join(str(e.run) for e in done))


def _say(evaluation: Evaluation) -> None:
    from kdcache.evaluate.tables import (
        ROUGE_NOTE,
        generation_table,
        sample_lines,
        score_note,
        score_table,
        task_table,
        title,
    )
    from kdcache.intervals import INTERVAL_NOTE
    from kdcache.report import kl_note

    values, measured = evaluation.values, evaluation.measured
    say(title(evaluation))
    say_table(text_table(*score_table(values)))
    say(f"{kl_note(values['scores'])} {score_note(values)}")
    if "generation" in measured:
        say_table(text_table(*generation_table(values)))
        say(f"{ROUGE_NOTE} {INTERVAL_NOTE}")
    if "tasks" in measured:
        say_table(text_table(*task_table(values, evaluation.tasks)))
        say(INTERVAL_NOTE)
    if "samples" in measured:
        say_lines(["", *sample_lines(values)])
