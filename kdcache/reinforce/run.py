"""REINFORCEMENT on one screen: a finished run and a recipe become a run directory with a better adapter, or an honest record of none.

open the run -> questions -> the student with its adapter -> answer held-out questions -> cold start, where one is wanted
-> GRPO against the student as it is now -> answer again -> adapter, reinforce.json, log.csv, plot, table.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import transformers

from kdcache import __version__
from kdcache.cache.files import write_file
from kdcache.errors import RecipeError
from kdcache.model_identity import ModelIdentity, identify
from kdcache.progress import Progress, Silent
from kdcache.recipe_reinforce import ReinforceRecipe
from kdcache.reinforce.answers import COLUMNS, NOTE, answer_rows, held_out
from kdcache.reinforce.cold_start import cold_start
from kdcache.reinforce.plots import write_plot
from kdcache.reinforce.questions import Question, load_questions, reinforced, token_rows
from kdcache.reinforce.record import PAGE_FILE, ReinforceRecord
from kdcache.reinforce.student import ADAPTER, Start, load_policy, open_start
from kdcache.reinforce.symptoms import symptoms
from kdcache.reinforce.trainer import make_trainer, need_trl, reinforce_arguments, train_to_end
from kdcache.run_record import read_log
from kdcache.student.assembly import load_student
from kdcache.student.merged import save_whole
from kdcache.student.record import RunDirectory, hardware
from kdcache.token_maps import load_tokenizer

BEFORE, WARM, AFTER = "distilled student", "after the cold start", "after reinforcement"
_PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes")


def check_reinforce(run: Path, recipe: ReinforceRecipe) -> Start:
    """All that can be refused before data or a model is loaded; returns the student.

    Raises:
        KdcacheError: bad input, trl not installed, no finished run, no sandbox for generated Python.
    """
    need_trl()
    if os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
        raise RecipeError("kdcache reinforce runs in one process; start it without torchrun or accelerate launch")
    if run.resolve() == Path(recipe.output).resolve():
        raise RecipeError(f"the recipe key output is {recipe.output}, the run to start from; give it another directory")
    start = open_start(run)
    if recipe.rewards.check == "python":
        from kdcache.reinforce.sandbox import refuse_without_walls

        refuse_without_walls()
    return start


def reinforce(
    run: Path,
    recipe: ReinforceRecipe,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Reinforce the student of a finished run; returns the record that is written as reinforce.json.

    Args:
        run: directory of kdcache train-student, or of an earlier reinforcement. Its cache is not needed.
        recipe: rewards, questions and training.
        resume: go on from the newest whole checkpoint; a finished run is returned as it is.
        overwrite: forget an earlier run in the same directory.
        progress: told about long work.

    Raises:
        KdcacheError: bad input, a run that is not finished, a directory that holds another run.
        KeyboardInterrupt: it was stopped; a checkpoint is there if training had begun.
    """
    progress, started = progress or Silent(), time.monotonic()
    start = check_reinforce(run, recipe)
    home = ReinforceRecord(Path(recipe.output))
    # Before anything is learnt on it; where it lies it may be replaced meanwhile.
    base = identify(start.student.model, start.student.revision)
    finished = home.prepare(recipe, start.digest, base.fingerprint, resume=resume, overwrite=overwrite)
    if finished is not None:
        progress.message(f"{home.path} holds this run, finished")
        return finished
    train, test = load_questions(recipe)
    try:
        arguments = reinforce_arguments(
            recipe, device=start.student.device, checkpoints=home.checkpoints, tell=progress.message, date=start.date
        )
        tokenizer = load_tokenizer(start.tokenizer)
        transformers.set_seed(recipe.seed)
        going_on = resume and home.path.is_dir()
        results: dict[str, dict[str, float]] = {}

        def answers(name: str) -> None:
            if test:
                results[name] = held_out(recipe, model, tokenizer, test, date=start.date, what=name, progress=progress)

        home.begin(recipe, start.digest, base.fingerprint, anew=not going_on)
        model: Any = load_policy(start, recipe.lora)
        answers(BEFORE)
        reference = start
        if recipe.cold_start is not None:
            del model
            reference = _warmed(recipe, start, tokenizer, train, home, progress)
            transformers.set_seed(recipe.seed)
            model = load_policy(reference, recipe.lora)
            answers(WARM)
        trainer = make_trainer(recipe, model, tokenizer, reinforced(recipe, train), arguments, home.log, progress)
        checkpoint = RunDirectory(home.path).newest_checkpoint(progress) if going_on else None
        if checkpoint is not None:
            progress.message(f"going on from {checkpoint.name}")
        train_to_end(trainer, checkpoint, progress)
        answers(AFTER)
        model.save_pretrained(str(home.model), selected_adapters=[ADAPTER])
        tokenizer.save_pretrained(str(home.model))
        _write_card(home.model, reference, recipe)
        reference_name = BEFORE if recipe.cold_start is None else WARM
        values = {
            "kdcache": __version__,
            "run": str(run),
            "run_digest": start.digest,
            **_student(reference, base, recipe, home),
            "distilled": start.distilled,
            "date": start.date,
            "recipe": recipe.model_dump(mode="json"),
            "reference": reference_name,
            "held_out": results,
            "reward": reward_ends(read_log(home.log)),
            "steps": trainer.state.global_step,
            "resumed_at": 0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2]),
            "seconds": round(time.monotonic() - started, 1),
            "versions": {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}},
            "hardware": hardware(),
        }
        for symptom in symptoms(read_log(home.log), results.get(reference_name), results.get(AFTER)):
            progress.warning(symptom)
        write_plot(home.path, [(f"seed {recipe.seed}", read_log(home.log))])
        write_page(home.path / PAGE_FILE, results)
        return home.finish(values)
    finally:
        home.release()
        progress.end()


