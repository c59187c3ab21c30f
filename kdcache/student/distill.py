"""PHASE TWO on one screen: a cache and a student become a run directory.

open the cache -> load the student, hold its tokens against the cache's -> attach LoRA, score it, train
-> score it again -> adapter, tokenizer, run.json, log.csv.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers
from safetensors import SafetensorError

from kdcache.cache.reader import Cache
from kdcache.cache.store import open_cache
from kdcache.errors import CacheError, RecipeError, StorageError, TrainingError
from kdcache.evaluate.perplexity import Score, student_score, teacher_score
from kdcache.models import attach_lora, load_model, refuse_narrow_head
from kdcache.progress import Progress, Silent
from kdcache.recipe import LossSection, Recipe, StudentSection
from kdcache.student.agreement import TRAIN, VALIDATION, refuse_low_temperature, refuse_other_cache
from kdcache.student.arguments import training_arguments
from kdcache.student.collate import Collator, Tail, uses_draws
from kdcache.student.log import CsvLog
from kdcache.student.record import RunDirectory, RunRecord, run_record, write_model_card
from kdcache.student.trainer import DistillationTrainer, ProgressCallback, SplitDataset
from kdcache.token_maps import load_tokenizer, refuse_other_tokens, token_map

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LOW_MASS = 0.5


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
    progress = progress or Silent()
    started = time.monotonic()
    if recipe.student is None:
        raise RecipeError("train-student needs the recipe section student")
    student, training = recipe.student, recipe.training
    cache = open_cache(recipe.cache.directory, progress=progress)
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
    run = RunDirectory(Path(recipe.output))
    finished = run.prepare(recipe, cache.id, resume=resume, overwrite=overwrite)
    if finished is not None:
        progress.message(f"{run.path} holds this run, finished")
        return finished
    arguments = training_arguments(training, device=student.device, seed=recipe.seed, checkpoints=run.checkpoints)
    transformers.set_seed(recipe.seed)
    tokenizer = load_tokenizer(student.model, student.revision)
    refuse_other_tokens(token_map(tokenizer), cache.vocabulary(), student.model)
    eos_id = cache.plan.tokenizer.eos_id
    if tokenizer.eos_token_id != eos_id:
        progress.warning(
            f"responses in the cache end with {tokenizer.convert_ids_to_tokens(eos_id)!r}, the student's own end is "
            f"{tokenizer.eos_token!r}; generate with the cache's"
        )
    validation = cache.split(VALIDATION)

    def score(name: str) -> Score:
        return student_score(
            model,
            validation,
            batch_size=training.batch_size,
            precision=training.precision,
            what=name,
            progress=progress,
        )

    with _translated(run, training.batch_size):
        model = load_student(student)
        refuse_narrow_head(model, cache.vocab_size, student.model)
        model = with_adapter(model, student)
        before = score("student before")
        trainer = _trainer(recipe, cache, model, arguments, run, progress)
        run.begin(recipe, cache.id)
        checkpoint = run.newest_checkpoint(progress) if resume else None
        if checkpoint is not None:
            progress.message(f"going on from {checkpoint.name}")
        try:
            _train(trainer, checkpoint)
        finally:
            progress.end()
        scores = {
            "student before": before,
            "student after": score("student after"),
            "teacher": teacher_score(validation),
        }
        model.save_pretrained(str(run.model))
        tokenizer.save_pretrained(str(run.model))
        write_model_card(run.model, recipe, cache, scores)
        resumed = 0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2])
        seconds = time.monotonic() - started
        record = run_record(recipe, cache, model, scores, trainer.state.global_step, resumed, seconds)
        run.finish(record)
    return record


def load_student(student: StudentSection, saved: Path | None = None) -> PreTrainedModel:
    """The recipe's student as it starts, or the fully trained model that a run saved."""
    return load_model(
        student.model if saved is None else str(saved),
        revision=student.revision if saved is None else None,
        quantization=student.quantization,
        dtype=student.dtype,
        device=student.device,
    )


