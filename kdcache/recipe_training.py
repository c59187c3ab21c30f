"""The recipe's sections on what is minimised and how."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, model_validator

from kdcache.recipe_selection import Section


class Ramp(Section):
    """A value that goes from ``start`` to ``end`` over the training."""

    start: float = Field(ge=0, description="Value at the first step.")
    end: float = Field(ge=0, description="Value at the last step.")
    shape: Literal["linear", "cosine"] = Field("linear", description="linear, or cosine: slow at both ends.")

    def at(self, progress: float) -> float:
        """The value at a share of the training, 0 to 1."""
        way = progress if self.shape == "linear" else (1 - math.cos(math.pi * progress)) / 2
        return self.start + (self.end - self.start) * way


Scheduled = float | Ramp


def value_at(scheduled: Scheduled, progress: float) -> float:
    """A constant, or a ramp's value at a share of the training, 0 to 1."""
    return scheduled.at(progress) if isinstance(scheduled, Ramp) else scheduled


def span_of(scheduled: Scheduled) -> tuple[float, float]:
    """Smallest and largest value that it takes."""
    values = value_at(scheduled, 0.0), value_at(scheduled, 1.0)
    return min(values), max(values)


def describe(scheduled: Scheduled) -> str:
    """As a person reads it: ``2``, or ``4 to 1 (cosine)``."""
    if isinstance(scheduled, Ramp):
        return f"{scheduled.start:g} to {scheduled.end:g} ({scheduled.shape})"
    return f"{scheduled:g}"


class LossSection(Section):
    """ce_weight * CE + kd_weight * temperature^2 * divergence(teacher_T, student_T) + hidden_weight * MSE(hidden states)."""

    temperature: Scheduled = Field(
        2.0, description="T of the KL term: a number, or {start, end, shape: linear or cosine} over the training."
    )
    ce_weight: Scheduled = Field(
        0.5, description="Weight of the cross-entropy with the label; may be scheduled as T may."
    )
    kd_weight: Scheduled = Field(0.5, description="Weight of the KL term, before T squared; may be scheduled as T may.")
    reduction: Literal["mean", "sum"] = Field(
        "mean",
        description="mean: per valid token of the whole accumulation window; sum: summed over tokens, averaged over "
        "micro-batches.",
    )
    divergence: Literal["forward_kl", "soft_ce", "reverse_kl", "jsd"] = Field(
        "forward_kl",
        description="forward_kl: KL(teacher, student); soft_ce: the same plus the teacher's entropy; reverse_kl and jsd: "
        "over the kept entries and one bucket for the rest.",
    )
    beta: float = Field(0.5, gt=0, lt=1, description="Weight of the teacher in the mixture of jsd.")
    tail: Literal["auto", "lumped", "renormalised"] = Field(
        "auto",
        description="Mass outside the exact entries. lumped: one bucket with its exact mass; renormalised: ignored, the "
        "exact entries scaled to 1 (biased, for comparison); auto: the drawn entries where the cache has them and the "
        "divergence is forward_kl or soft_ce, otherwise lumped.",
    )
    control_variate: bool = Field(
        True,
        description="Less noise in the gradient of drawn entries: the student's own distribution stands in for what was "
        "not drawn, as far as it is right elsewhere in the batch, and the draws correct it. For threshold_sampling with tail "
        "logits and one teacher.",
    )

    hidden_weight: float = Field(
        0.0,
        ge=0,
        description="Weight of the squared distance to a live teacher's hidden states; the teacher then runs beside the student.",
    )
    hidden_layers: tuple[int, ...] | None = Field(
        None, description="Layers of the student that are compared, 0 for the embeddings; null: every layer."
    )

    @model_validator(mode="after")
    def _hidden_states(self) -> LossSection:
        layers = self.hidden_layers
        if layers is None:
            return self
        if not self.hidden_weight:
            raise ValueError("loss.hidden_layers goes with loss.hidden_weight above 0; leave it out")
        if not layers or any(b <= a for a, b in zip((-1, *layers), layers, strict=False)):
            raise ValueError(
                f"loss.hidden_layers should name layers from 0 (the embeddings) on in rising order, none of them twice, found "
                f"{list(layers)}"
            )
        return self

    @model_validator(mode="after")
    def _something_to_learn(self) -> LossSection:
        for key in ("temperature", "ce_weight", "kd_weight"):
            low, high = span_of(getattr(self, key))
            if not (0 <= low <= high < math.inf) or (key == "temperature" and not 0 < low <= high <= 100):
                wanted = "above 0 and at most 100" if key == "temperature" else "at least 0"
                raise ValueError(f"recipe key loss.{key} should be {wanted}, found {describe(getattr(self, key))}")
        if span_of(self.ce_weight)[1] == 0 and span_of(self.kd_weight)[1] == 0 and not self.hidden_weight:
            raise ValueError("loss.ce_weight and loss.kd_weight are both 0: nothing to learn")
        if self.tail == "renormalised" and self.divergence in ("reverse_kl", "jsd"):
            raise ValueError(f"loss.divergence {self.divergence} needs the mass outside: loss.tail auto or lumped")
        return self


