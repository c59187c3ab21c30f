"""A recipe and a cache -> the student, the trainer, and what the user should know of the teacher's tail."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers

from kdcache.cache.mixture import Mixture
from kdcache.cache.reader import Cache
from kdcache.errors import TrainingError
from kdcache.evaluate.perplexity import Score, kl_temperature
from kdcache.models import attach_lora, first_line, load_model
from kdcache.progress import Progress
from kdcache.recipe import Recipe
from kdcache.recipe_student import StudentSection
from kdcache.recipe_training import LossSection, Ramp, Scheduled, describe, span_of, value_at
from kdcache.student.agreement import TRAIN, VALIDATION
from kdcache.student.batches import OrderOptions, SplitDataset
from kdcache.student.collate import Collator, Tail, sparse_teacher, uses_draws
from kdcache.student.hidden import live_term
from kdcache.student.initial import init_lines, is_made, make_student
from kdcache.student.log import CsvLog
from kdcache.student.progress_callback import ProgressCallback
from kdcache.student.record import RunDirectory
from kdcache.student.symptoms import symptoms
from kdcache.student.trainer import DistillationTrainer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LOW_MASS = 0.5
# Positions of a mixture from which what its caches have in common is measured.
_MEASURED = 4096


def load_student(student: StudentSection, saved: Path | None = None) -> PreTrainedModel:
    """The recipe's student as it starts, or from a folder: as a run made it to start from, or the fully trained one that it saved.

    A student that has to be made, and for which no folder is given, is made again: the same one.
    """
    if saved is None and is_made(student):
        with tempfile.TemporaryDirectory(prefix="kdcache-") as folder:
            made = Path(folder) / Path(student.model).name
            make_student(student, made)
            return load_student(student, made)
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
        ModelError: the teacher of a term on hidden states cannot be loaded.
    """
    hidden = live_term(recipe, model, cache)
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
                "control_variate": loss.control_variate and knows_its_draws(cache),
                "kept_share": summary.kept_positions / summary.positions,
                "order": order_of(recipe),
                "skip_nonfinite": training.skip_nonfinite,
                "tell": progress.warning,
                "hidden": hidden,
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


def knows_its_draws(cache: Cache) -> bool:
    """Whether a cache's drawn entries were drawn with probability ``p / weight``, each ``p`` known: by threshold sampling, with
    the logits of what was drawn, and of one teacher."""
    selection = cache.plan.selection
    return selection.method == "threshold_sampling" and selection.tail_logits and not isinstance(cache, Mixture)


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
        # A mixture's bucket takes in what not every cache holds, which is told below.
        low = mass < _LOW_MASS and not sampled and not (isinstance(cache, Mixture) and rest == "one bucket")
        tell = progress.warning if low else progress.message
        each = ", a mean over its caches" if isinstance(cache, Mixture) else ""
        tell(
            f"the exact entries hold {mass:.1%} of the teacher's probability at T = {chosen}{each}; the rest is {rest}"
        )
    else:
        unserved = design.sampled and not sampled
        tell = progress.warning if unserved else progress.message
        tell(
            f"the cache declares T = {declared}; at T = {chosen} the mass outside the exact entries is interpolated, and "
            f"the rest is {rest}" + (": drawn entries serve up to the largest declared temperature" if unserved else "")
        )
    if isinstance(cache, Mixture):
        taught = rest == "one bucket"
        _tell_of_common(cache, highest if taught else kl_temperature(cache), progress, taught=taught)


def common_mass(cache: Mixture, temperature: float) -> tuple[float, int]:
    """What the entries that every cache of a mixture holds come to, of its probability, and over how many positions that was
    measured: the first ones of the training split. Everything else is in the bucket where one stands for the rest.

    The mean of what the caches hold each for itself is no more than an upper bound: teachers of different opinions have few
    entries in common.
    """
    split = cache.split(TRAIN)
    shards = (cache.shard(index).rows for index in split.shards)
    rows = next(rows for rows in shards if len(rows))
    rows = rows.slice(0, min(_MEASURED, len(rows)))
    log_rest = sparse_teacher(rows, temperature, "lumped").log_tail_N.double()
    # What is outside is rounded, and may come to more than 1.
    return float((1 - log_rest.exp()).mean().clamp(min=0)), len(rows)


def _tell_of_common(cache: Mixture, temperature: float, progress: Progress, *, taught: bool) -> None:
    """Say how much of a mixture is not in the bucket by which its students are scored, and may be taught."""
    mass, positions = common_mass(cache, temperature)
    what = "taught and scored" if taught else "scored"
    said = (
        f"students are {what} by the entries that all {len(cache.parts)} caches hold: {mass:.1%} of the mixture's probability "
        f"at T = {temperature:g}, measured over the first {positions:,} positions; all else is one bucket"
    )
    if mass < _LOW_MASS:
        progress.warning(
            f"{said}, and the KL a bound far below the mixture's; mix caches that keep more of each position"
        )
    else:
        progress.message(said)


def tell_of_cut(max_length: int | None, cache: Cache, progress: Progress) -> None:
    """Where only some positions were kept, they were chosen from whole sequences."""
    chosen = cache.plan.selection.positions
    if max_length is not None and max_length < cache.plan.data.max_length and chosen != "all":
        progress.warning(
            f"the cache keeps positions by {chosen}, chosen from sequences of up to {cache.plan.data.max_length} tokens; of what "
            f"is left at training.max_length {max_length} another share may be kept, and the KD term is scaled by the whole's"
        )


def tell_of_init(recipe: Recipe, cache: Cache, progress: Progress) -> None:
    """Say what the student is made as, where it is made.

    Raises:
        ModelError: it cannot be made.
    """
    if recipe.student is not None:
        for line in init_lines(recipe.student, recipe.training.max_length or cache.plan.data.max_length):
            progress.message(line)
        init = recipe.student.init
        if init is not None and init.method == "scale" and recipe.student.lora is not None:
            progress.warning(
                "student.init.method scale makes random weights, and student.lora trains few besides them: they stay random; "
                "train every weight with student.lora=null student.quantization=none student.dtype=float32"
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
    distils, labelled = (span_of(weight)[1] > 0 for weight in (loss.kd_weight, loss.ce_weight))
    for symptom in symptoms(state.log_history if steady else [], scores, distils=distils, labelled=labelled):
        progress.warning(symptom)


def _over_time(value: Scheduled) -> Any:
    return partial(value_at, value) if isinstance(value, Ramp) else value
