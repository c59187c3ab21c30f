"""A recipe and a cache -> the student, the trainer, and what the user should know of the teacher's tail."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers

from kdcache.cache.reader import Cache
from kdcache.errors import TrainingError
from kdcache.evaluate.perplexity import Score
from kdcache.models import attach_lora, first_line, load_model
from kdcache.progress import Progress
from kdcache.recipe import Recipe
from kdcache.recipe_student import StudentSection
from kdcache.recipe_training import LossSection, Ramp, Scheduled, describe, span_of, value_at
from kdcache.student.agreement import TRAIN, VALIDATION
from kdcache.student.batches import OrderOptions, SplitDataset
from kdcache.student.collate import Collator, Tail, uses_draws
from kdcache.student.log import CsvLog
from kdcache.student.progress_callback import ProgressCallback
from kdcache.student.record import RunDirectory
from kdcache.student.symptoms import symptoms
from kdcache.student.trainer import DistillationTrainer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LOW_MASS = 0.5


def load_student(student: StudentSection, saved: Path | None = None) -> PreTrainedModel:
    """The recipe's student as it starts, or the fully trained model that a run saved."""
    return load_model(
        student.model if saved is None else str(saved),
        revision=student.revision if saved is None else None,
        quantization=student.quantization,
        dtype=student.dtype,
        device=student.device,
        attention=student.attention,
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
        dora=student.lora.dora,
        rslora=student.lora.rslora,
        quantized=student.quantization != "none",
    )


def make_trainer(
    recipe: Recipe,
    cache: Cache,
    model: PreTrainedModel,
    arguments: transformers.TrainingArguments,
    run: RunDirectory,
    progress: Progress,
) -> DistillationTrainer:
    """The trainer of a recipe.

    Raises:
        TrainingError: transformers cannot set it up.
    """
    loss, training, summary = recipe.loss, recipe.training, cache.split(TRAIN).summary
    callbacks: list[transformers.TrainerCallback] = [ProgressCallback(progress), CsvLog(run.log)]
    if training.patience is not None:
        callbacks.append(transformers.EarlyStoppingCallback(training.patience))
    try:
        trainer = DistillationTrainer(
            model=model,
            args=arguments,
            train_dataset=SplitDataset(cache.split(TRAIN), training.fraction),
            eval_dataset=SplitDataset(cache.split(VALIDATION)),
            data_collator=collator_of(recipe, cache),
            callbacks=callbacks,
            distillation={
                "vocab_size": cache.vocab_size,
                **{key: _over_time(getattr(loss, key)) for key in ("temperature", "ce_weight", "kd_weight")},
                "reduction": loss.reduction,
                "divergence": loss.divergence,
                "beta": loss.beta,
                "kept_share": summary.kept_positions / summary.positions,
                "order": order_of(recipe),
                "skip_nonfinite": training.skip_nonfinite,
                "tell": progress.warning,
            },
        )
    except (ValueError, ImportError, RuntimeError) as exc:
        raise TrainingError(f"transformers cannot set up the training: {first_line(exc)}") from exc
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def collator_of(recipe: Recipe, cache: Cache) -> Collator:
    """What makes the recipe's batches; a scheduled temperature comes with each."""
    training = recipe.training
    return Collator(
        cache.plan.tokenizer.pad_id,
        span_of(recipe.loss.temperature)[1],
        tail_of(recipe.loss),
        # Packed rows may be as long as the cache allows, and not only as the longest that is there by chance.
        max_length=training.max_length or (cache.plan.data.max_length if training.packing else None),
        packed=training.packing,
    )


def order_of(recipe: Recipe) -> OrderOptions:
    """Seed and manner of the order of samples."""
    training = recipe.training
    return OrderOptions(recipe.seed, training.shuffle_shards, training.group_by_length, training.max_length)


def tail_of(loss: LossSection) -> Tail:
    """What stands for the mass outside: divergences over a bucket take no drawn entries."""
    return "lumped" if loss.tail == "auto" and loss.divergence in ("reverse_kl", "jsd") else loss.tail


def tell_of_tail(loss: LossSection, cache: Cache, progress: Progress) -> None:
    """Say how much of the teacher is exact at the temperature of the training, and what stands for the rest."""
    design = cache.plan.design(0)
    _, highest = span_of(loss.temperature)
    sampled = tail_of(loss) == "auto" and uses_draws(design, highest)
    rest = "drawn" if sampled else "ignored" if loss.tail == "renormalised" else "one bucket"
    declared, chosen = ", ".join(f"{t:g}" for t in cache.temperatures), describe(loss.temperature)
    if loss.temperature in cache.temperatures:
        mass = cache.split(TRAIN).summary.kept_mass_mean[cache.temperatures.index(highest)]
        tell = progress.warning if mass < _LOW_MASS and not sampled else progress.message
        tell(f"the exact entries hold {mass:.1%} of the teacher's probability at T = {chosen}; the rest is {rest}")
    else:
        unserved = design.sampled and not sampled
        tell = progress.warning if unserved else progress.message
        tell(
            f"the cache declares T = {declared}; at T = {chosen} the mass outside the exact entries is interpolated, and "
            f"the rest is {rest}" + (": drawn entries serve up to the largest declared temperature" if unserved else "")
        )


def tell_of_cut(max_length: int | None, cache: Cache, progress: Progress) -> None:
    """Where only some positions were kept, they were chosen from whole sequences."""
    chosen = cache.plan.selection.positions
    if max_length is not None and max_length < cache.plan.data.max_length and chosen != "all":
        progress.warning(
            f"the cache keeps positions by {chosen}, chosen from sequences of up to {cache.plan.data.max_length} tokens; of what "
            f"is left at training.max_length {max_length} another share may be kept, and the KD term is scaled by the whole's"
        )


def tell_of_steps(trainer: DistillationTrainer, progress: Progress) -> None:
    """Say what a step is: a launcher that starts fewer processes than were meant makes another experiment."""
    args, plan = trainer.args, trainer.batch_plan
    processes = f" x {args.world_size} processes" if args.world_size > 1 else ""
    progress.message(
        f"{plan.global_batch} sequences a step ({plan.batch_size} x {plan.accumulation}{processes}), {trainer.total_steps} steps, "
        f"{plan.steps} an epoch"
    )


def tell_of_end(trainer: DistillationTrainer, scores: dict[str, Score], loss: LossSection, progress: Progress) -> None:
    """Say which student was kept and why, and whether it is any better."""
    state = trainer.state
    if state.global_step < trainer.total_steps:
        progress.message(f"stopped at step {state.global_step}: no better evaluation for training.patience of them")
    if trainer.args.load_best_model_at_end:
        progress.message(
            f"the student of step {state.best_global_step}, of the best evaluation, is the one that is saved"
        )
    # Where weights or the temperature move, the loss moves with them.
    steady = not any(isinstance(value, Ramp) for value in (loss.temperature, loss.ce_weight, loss.kd_weight))
    distils = span_of(loss.kd_weight)[1] > 0
    for symptom in symptoms(state.log_history if steady else [], scores, distils=distils):
        progress.warning(symptom)


def _over_time(value: Scheduled) -> Any:
    return partial(value_at, value) if isinstance(value, Ramp) else value
