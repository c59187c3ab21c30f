"""PHASE TWO on one screen: a cache and a student become a run directory.

open the cache -> load the student, hold its tokens against the cache's -> attach LoRA, score it, train
-> score it again -> adapter, tokenizer, run.json, log.csv.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import transformers

from kdcache.cache.reader import Cache
from kdcache.cache.store import open_cache
from kdcache.errors import CacheError, RecipeError
from kdcache.evaluate.perplexity import Score, student_score, teacher_score
from kdcache.models import refuse_narrow_head
from kdcache.progress import Progress, Silent
from kdcache.recipe import Recipe, StudentSection
from kdcache.student.agreement import TRAIN, VALIDATION, refuse_low_temperature, refuse_other_cache
from kdcache.student.arguments import training_arguments
from kdcache.student.assembly import (
    load_student,
    make_trainer,
    tell_of_cut,
    tell_of_end,
    tell_of_steps,
    tell_of_tail,
    with_adapter,
)
from kdcache.student.packing import refuse_leaks
from kdcache.student.processes import is_sharded, loaded_whole, once, turns
from kdcache.student.record import RunDirectory, RunRecord, run_record, write_model_card
from kdcache.student.recovery import train_to_end, translated
from kdcache.token_maps import load_tokenizer, refuse_other_tokens, token_map

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def distill(
    recipe: Recipe, *, resume: bool = False, overwrite: bool = False, progress: Progress | None = None
) -> RunRecord:
    """Train the recipe's student from its cache.

    Args:
        recipe: needs ``student``; ``data`` and ``teacher`` only have to agree with the cache.
        resume: go on from the newest whole checkpoint; a finished run is returned as it is.
        overwrite: forget an earlier run in the same directory.
        progress: told about long work.

    Raises:
        KdcacheError: bad input, an incomplete or damaged cache, a student with other tokens, a run
            directory that holds another run.
    """
    if recipe.student is None:
        raise RecipeError("train-student needs the recipe section student")
    student, training = recipe.student, recipe.training
    progress = progress or Silent()
    started = time.monotonic()
    run = RunDirectory(Path(recipe.output))
    arguments = training_arguments(
        training, device=student.device, seed=recipe.seed, checkpoints=run.checkpoints, tell=progress.message
    )
    try:
        cache = fitting_cache(recipe, progress)
        world = arguments.world_size
        finished = once(
            arguments, lambda: run.prepare(recipe, cache.id, resume=resume, overwrite=overwrite, world=world)
        )
        if finished is not None:
            progress.message(f"{run.path} holds this run, finished")
            return finished
        transformers.set_seed(recipe.seed)
        tokenizer = load_tokenizer(student.model, student.revision)
        refuse_other_tokens(token_map(tokenizer), cache.vocabulary(), student.model)
        _tell_of_other_end(tokenizer, cache, progress)
        with translated(run.path, training.batch_size):
            return _distil(
                recipe, student, cache, run, arguments, tokenizer, resume=resume, progress=progress, started=started
            )
    finally:
        run.release()
        progress.end()


def fitting_cache(recipe: Recipe, progress: Progress) -> Cache:
    """The recipe's cache, once it is sure that it can be trained from it; says what the teacher is like at its temperature.

    Raises:
        CacheError: it is incomplete or damaged, has not the splits, or cannot give the temperature.
        PlanMismatchError: it was made from another recipe.
    """
    # As many as are mixed, the one that comes next, and one that is scored.
    cache = open_cache(recipe.cache.directory, keep=recipe.training.shuffle_shards + 2, progress=progress)
    cache.look_over()
    refuse_other_cache(recipe, cache)
    for name in (TRAIN, VALIDATION):
        if name not in cache:
            raise CacheError(
                f"the cache {cache.directory} has no split {name}, only {', '.join(cache)}; students are trained on {TRAIN} and "
                f"scored on {VALIDATION}: take a cache that has both (kdcache subset keeps all splits, kdcache merge adds some)"
            )
    refuse_low_temperature(recipe.loss.temperature, cache)
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
    recipe: Recipe,
    student: StudentSection,
    cache: Cache,
    run: RunDirectory,
    arguments: transformers.TrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
    *,
    resume: bool,
    progress: Progress,
    started: float,
) -> RunRecord:
    training, validation = recipe.training, cache.split(VALIDATION)

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

    with loaded_whole():
        model = load_student(student)
    refuse_narrow_head(model, cache.vocab_size, student.model)
    if training.packing:
        refuse_leaks(model)
    model = with_adapter(model, student)
    before = score("student before")
    trainer = make_trainer(recipe, cache, model, arguments, run, progress)
    once(arguments, lambda: run.begin(recipe, cache.id, world=arguments.world_size))
    checkpoint = once(arguments, lambda: run.newest_checkpoint(progress)) if resume else None
    if checkpoint is not None:
        progress.message(f"going on from {checkpoint.name}")
    tell_of_steps(trainer, progress)
    train_to_end(trainer, checkpoint, progress)
    scores = {
        "student before": before,
        "student after": score("student after"),
        "teacher": teacher_score(validation, max_length=training.max_length),
    }
    tell_of_end(trainer, scores, progress)
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
        tokenizer.save_pretrained(str(run.model))
        write_model_card(run.model, recipe, cache, scores)
        run.finish(record)

    once(arguments, keep)
    return record