class TrainingSection(Section):
    """How long and how fast; the names of transformers.TrainingArguments, shortened."""

    learning_rate: float = Field(2e-4, gt=0, description="Peak learning rate.")
    epochs: float = Field(3.0, gt=0, description="Passes over the train split.")
    max_steps: int = Field(-1, ge=-1, description="Optimizer steps; -1 lets epochs decide.")
    batch_size: int = Field(8, ge=1, description="Sequences per device and forward pass.")
    accumulation: int = Field(
        1,
        ge=1,
        description="Forward passes per optimizer step. batch_size x accumulation x processes is the global batch, and all "
        "that the order of samples and the result depend on.",
    )
    fraction: float = Field(
        1.0, gt=0, le=1, description="Share of the cache's train split that is learnt from: its first sequences."
    )
    max_length: int | None = Field(
        None, ge=2, description="Cut sequences to so many tokens, as if the cache had been made at this length."
    )
    packing: bool = Field(
        False, description="Lay the sequences of a forward pass end to end instead of padding each; none sees another."
    )
    group_by_length: bool = Field(
        False, description="Put sequences of similar length into one global batch: less padding, less random."
    )
    shuffle_shards: int = Field(
        8,
        ge=1,
        le=256,
        description="Shards that are mixed at a time, and held in memory; a split of no more is shuffled as a whole. Raise it for "
        "data that lies on disk sorted by topic.",
    )
    workers: int = Field(1, ge=0, le=64, description="Processes that read and decode the cache beside the training.")
    clip: float | None = Field(0.5, gt=0, description="Largest gradient norm; null does not clip.")
    optimizer: str = Field("paged_adamw_8bit", description="A name of transformers' optim.")
    schedule: str = Field("linear", description="A name of transformers' lr_scheduler_type.")
    warmup: float = Field(
        0.0, ge=0, description="Warm-up: a fraction of the steps below 1, a number of steps from 1 on."
    )
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay.")
    precision: Literal["bf16", "fp16", "fp32"] = Field("bf16", description="Autocast of the training step.")
    tf32: bool = Field(False, description="Allow TF32 in float32 matrix products (NVIDIA GPUs from Ampere on).")
    compile: bool = Field(False, description="Run the student through torch.compile.")
    gradient_checkpointing: bool = Field(True, description="Recompute activations in the backward pass.")
    logging_steps: int = Field(10, ge=1, description="Steps between two log lines.")
    eval_steps: int | None = Field(
        None, ge=1, description="Steps between two evaluations on the validation split; null: only before and after."
    )
    keep_best: bool = Field(
        False, description="Save the student of the best evaluation (loss) instead of the last; needs eval_steps."
    )
    patience: int | None = Field(
        None, ge=1, description="Stop after so many evaluations without a better one; needs eval_steps."
    )
    skip_nonfinite: int = Field(
        0, ge=0, description="Steps whose loss or gradient is not finite that are left out before the run stops."
    )
    save_steps: int = Field(200, ge=1, description="Steps between two checkpoints.")
    keep_checkpoints: int = Field(2, ge=1, description="Checkpoints kept; older ones are removed.")
    report_to: list[str] = Field(
        default_factory=list,
        description="Further loggers of transformers (tensorboard, wandb, trackio); log.csv is always written.",
    )

    @model_validator(mode="after")
    def _some_steps(self) -> TrainingSection:
        if self.max_steps == 0:
            raise ValueError("training.max_steps should be -1 (epochs decide) or at least 1, found 0")
        return self

    @model_validator(mode="after")
    def _evaluations(self) -> TrainingSection:
        for key in ("keep_best", "patience"):
            if getattr(self, key) and self.eval_steps is None:
                raise ValueError(f"training.{key} needs training.eval_steps")
        if self.keep_best and self.eval_steps is not None and self.save_steps % self.eval_steps:
            raise ValueError(
                f"training.keep_best needs training.save_steps ({self.save_steps}) to be a multiple of "
                f"training.eval_steps ({self.eval_steps})"
            )
        return self

    @model_validator(mode="after")
    def _whole_warmup(self) -> TrainingSection:
        if self.warmup >= 1 and self.warmup != int(self.warmup):
            raise ValueError("training.warmup of 1 or more is a number of steps and should be whole")
        return self
