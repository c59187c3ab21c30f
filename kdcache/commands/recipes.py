"""Commands on a recipe or a run: what the two phases do."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from kdcache.commands.app import (
    Overrides,
    OverwriteOption,
    RecipeArgument,
    ResumeOption,
    app,
    chosen_recipe,
    console_progress,
    is_complete,
    is_first_process,
    ready_embedded,
    say,
    say_lines,
    say_scores,
    say_table,
)
from kdcache.console import byte_size, text_table
from kdcache.summary import capture_lines, estimate_lines

if TYPE_CHECKING:
    from kdcache.recipe import Recipe


@app.command()
def teacher_cache(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Measure a small sample, predict size, time and memory; no cache is written."),
    ] = False,
    if_incomplete: Annotated[
        bool, typer.Option("--if-incomplete", help="Do nothing when the cache directory is complete already.")
    ] = False,
    worker: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            metavar="I/N",
            show_default=False,
            help="Make every N-th shard from number I on, beside other processes; the last one finishes the cache. Without "
            "it the variables of torchrun (torchrun --nproc-per-node N -m kdcache teacher-cache ...), of srun and of Slurm "
            "arrays say so, and a process that finds none makes every shard.",
        ),
    ] = None,
) -> None:
    """Run the teacher once and write its cache; run again to go on where it stopped."""
    from kdcache.teacher.workers import which_worker

    share = which_worker(worker, os.environ)
    chosen, progress = chosen_recipe(recipe, overrides), console_progress()
    if if_incomplete and is_complete(chosen.cache.directory):
        say(f"cache {chosen.cache.directory}: complete already")
        return
    if share.count > 1:
        _refuse_to_make_models(chosen, recipe)
    ready_embedded(chosen, progress)
    if dry_run:
        from kdcache.teacher.estimate import estimate

        found = estimate(chosen, progress)
        say_lines(estimate_lines(found))
        if found.answering is not None:
            say(f"  of which {found.answering}")
        if found.waiting_bytes:
            say(
                f"  {byte_size(found.waiting_bytes)} of hidden states wait in {chosen.cache.directory}.generating meanwhile"
            )
        return
    from kdcache.teacher.capture import AnswerShare, ShareResult, capture_share

    done = capture_share(chosen, share, progress)
    if isinstance(done, AnswerShare):
        say(
            f"{share}: {done.batches_made} batches answered in {done.seconds:.0f} s; {done.unfinished} batches are still to come from "
            "other workers. Whoever is last makes the cache; if one was stopped, kdcache teacher-cache does what is left"
        )
        return
    if isinstance(done, ShareResult):
        say(
            f"{share}: {done.shards_made} shards made in {done.seconds:.0f} s; {len(done.unfinished)} of "
            f"{len(done.plan.shards)} shards of the cache {done.directory} are still to come from other workers. Whoever "
            "is last finishes it; if one was stopped, kdcache teacher-cache makes its shards"
        )
        return
    lines, warning = capture_lines(done)
    say_lines(lines)
    if warning is not None:
        progress.warning(warning)


def _refuse_to_make_models(recipe: Recipe, path: Path) -> None:
    """Models made by several workers at once would be in each other's way."""
    from kdcache.errors import RecipeError

    section = recipe.embedded
    if section is None:
        return
    if not all((Path(section.directory) / name / "config.json").exists() for name in ("teacher", "student")):
        raise RecipeError(
            f"several workers should find the models in {section.directory} ready; make them first with kdcache embedded {path}"
        )


@app.command()
def train_student(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    resume: ResumeOption = False,
    overwrite: OverwriteOption = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Predict steps, time, memory and disk from the student's configuration and a probe of one and two layers; "
            "nothing is trained or written.",
        ),
    ] = False,
) -> None:
    """Train a student from a cache and print the result table; torchrun and accelerate launch start it on several GPUs."""
    from kdcache.progress import Silent

    chosen, progress = chosen_recipe(recipe, overrides), console_progress() if is_first_process() else Silent()
    if os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
        _refuse_to_make_models(chosen, recipe)
    ready_embedded(chosen, progress)
    if dry_run:
        from kdcache.student.estimate import estimate_training
        from kdcache.student.processes import leave
        from kdcache.summary import training_lines

        lines = training_lines(estimate_training(chosen, progress))
        leave()
        if is_first_process():
            say_lines(lines)
        return
    from kdcache.report import write_pages
    from kdcache.student.distill import distill
    from kdcache.student.processes import leave

    record = distill(chosen, resume=resume, overwrite=overwrite, progress=progress)
    leave()
    if not is_first_process():
        return
    pages = write_pages(record)
    say_scores(record)
    say(f"student in {record.output / 'model'}; record, log and plot: " + ", ".join(
        p.name for p in (record.output / "run.json", record.output / "log.csv", *pages)
    ) + f" in {record.output}")  # fmt: skip


@app.command()
def fidelity(
    what: Annotated[
        str,
        typer.Argument(help="Cache directory or URL, or a recipe whose cache need not exist.", show_default=False),
    ],
    overrides: Overrides = None,
    teacher: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Folder or id of the cache's teacher, where it is not found under its name."),
    ] = None,
    student: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Student whose gradient is compared; a recipe's own by default."),
    ] = None,
    positions: Annotated[int, typer.Option(min=16, help="About how many positions to measure.")] = 2048,
    compare: Annotated[bool, typer.Option(help="Measure other settings beside the chosen one.")] = True,
    output: Annotated[Path, typer.Option(help="Folder for fidelity.md, .json and, with --compare, .png.")] = Path(
        "runs/fidelity"
    ),
) -> None:
    """How faithful a cache is per byte, or would be: its teacher is run again on a sample, in full."""
    from kdcache.errors import RecipeError
    from kdcache.evaluate.fidelity_run import cache_fidelity, recipe_fidelity
    from kdcache.report import FIDELITY_COLUMNS, PARTS_COLUMNS, fidelity_rows, parts_rows, write_fidelity

    progress = console_progress()
    options: dict[str, Any] = {"student": student, "positions": positions, "compare": compare, "progress": progress}
    if Path(what).is_dir() or Path(what).suffix not in (".yaml", ".yml"):
        if overrides:
            raise RecipeError(f"{overrides[0]} is a recipe key, but {what} is a cache; give a recipe to change keys")
        report = cache_fidelity(what, teacher=teacher, **options)
    else:
        recipe = chosen_recipe(Path(what), [*(overrides or []), *([f"teacher.model={teacher}"] if teacher else [])])
        ready_embedded(recipe, progress)
        report = recipe_fidelity(recipe, **options)
    say(f"{report.title}; mass: exact entries, mean and first percentile; cos, error: of the student's gradient")
    say_table(text_table(FIDELITY_COLUMNS, fidelity_rows(report)))
    say_table(text_table(PARTS_COLUMNS, parts_rows(report)))
    say("written: " + ", ".join(str(p) for p in write_fidelity(report, output)))


@app.command()
def embedded(recipe: RecipeArgument, overrides: Overrides = None) -> None:
    """Make the built-in data, tokenizer, teacher and student of a recipe, where they are not there yet."""
    from kdcache.errors import RecipeError

    chosen = chosen_recipe(recipe, overrides)
    if chosen.embedded is None:
        raise RecipeError(f"{recipe} has no section embedded")
    ready_embedded(chosen, console_progress())
    say(f"data and models in {chosen.embedded.directory}")
