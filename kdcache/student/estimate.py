"""What a training run will cost, before anything large is loaded or anything is written.

Sizes come from the student's configuration and the cache's plan and manifest; time and activations from a probe of one and two
layers on the recipe's own micro-batches.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kdcache.cache.reader import Cache
from kdcache.errors import RecipeError
from kdcache.models import refuse_narrow_head
from kdcache.progress import Progress, Silent
from kdcache.recipe import Recipe
from kdcache.recipe_student import StudentSection
from kdcache.recipe_training import span_of
from kdcache.student.agreement import TRAIN, VALIDATION
from kdcache.student.arguments import training_arguments
from kdcache.student.assembly import collator_of, order_of, tell_of_init
from kdcache.student.batches import Batch, MicroBatches, SplitDataset
from kdcache.student.bench import padded_tokens
from kdcache.student.distill import fitting_cache
from kdcache.student.hidden import refuse_impossible_term, refuse_other_live_teacher
from kdcache.student.initial import is_made, stored_dtype
from kdcache.student.parameters import Parameters, count_parameters, outline, read_config, untrained_bytes
from kdcache.student.probe import Probe, probe, shortened, write_random
from kdcache.student.processes import launched
from kdcache.student.sampler import BatchPlan
from kdcache.student.shapes import count
from kdcache.token_maps import load_tokenizer, refuse_other_tokens, token_map

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# Micro-batches that sizes are taken from: runs of neighbours, which lie in the same shards, at places spread over an epoch.
_PLACES, _NEIGHBOURS = 6, 8


@dataclass(frozen=True)
class TrainingEstimate:
    """Prediction for a training run.

    Attributes:
        architecture: the student's class.
        layers: its decoder layers; 0 where the configuration does not say.
        student: as the recipe has it.
        parameters: counts and bytes.
        batches: how an epoch is cut into steps.
        steps: optimizer steps.
        micro_batches: forward passes of this process in the whole run.
        tokens: of an epoch, after cutting to ``training.max_length``.
        positions: targets of an epoch, after cutting.
        cut_to: ``training.max_length``.
        sampled: whether tokens and positions are scaled up from a sample, since not all of the split is learnt from.
        padded_tokens: tokens of an average micro-batch, with what fills it up.
        evaluations: passes over the validation split.
        score_micro_batches: average micro-batches of the train split that one evaluation comes to.
        keep_checkpoints: checkpoints on disk at a time.
        measured: None where the student cannot be probed.
        reading_seconds: making a micro-batch, where no worker does it beside the training.
        remarks: what the prediction leaves out, in words.
    """

    architecture: str
    layers: int
    student: StudentSection
    parameters: Parameters
    batches: BatchPlan
    steps: int
    micro_batches: int
    tokens: int
    positions: int
    cut_to: int | None
    sampled: bool
    padded_tokens: float
    evaluations: int
    score_micro_batches: float
    keep_checkpoints: int
    measured: Probe | None
    reading_seconds: float
    remarks: tuple[str, ...]

    @property
    def step_seconds(self) -> float | None:
        """Seconds of a whole optimizer step."""
        if self.measured is None:
            return None
        one = self.measured.pass_seconds.at(self.layers) + self.reading_seconds
        return self.batches.accumulation * one + self.measured.update_seconds.at(self.layers)

    @property
    def training_seconds(self) -> float | None:
        """Seconds of all steps; the last of an epoch may be smaller."""
        if self.measured is None:
            return None
        one = self.measured.pass_seconds.at(self.layers) + self.reading_seconds
        return self.micro_batches * one + self.steps * self.measured.update_seconds.at(self.layers)

    @property
    def evaluation_seconds(self) -> float | None:
        """Seconds of one evaluation."""
        if self.measured is None:
            return None
        return self.score_micro_batches * self.measured.score_seconds.at(self.layers)

    @property
    def memory(self) -> dict[str, int | None]:
        """Bytes by part; None for what is not known."""
        parts: dict[str, int | None] = {
            "weights": self.parameters.base_bytes + self.parameters.adapter_bytes,
            "gradients": self.parameters.gradient_bytes,
            "optimizer": self.parameters.state_bytes,
        }
        if self.measured is None:
            return {**parts, "activations": None, "loss": None}
        activations = round(self.measured.activation_bytes.at(self.layers))
        if self.measured.whole:
            return {**parts, "activations and loss": activations}
        return {**parts, "activations": activations, "loss": self.measured.loss_bytes}

    @property
    def checkpoint_bytes(self) -> int | None:
        """Bytes of one checkpoint on disk: what is trained, and the optimizer's state."""
        if self.parameters.state_bytes is None:
            return None
        return self.parameters.gradient_bytes + self.parameters.state_bytes


