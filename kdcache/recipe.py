"""A recipe: one YAML file per experiment, parsed into strict models.

Unknown keys are refused with the nearest known one named, values out of range with the key named, and
keys that contradict each other with both named. ``key.path=value`` overrides come from the command line.
Relative paths are relative to the working directory, as on any command line.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from kdcache.cache.layout import SHARD_LIMIT
from kdcache.errors import RecipeError
from kdcache.recipe_keys import explain
from kdcache.recipe_selection import Section, SelectionSection
from kdcache.recipe_yaml import read_values

# Bytes of an entry before compression, and how many of them compression makes one of as a rule; the writer checks.
_ENTRY_BYTES, _UNPACKED = 5, 3
Quantization = Literal["none", "nf4", "int8"]
Dtype = Literal["bfloat16", "float16", "float32"]
Device = Literal["auto", "cuda", "cpu"]


class EmbeddedSection(Section):
    """Make the built-in data set, tokenizer, teacher and student when they are not there yet."""

    directory: str = Field("runs/embedded/models", description="Folder for the data and the model folders.")
    seed: int = Field(0, ge=0, description="Everything made depends on this seed alone.")
    train_examples: int = Field(3000, ge=8, description="Examples of the distillation split.")
    validation_examples: int = Field(300, ge=4, description="Examples of the validation split.")
    pretrain_examples: int = Field(
        8000, ge=16, description="Further examples that teacher and student learn from first."
    )
    teacher_steps: int = Field(450, ge=1, description="Training steps of the teacher.")
    student_steps: int = Field(80, ge=1, description="Training steps of the student.")


class SourceSection(Section):
    """One split of a data set."""

    path: str = Field(
        description="Hugging Face data set id, or a local .json/.jsonl(.gz)/.parquet file, or a directory of such files "
        "or of a saved data set."
    )
    name: str | None = Field(None, description="Configuration of the data set, where it has several.")
    split: str = Field("train", description="Split with an optional slice, such as train[:5%] or train[100:200].")
    revision: str | None = Field(None, description="Commit, tag or branch of a data set on the Hub.")


class DataSection(Section):
    """Which text, and how it becomes tokens."""

    train: SourceSection = Field(description="What the student learns from.")
    validation: SourceSection = Field(description="What perplexity is measured on.")
    shape: Literal["auto", "instruction", "chat", "text"] = Field(
        "auto",
        description="instruction: instruction, optional input, output; chat: messages, loss on assistant turns only; "
        "text: every token is learnt; auto: by the columns.",
    )
    columns: dict[Literal["instruction", "input", "output", "messages", "text"], str] = Field(
        default_factory=dict, description="The data set's column for each of ours, where the names differ."
    )
    prompt: Literal["chat", "plain"] = Field(
        "chat",
        description="chat: the tokenizer's chat template; plain: instruction, input and response separated by line breaks.",
    )
    system: str | None = Field(
        None, max_length=4096, description="System message put before every conversation that has none."
    )
    date: str = Field(
        "2024-07-26",
        pattern=r"^\d{4}-\d{2}-\d{2}$",
        description="What a chat template that writes today's date writes instead, so that a cache does not depend on the day.",
    )
    max_length: int = Field(
        512, ge=2, le=1 << 20, description="Longest sequence in tokens; longer ones are cut and counted."
    )


class TeacherSection(Section):
    """The model whose distributions are cached."""

    model: str = Field(description="Hugging Face id or local folder.")
    revision: str | None = Field(None, description="Commit, tag or branch on the Hub.")
    quantization: Quantization = Field("nf4", description="nf4 (4-bit, double quantisation), int8 or none.")
    dtype: Dtype = Field("bfloat16", description="Arithmetic and unquantised weights.")
    device: Device = Field("auto", description="auto takes CUDA where there is one.")
    batch_tokens: int = Field(
        8192, ge=16, description="Padded tokens in one forward pass; a longer sequence goes alone."
    )


class CacheSection(Section):
    """Where the cache lies and how it is cut."""

    directory: str = Field(description="Cache directory; the thing to share.")
    positions_per_shard: int = Field(
        65536,
        ge=1,
        le=1 << 24,
        description="A shard is closed when it holds this many; a killed run loses at most one shard.",
    )


class LoraSection(Section):
    """LoRA as peft knows it."""

    r: int = Field(16, ge=1, description="Rank.")
    alpha: float = Field(32, gt=0, description="Scale; updates are multiplied by alpha / r.")
    dropout: float = Field(0.05, ge=0, lt=1, description="Dropout before the first LoRA matrix.")
    targets: Literal["all-linear"] | list[str] = Field(
        "all-linear", description="Module names, or all-linear for every linear layer but the head."
    )


class StudentSection(Section):
    """The model that learns."""

    model: str = Field(description="Hugging Face id or local folder.")
    revision: str | None = Field(None, description="Commit, tag or branch on the Hub.")
    quantization: Quantization = Field("nf4", description="nf4 (QLoRA), int8 or none.")
    dtype: Dtype = Field("bfloat16", description="Unquantised weights; float32 for full fine-tuning.")
    device: Device = Field("auto", description="auto takes CUDA where there is one.")
    lora: LoraSection | None = Field(default_factory=LoraSection, description="null trains every weight.")

    @model_validator(mode="after")
    def _trainable(self) -> StudentSection:
        if self.lora is None and self.quantization != "none":
            raise ValueError("student.lora is null (full fine-tuning), which needs student.quantization none")
        return self


class LossSection(Section):
    """ce_weight * CE + kd_weight * temperature^2 * divergence(teacher_T, student_T)."""

    temperature: float = Field(2.0, gt=0, le=100, description="T of the KL term.")
    ce_weight: float = Field(0.5, ge=0, description="Weight of the cross-entropy with the label.")
    kd_weight: float = Field(0.5, ge=0, description="Weight of the KL term, before T squared.")
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

    @model_validator(mode="after")
    def _something_to_learn(self) -> LossSection:
        if self.ce_weight == 0 and self.kd_weight == 0:
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
    accumulation: int = Field(1, ge=1, description="Forward passes per optimizer step.")
    clip: float | None = Field(0.5, gt=0, description="Largest gradient norm; null does not clip.")
    optimizer: str = Field("paged_adamw_8bit", description="A name of transformers' optim.")
    schedule: str = Field("linear", description="A name of transformers' lr_scheduler_type.")
    warmup: float = Field(
        0.0, ge=0, description="Warm-up: a fraction of the steps below 1, a number of steps from 1 on."
    )
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay.")
    precision: Literal["bf16", "fp16", "fp32"] = Field("bf16", description="Autocast of the training step.")
    gradient_checkpointing: bool = Field(True, description="Recompute activations in the backward pass.")
    logging_steps: int = Field(10, ge=1, description="Steps between two log lines.")
    save_steps: int = Field(200, ge=1, description="Steps between two checkpoints.")
    keep_checkpoints: int = Field(2, ge=1, description="Checkpoints kept; older ones are removed.")
    report_to: list[str] = Field(
        default_factory=list,
        description="Further loggers of transformers (tensorboard, wandb); log.csv is always written.",
    )

    @model_validator(mode="after")
    def _whole_warmup(self) -> TrainingSection:
        if self.warmup >= 1 and self.warmup != int(self.warmup):
            raise ValueError("training.warmup of 1 or more is a number of steps and should be whole")
        return self


class Recipe(Section):
    """One experiment."""

    output: str = Field(description="Run directory: adapter, logs, plots and the result table.")
    seed: int = Field(0, ge=0, le=2**32 - 1, description="Order of samples, dropout and LoRA's first values.")
    embedded: EmbeddedSection | None = Field(None, description="Make the built-in data and models first.")
    cache: CacheSection = Field(description="Where the cache lies and how it is cut.")
    data: DataSection | None = Field(None, description="Needed by teacher-cache alone.")
    teacher: TeacherSection | None = Field(None, description="Needed by teacher-cache alone.")
    selection: SelectionSection = Field(
        default_factory=lambda: SelectionSection(), description="What each position keeps."
    )
    student: StudentSection | None = Field(None, description="Needed by train-student alone.")
    loss: LossSection = Field(default_factory=lambda: LossSection(), description="What is minimised.")
    training: TrainingSection = Field(default_factory=lambda: TrainingSection(), description="How long and how fast.")

    @model_validator(mode="after")
    def _shards_fit(self) -> Recipe:
        chosen = self.selection
        entries = {"random_sampling": chosen.draws + 1, "threshold_sampling": 0}.get(chosen.method, chosen.k)
        if chosen.method == "threshold_sampling" and chosen.floors is not None:
            # What reaches a floor, and what is drawn below it: so many on average at most.
            entries = round(sum(1 / floor for floor in chosen.floors))
        largest = max(entries * _ENTRY_BYTES, _UNPACKED * chosen.bytes_per_position * (chosen.floors is None))
        if largest * self.cache.positions_per_shard > SHARD_LIMIT // 2:
            raise ValueError(
                f"cache.positions_per_shard {self.cache.positions_per_shard} makes shards of more than "
                f"{SHARD_LIMIT // 2:,} bytes with this selection; lower it"
            )
        return self


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe file and apply ``key.path=value`` overrides (values are YAML).

    Raises:
        RecipeError: the file is missing or not YAML, a key is unknown, or a value is not acceptable.
    """
    return parse_recipe(read_values(Path(path), overrides or []))


def parse_recipe(values: dict[str, Any]) -> Recipe:
    """Build a recipe from plain values.

    Raises:
        RecipeError: naming the key, what was expected and, for an unknown key, the nearest known one.
    """
    try:
        return Recipe.model_validate(values)
    except ValidationError as exc:
        raise RecipeError(explain(exc, Recipe)) from exc
