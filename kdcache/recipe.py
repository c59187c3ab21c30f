"""A recipe: one YAML file per experiment, parsed into strict models.

Unknown keys are refused with the nearest known one named, values out of range with the key named, and
keys that contradict each other with both named. ``key.path=value`` overrides come from the command line.
Relative paths are relative to the working directory, as on any command line; only ``base``, the recipe
that a file is laid over, is relative to the file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from kdcache.cache.layout import SHARD_LIMIT
from kdcache.errors import RecipeError
from kdcache.recipe_keys import explain
from kdcache.recipe_selection import Section, SelectionSection
from kdcache.recipe_sweep import SweepSection
from kdcache.recipe_training import LossSection, TrainingSection
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
    dora: bool = Field(False, description="DoRA: direction by LoRA, magnitude learnt apart.")
    rslora: bool = Field(False, description="rsLoRA: updates are multiplied by alpha / sqrt(r).")


class StudentSection(Section):
    """The model that learns."""

    model: str = Field(description="Hugging Face id or local folder.")
    revision: str | None = Field(None, description="Commit, tag or branch on the Hub.")
    quantization: Quantization = Field("nf4", description="nf4 (QLoRA), int8 or none.")
    dtype: Dtype = Field("bfloat16", description="Unquantised weights; float32 for full fine-tuning.")
    device: Device = Field("auto", description="auto takes CUDA where there is one.")
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = Field(
        "auto", description="Implementation of attention; auto takes transformers' choice."
    )
    lora: LoraSection | None = Field(default_factory=LoraSection, description="null trains every weight.")

    @model_validator(mode="after")
    def _trainable(self) -> StudentSection:
        if self.lora is None and self.quantization != "none":
            raise ValueError("student.lora is null (full fine-tuning), which needs student.quantization none")
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
    sweep: SweepSection | None = Field(None, description="Many students from one cache; of kdcache sweep alone.")

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