def _warmed(
    recipe: ReinforceRecipe,
    start: Start,
    tokenizer: Any,
    train: list[Question],
    home: ReinforceRecord,
    progress: Progress,
) -> Start:
    """The student after the cold start, made now or by an earlier sitting. What the distillation trained is trained here: the
    adapter, whose copy then lies in ``reference``, or every weight, and then ``base`` is the model that the new adapter is of."""
    section = recipe.cold_start
    assert section is not None
    whole = start.adapter is None
    if not home.reference.is_dir():
        model: Any = load_student(start.student).requires_grad_(True) if whole else load_policy(start, recipe.lora)
        cold_start(
            section,
            model,
            tokenizer,
            token_rows(recipe, train[: section.examples], tokenizer, date=start.date),
            seed=recipe.seed,
            precision=recipe.training.precision,
            device=start.student.device,
            progress=progress,
        )
        save_whole(model, tokenizer, home.reference)
    if not whole:
        return replace(start, adapter=home.reference)
    student = start.student.model_copy(update={"model": str(home.reference), "revision": None})
    return replace(start, student=student)


def reward_ends(log: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Means over the first and the last tenth of the logged steps, of reward, its parts, length and KL."""
    tenth = max(1, len(log) // 10)
    keys = ("reward", "reward_format", "reward_correct", "reward_length", "length", "kl")
    ends = {"first_tenth": log[:tenth], "last_tenth": log[-tenth:]}
    return {
        name: {key: sum(values) / len(values) for key in keys if (values := [row[key] for row in rows if key in row])}
        for name, rows in ends.items()
    }


def write_page(path: Path, results: dict[str, dict[str, float]]) -> None:
    """The table of held-out answers as Markdown."""
    from kdcache.intervals import INTERVAL_NOTE
    from kdcache.markdown import table

    write_file(path, f"{table(COLUMNS, answer_rows(results))}\n{NOTE} {INTERVAL_NOTE}\n".encode())


def _student(start: Start, base: ModelIdentity, recipe: ReinforceRecipe, home: ReinforceRecord) -> dict[str, Any]:
    """The student's section under which the saved adapter is loaded, its base and the adapter's shape; and what that base is. It
    often lies in another run, which may be trained again."""
    student, lora = start.student, recipe.lora if start.adapter is None else start.student.lora
    inside = student.model == str(home.reference)
    if inside:
        base = identify(student.model)
    # Read from another working directory it is to be the same folder, and not an id on the Hub.
    folder = Path(student.model).resolve() if Path(student.model).is_dir() else None
    place = student.model if folder is None else str(folder)
    known = {"model": place, "revision": base.revision, "lora": lora}
    return {
        "student": student.model_copy(update=known).model_dump(mode="json"),
        "base_fingerprint": base.fingerprint,
        "base_beside": None if folder is None else os.path.relpath(folder, home.path.resolve()),
    }


def _write_card(folder: Path, start: Start, recipe: ReinforceRecipe) -> None:
    rewards = recipe.rewards
    lines = [
        "---",
        "library_name: peft",
        "tags: [reinforcement-learning, grpo, kdcache]",
        "---",
        "",
        f"# {Path(start.student.model).name}, distilled and then reinforced",
        "",
        f"An adapter of `{start.student.model}` ({start.student.quantization}), by kdcache reinforce with TRL's GRPO: {recipe.training.steps} "
        f"steps, KL weight {recipe.training.beta:g}, rewards {rewards.format:g} (form), {rewards.correct:g} (right, {rewards.check}), "
        f"{rewards.length:g} (length).",
        "",
    ]
    write_file(folder / "README.md", "\n".join(lines).encode())
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.iterdir():
        path.chmod(0o666 & ~mask)
