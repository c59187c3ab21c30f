"""PHASE TWO on one screen: a cache and a student become a run directory.

open the cache -> load the student, hold its tokens against the cache's -> attach LoRA, score it, train
-> score it again -> adapter, tokenizer, run.json, log.csv.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import transformers

from kdcache.cache.reader import Cache
from kdcache.errors import RecipeError
from kdcache.evaluate.perplexity import Score, student_score, teacher_score
from kdcache.models import refuse_narrow_head
from kdcache.progress import Progress, Silent
from kdcache.recipe import Recipe
from kdcache.recipe_student import StudentSection
from kdcache.run_record import AFTER, BEFORE, TEACHER
from kdcache.same_teacher import files_of
from kdcache.student.agreement import VALIDATION, refuse_cut_away, refuse_unfit
from kdcache.student.arguments import training_arguments
from kdcache.student.assembly import (
    make_trainer,
    tell_of_cut,
    tell_of_end,
    tell_of_init,
    tell_of_steps,
    tell_of_tail,
    with_adapter,
)
from kdcache.student.hidden import refuse_impossible_term, refuse_other_live_teacher
from kdcache.student.initial import is_made, refuse_impossible
from kdcache.student.kept import Kept, end_readers, untrained_key
from kdcache.student.packing import refuse_leaks
from kdcache.student.parameters import read_config, refuse_other_targets
from kdcache.student.processes import is_sharded, once, turns
from kdcache.student.record import RunDirectory, RunRecord, run_record, write_model_card
from kdcache.student.recovery import train_to_end, translated
from kdcache.student.start import BASE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def distill(
    recipe: Recipe,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    kept: Kept | None = None,
) -> RunRecord:
    """Train the recipe's student from its cache.

    Args:
        recipe: needs ``student``; ``data`` and ``teacher`` only have to agree with the cache.
        resume: go on from the newest whole checkpoint; a finished run is returned as it is.
        overwrite: forget an earlier run in the same directory.
        progress: told about long work.
        kept: what this process keeps between students; give the same one to every call, and caches, base and scores are
            not made again. The students are the same either way.

    Raises:
        KdcacheError: bad input, an incomplete or damaged cache, a student with other tokens, a run
            directory that holds another run.
    """
    progress, kept = progress or Silent(), kept or Kept()
    started = time.monotonic()
    run = RunDirectory(Path(recipe.output))
    try:
        ready = _make_ready(recipe, run, kept, progress, resume=resume, overwrite=overwrite)
        if isinstance(ready, RunRecord):
            progress.message(f"{run.path} holds this run, finished")
            return ready
        _tell_of_other_end(ready.tokenizer, ready.cache, progress)
        with translated(run.path, recipe.training.batch_size):
            return _distil(recipe, run, ready, kept, resume=resume, progress=progress, started=started)
    finally:
        run.release()
        progress.end()


def check_student(
    recipe: Recipe, kept: Kept, *, overwrite: bool = False, progress: Progress | None = None
) -> RunRecord | None:
    """Refuse what `distill` would refuse before it loads a model; nothing is changed. Returns the record of a finished run.

    Raises:
        KdcacheError: as `distill`.
    """
    run = RunDirectory(Path(recipe.output))
    ready = _make_ready(recipe, run, kept, progress or Silent(), resume=True, overwrite=overwrite)
    if isinstance(ready, RunRecord):
        return ready
    if ready.student.lora is not None:
        # Otherwise found by peft, with the model in memory and other students of a sweep trained before.
        lora = ready.student.lora
        targets = ("targets", ready.student.model, ready.student.revision, str(lora.targets))
        kept.check(targets, lambda: refuse_other_targets(ready.student))
    return None


@dataclass(frozen=True)
class _Ready:
    """What can be had, and refused, without a model."""

    student: StudentSection
    arguments: transformers.TrainingArguments
    cache: Cache
    tokenizer: PreTrainedTokenizerBase


def _make_ready(
    recipe: Recipe, run: RunDirectory, kept: Kept, progress: Progress, *, resume: bool, overwrite: bool
) -> _Ready | RunRecord:
    """What a training needs, or the record of the run where it is finished."""
    student, training = recipe.student, recipe.training
    if student is None:
        raise RecipeError("train-student needs the recipe section student")
    if recipe.sweep is not None:
        raise RecipeError(
            "the recipe has a section sweep, and its output is a directory of many runs: train them with kdcache sweep, or one "
            "student with sweep=null output=ANOTHER_DIRECTORY"
        )
    if recipe.chain is not None:
        raise RecipeError(
            "the recipe has a section chain, and its output is a directory of several runs: train them with kdcache chain, or one "
            "student with chain=null output=ANOTHER_DIRECTORY"
        )
    arguments = training_arguments(
        training, device=student.device, seed=recipe.seed, checkpoints=run.checkpoints, tell=progress.message
    )
    cache = fitting_cache(recipe, progress, kept)
    world = arguments.world_size
    finished = once(arguments, lambda: run.prepare(recipe, cache.id, resume=resume, overwrite=overwrite, world=world))
    if finished is None:
        cut = ("cut", cache.id, training.max_length, training.fraction)
        kept.check(cut, lambda: refuse_cut_away(recipe, cache))
        kept.check(("init", student.model, student.revision, str(student.init)), lambda: refuse_impossible(student))
        tell_of_init(recipe, cache, progress)
        if recipe.loss.hidden_weight:
            refuse_impossible_term(recipe, read_config(student), cache)
            name = "" if recipe.teacher is None else recipe.teacher.model
            live = ("live", cache.id, name, files_of(name))
            kept.check(live, lambda: refuse_other_live_teacher(recipe, cache))
    return finished or _Ready(student, arguments, cache, kept.tokenizer(student, cache))


def fitting_cache(recipe: Recipe, progress: Progress, kept: Kept | None = None) -> Cache:
    """The recipe's cache, once it is sure that it can be trained from it; says what the teacher is like at its temperature.

    Raises:
        CacheError: it is incomplete or damaged, has not the splits, or cannot give the temperature.
        PlanMismatchError: it was made from another recipe.
    """
    cache = (kept or Kept()).cache(recipe, progress)
    cache.look_over()
    refuse_unfit(recipe, cache)
    progress.message(f"cache {cache.id[:12]}: {cache.plan.selection.describe()}")
    tell_of_tail(recipe.loss, cache, progress)
    tell_of_cut(recipe.training.max_length, cache, progress)
    return cache


def _tell_of_other_end(tokenizer: PreTrainedTokenizerBase, cache: Cache, progress: Progress) -> None:
    eos_id = cache.plan.tokenizer.eos_id
    if tokenizer.eos_token_id != eos_id:
        progress.warning(
            f"responses in the cache end with {tokenizer.convert_ids_to_tokens(eos_id)!r}, the student's own end is "
            f"{tokenizer.eos_token!r}; generate with the cache's"
        )


def _distil(
    recipe: Recipe, run: RunDirectory, ready: _Ready, kept: Kept, *, resume: bool, progress: Progress, started: float
) -> RunRecord:
    student, arguments, cache = ready.student, ready.arguments, ready.cache
    training, validation = recipe.training, cache.split(VALIDATION)
    broken_off = resume and run.log.exists()

    def score(name: str) -> Score:
        return student_score(
            model,
            validation,
            batch_size=arguments.per_device_train_batch_size,
            max_length=training.max_length,
            precision=training.precision,
            share=turns(arguments),
            what=name,
            progress=progress,
        )

    made = None
    if is_made(student):
        going_on = resume and any(run.checkpoints.glob("checkpoint-*"))
        once(arguments, run.hold)
        made = once(arguments, lambda: kept.start(student, run.path, going_on=going_on))
    model = kept.take_base(student, made)
    if made is not None:
        # What the adapter will name as its base.
        model.name_or_path = str(run.path / BASE)
    refuse_narrow_head(model, cache.vocab_size, student.model)
    if training.packing:
        refuse_leaks(model)
    # Only now: a base that is loaded may draw numbers, one that was kept does not.
    transformers.set_seed(recipe.seed)
    model = with_adapter(model, student)
    batch_size = arguments.per_device_train_batch_size
    before = kept.score(untrained_key(recipe, student, cache, batch_size, made), lambda: score(BEFORE))
    trainer = make_trainer(recipe, cache, model, arguments, run, progress)
    once(arguments, lambda: run.begin(recipe, cache.id, world=arguments.world_size, made=made))
    checkpoint = once(arguments, lambda: run.newest_checkpoint(progress)) if resume else None
    if checkpoint is not None:
        progress.message(f"going on from {checkpoint.name}")
    elif broken_off:
        progress.message("there is no checkpoint to go on from: from the beginning")
    tell_of_steps(trainer, progress)
    train_to_end(trainer, checkpoint, progress)
    end_readers(trainer)
    trainer.end_hidden()
    scores = {
        BEFORE: before,
        AFTER: score(AFTER),
        TEACHER: kept.score(
            (TEACHER, cache.id, training.max_length),
            lambda: teacher_score(validation, max_length=training.max_length),
        ),
    }
    tell_of_end(trainer, scores, recipe.loss, progress)
    record = run_record(
        recipe,
        cache,
        model,
        scores,
        steps=trainer.state.global_step,
        best_step=trainer.state.best_global_step if training.keep_best else None,
        skipped_steps=trainer.skipped_steps,
        processes=arguments.world_size,
        forward_pass=arguments.per_device_train_batch_size,
        # Of the last sitting, which went on from this step.
        resumed_at=0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2]),
        seconds=round(time.monotonic() - started, 1),
    )

    # Weights that an engine has cut are gathered by all processes together.
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped) if is_sharded() else None

    def keep() -> None:
        model.save_pretrained(str(run.model), state_dict=weights)
        ready.tokenizer.save_pretrained(str(run.model))
        write_model_card(run.model, recipe, cache, scores)
        run.finish(record)

    once(arguments, keep)
    # What was cut over processes or compiled is no longer the model that was loaded.
    if arguments.world_size == 1 and not is_sharded() and not training.compile:
        kept.put_back(model, student, made)
    return record