def estimate_training(
    recipe: Recipe, progress: Progress | None = None, *, processes: int | None = None
) -> TrainingEstimate:
    """Predict what `distill` would cost on this machine. Writes nothing but temporary files.

    Args:
        recipe: needs ``student``, and a complete cache.
        progress: told what is being done.
        processes: that share a step; as many as a launcher started when None.

    Raises:
        KdcacheError: as `distill` would, as far as that shows without the student's weights.
    """
    progress = progress or Silent()
    if recipe.student is None:
        raise RecipeError("train-student needs the recipe section student")
    student, training = recipe.student, recipe.training
    processes = processes or launched()
    cache = fitting_cache(recipe, progress)
    tokenizer = load_tokenizer(student.model, student.revision)
    refuse_other_tokens(token_map(tokenizer), cache.vocabulary(), student.model)
    config = read_config(student)
    tell_of_init(recipe, cache, progress)
    refuse_impossible_term(recipe, config, cache)
    refuse_other_live_teacher(recipe, cache)
    base = outline(config, student)
    refuse_narrow_head(base, cache.vocab_size, student.model)
    train, validation = cache.split(TRAIN), cache.split(VALIDATION)
    sequences = len(SplitDataset(train, training.fraction))
    plan = BatchPlan(sequences, training.batch_size, training.accumulation, processes)
    steps = training.max_steps if training.max_steps > 0 else math.ceil(training.epochs * plan.steps)
    epochs, rest = divmod(steps, plan.steps)
    sample = _sample(recipe, cache, plan)
    short, measured = shortened(config, student), None
    with tempfile.TemporaryDirectory(prefix="kdcache-") as folder:
        random = Path(folder) / "random"
        if short is not None:
            write_random(short, student, random)
        # Neither an evaluation nor a logger is wanted here, and to compile would take longer than to measure.
        arguments = training_arguments(
            training.model_copy(update={"eval_steps": None, "keep_best": False, "report_to": [], "compile": False}),
            device=student.device, seed=recipe.seed, checkpoints=Path(folder) / "checkpoints", tell=progress.message,
        )  # fmt: skip
        optimizer = str(getattr(arguments.optim, "value", arguments.optim))
        parameters = count_parameters(base, student, optimizer)
        if short is not None:
            progress.message(f"measuring {type(base).__name__} with one and two layers of random weights")
            measured = probe(recipe, student, random, sample.batches, _loss_options(recipe, cache), arguments)
    kinds = set(getattr(config.get_text_config(), "layer_types", None) or ())
    remarks = {
        f"layers are not all alike ({', '.join(sorted(kinds))}); the first two stand for all": len(kinds) > 1,
        "time and activations are those without torch.compile": training.compile,
        f"the size of {optimizer}'s state is not known, and is in no sum": parameters.state_bytes is None,
        "the student has no list of layers that could be shortened, so that time and activations are not known": not measured,
        f"the student as it starts is kept beside it: {_made_bytes(config, student) / 2**20:,.1f} MiB more on disk": is_made(
            student
        ),
        f"the live teacher of loss.hidden_weight is in no figure: {_teacher_bytes(recipe) / 2**20:,.1f} MiB of weights on its "
        "device, and its forward pass on every batch": recipe.loss.hidden_weight > 0,
    }
    # An evaluation takes the sequences in their order, and cuts them too: its batches are about those of the training.
    sampled = training.max_length is not None or sequences < len(train)
    longer = validation.summary.tokens / len(validation) / (train.summary.tokens / len(train))
    return TrainingEstimate(
        architecture=type(base).__name__,
        layers=int(getattr(config.get_text_config(), "num_hidden_layers", 0)),
        student=student,
        parameters=parameters,
        batches=plan,
        steps=steps,
        micro_batches=epochs * plan.micro_batches + min(rest * plan.accumulation, plan.micro_batches),
        tokens=round(sample.tokens * sequences) if sampled else train.summary.tokens,
        positions=round(sample.positions * sequences) if sampled else train.summary.positions,
        cut_to=training.max_length,
        sampled=sampled,
        padded_tokens=sample.padded,
        # In between, and once more at the last step.
        evaluations=2 + (-(-steps // training.eval_steps) if training.eval_steps else 0),
        score_micro_batches=len(validation) / training.batch_size * (1.0 if training.max_length else longer),
        # One more while it is written, and the best where it is kept.
        keep_checkpoints=training.keep_checkpoints + 1 + training.keep_best,
        measured=measured,
        reading_seconds=0.0 if training.workers else sample.seconds,
        remarks=tuple(text for text, applies in remarks.items() if applies),
    )


def _made_bytes(config: PreTrainedConfig, student: StudentSection) -> int:
    """What a made student takes on disk, in the precision that it is stored in; 0 for one that is not made."""
    if not is_made(student):
        return 0
    stored: torch.dtype = getattr(torch, stored_dtype(config))
    return count(config).total * stored.itemsize


def _teacher_bytes(recipe: Recipe) -> int:
    """Weights of the teacher that a term on hidden states keeps beside the student; 0 without one."""
    teacher = recipe.teacher
    if teacher is None or not recipe.loss.hidden_weight:
        return 0
    kept = teacher.model_dump(include={"model", "revision", "quantization", "dtype", "device"})
    return untrained_bytes(StudentSection.model_validate(kept))


@dataclass(frozen=True)
class _Sample:
    """Micro-batches, seconds to make one, padded tokens in one, and tokens and targets of a sequence, all on average."""

    batches: list[Batch]
    seconds: float
    padded: float
    tokens: float
    positions: float


def _sample(recipe: Recipe, cache: Cache, plan: BatchPlan) -> _Sample:
    training, split, highest = recipe.training, cache.split(TRAIN), span_of(recipe.loss.temperature)[1]
    micro_batches = MicroBatches(split, plan, order_of(recipe), collator_of(recipe, cache), lambda step: highest)
    starts = [i * max(0, plan.micro_batches - _NEIGHBOURS) // (_PLACES - 1) for i in range(_PLACES)]
    numbers = sorted({n for s in starts for n in range(s, min(s + _NEIGHBOURS, plan.micro_batches))})
    batches, seconds, cut = [], [], []
    for number in numbers:
        started = time.perf_counter()
        batches.append(micro_batches[0, number])
        seconds.append(time.perf_counter() - started)
        indices = batches[-1]["sequence_index"].tolist()
        cut += [split[i].targets[: training.max_length] for i in indices if i >= 0]
    return _Sample(
        batches,
        # The median leaves out those that had a shard decoded, which in training happens ahead of time.
        statistics.median(seconds),
        statistics.fmean(map(padded_tokens, batches)),
        statistics.fmean(len(targets) for targets in cut),
        statistics.fmean(int(targets.sum()) for targets in cut),
    )


def _loss_options(recipe: Recipe, cache: Cache) -> dict[str, Any]:
    loss = recipe.loss
    largest = {key: span_of(getattr(loss, key))[1] for key in ("temperature", "ce_weight", "kd_weight")}
    return {"vocab_size": cache.vocab_size, "divergence": loss.divergence, "beta": loss.beta, **largest}
