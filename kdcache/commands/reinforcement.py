"""The command that reinforces a distilled student."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from kdcache.commands.app import (
    Overrides,
    OverwriteOption,
    ResumeOption,
    app,
    console_progress,
    say,
    say_lines,
    say_table,
)
from kdcache.console import text_table

if TYPE_CHECKING:
    from kdcache.progress import Progress
    from kdcache.recipe_reinforce import ReinforceRecipe


@app.command()
def reinforce(
    run: Annotated[
        Path,
        typer.Argument(
            metavar="RUN",
            help="Run directory of kdcache train-student, or of an earlier reinforcement; its cache is not needed.",
            show_default=False,
        ),
    ],
    recipe: Annotated[
        Path,
        typer.Argument(
            help="Recipe of recipes/reinforce, such as recipes/reinforce/embedded.yaml.", show_default=False
        ),
    ],
    overrides: Overrides = None,
    resume: ResumeOption = False,
    overwrite: OverwriteOption = False,
    seeds: Annotated[
        Optional[str],  # noqa: UP045 (typer reads the annotation at run time)
        typer.Option(
            metavar="N,...",
            show_default=False,
            help="Do it once for each of these seeds, in OUTPUT/seed-N, and compare them.",
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Check run, recipe and data, and say what it comes to; nothing is trained or written."
        ),
    ] = False,
) -> None:
    """Reinforce a distilled student by GRPO on questions with checkable answers; the KL is to the student as it was distilled."""
    from kdcache.recipe_reinforce import load_reinforce_recipe

    chosen, progress = load_reinforce_recipe(recipe, overrides), console_progress()
    numbers = _numbers(seeds)
    if dry_run:
        from kdcache.reinforce.estimate import estimate_lines

        say_lines(estimate_lines(run, chosen))
        return
    if not numbers:
        _say(_reinforced(run, chosen, progress, resume=resume, overwrite=overwrite), chosen.output)
        return
    from kdcache.reinforce.seeds import SEED_COLUMNS, compare, seed_recipe, seed_rows

    records = []
    for number in numbers:
        progress.message(f"seed {number}")
        own = seed_recipe(chosen, number)
        records.append(_reinforced(run, own, progress, resume=resume, overwrite=overwrite))
    written = compare(Path(chosen.output), numbers, records)
    say_table(text_table(SEED_COLUMNS, seed_rows(numbers, records)))
    say("written: " + ", ".join(str(path) for path in written))


def _reinforced(
    run: Path, recipe: ReinforceRecipe, progress: Progress, *, resume: bool, overwrite: bool
) -> dict[str, Any]:
    from kdcache.reinforce.run import reinforce as reinforced

    return reinforced(run, recipe, resume=resume, overwrite=overwrite, progress=progress)


def _say(record: dict[str, Any], output: str) -> None:
    from kdcache.intervals import INTERVAL_NOTE
    from kdcache.reinforce.answers import COLUMNS, NOTE, answer_rows

    if record["held_out"]:
        say_table(text_table(COLUMNS, answer_rows(record["held_out"])))
        say(f"{NOTE} {INTERVAL_NOTE}")
    first, last = record["reward"]["first_tenth"], record["reward"]["last_tenth"]
    if "reward" in first:
        say(f"mean reward of the first tenth of the steps {first['reward']:.3f}, of the last {last['reward']:.3f}")
    say(
        f"adapter of {record['student']['model']} in {output}/model; reinforce.json, log.csv, reward.png, result.md in {output}"
    )


def _numbers(seeds: str | None) -> list[int]:
    """The seeds that are meant, or none.

    Raises:
        RecipeError: not a list of whole numbers, or one of them twice.
    """
    from kdcache.errors import RecipeError

    if seeds is None:
        return []
    parts = [part.strip() for part in seeds.split(",")]
    if not all(part.isdecimal() and int(part) < 2**32 for part in parts) or len(set(map(int, parts))) < len(parts):
        raise RecipeError(
            f"--seeds should be different whole numbers with commas between them, such as 0,1,2, found {seeds!r}"
        )
    return [int(part) for part in parts]