def with_adapter(model: PreTrainedModel, student: StudentSection) -> PreTrainedModel:
    """The model with the recipe's LoRA, or with every weight trainable."""
    if student.lora is None:
        return model.requires_grad_(True)
    return attach_lora(
        model,
        r=student.lora.r,
        alpha=student.lora.alpha,
        dropout=student.lora.dropout,
        targets=student.lora.targets,
        quantized=student.quantization != "none",
    )


def tail_of(loss: LossSection) -> Tail:
    """What stands for the mass outside: divergences over a bucket take no drawn entries."""
    return "lumped" if loss.tail == "auto" and loss.divergence in ("reverse_kl", "jsd") else loss.tail


def _trainer(
    recipe: Recipe,
    cache: Cache,
    model: PreTrainedModel,
    arguments: transformers.TrainingArguments,
    run: RunDirectory,
    progress: Progress,
) -> DistillationTrainer:
    loss, summary = recipe.loss, cache.split(TRAIN).summary
    design = cache.plan.design(0)
    sampled = tail_of(loss) == "auto" and uses_draws(design, loss.temperature)
    rest = "drawn" if sampled else "ignored" if loss.tail == "renormalised" else "one bucket"
    if loss.temperature in cache.temperatures:
        mass = summary.kept_mass_mean[cache.temperatures.index(loss.temperature)]
        tell = progress.warning if mass < _LOW_MASS and not sampled else progress.message
        tell(
            f"the exact entries hold {mass:.1%} of the teacher's probability at T = {loss.temperature:g}; the rest is {rest}"
        )
    else:
        declared = ", ".join(f"{t:g}" for t in cache.temperatures)
        tell = progress.message if sampled or not design.sampled else progress.warning
        tell(
            f"the cache declares T = {declared}; at T = {loss.temperature:g} the mass outside the exact entries is "
            f"interpolated, and the rest is {rest}"
            + (": drawn entries serve up to the largest declared temperature" if design.sampled and not sampled else "")
        )
    if recipe.training.optimizer.startswith("paged_") and arguments.device.type == "cpu":
        progress.message(
            f"{recipe.training.optimizer} pages its state to host memory; on the CPU that is where it lies anyway"
        )
    try:
        trainer = DistillationTrainer(
            model=model,
            args=arguments,
            train_dataset=SplitDataset(cache.split(TRAIN)),
            data_collator=Collator(cache.plan.tokenizer.pad_id, loss.temperature, tail_of(loss)),
            callbacks=[ProgressCallback(progress), CsvLog(run.log)],
            distillation={
                **loss.model_dump(exclude={"tail"}),
                "vocab_size": cache.vocab_size,
                "kept_share": summary.kept_positions / summary.positions,
                "order_seed": recipe.seed,
            },
        )
    except (ValueError, ImportError, RuntimeError) as exc:
        raise TrainingError(f"transformers cannot set up the training: {' '.join(str(exc).split())[:300]}") from exc
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def _train(trainer: DistillationTrainer, checkpoint: Path | None) -> None:
    """Train to the end, from a checkpoint where there is one; one that stands at the end is only loaded."""
    if checkpoint is not None:
        state = transformers.TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        # Given such a checkpoint, the trainer would take one more step before it looks.
        if state.global_step >= state.max_steps:
            trainer._load_from_checkpoint(str(checkpoint))
            trainer.state = state
            return
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))


@contextmanager
def _translated(run: RunDirectory, batch_size: int) -> Iterator[None]:
    """Foreign errors of training and saving in our terms."""
    try:
        yield
    except torch.OutOfMemoryError as exc:
        raise TrainingError(
            f"out of memory with training.batch_size {batch_size}; halve it and double training.accumulation, or use "
            "training.gradient_checkpointing"
        ) from exc
    except (OSError, SafetensorError, RuntimeError) as exc:
        # torch.save reports a full disk as a RuntimeError of its archive writer.
        if (
            isinstance(exc, RuntimeError)
            and "inline_container" not in str(exc)
            and "PytorchStreamWriter" not in str(exc)
        ):
            raise
        reason = " ".join(str(exc).split())[:200]
        raise StorageError(f"cannot write to {run.path}: {reason}; free some space and go on by --resume") from exc
