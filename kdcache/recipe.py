"""A recipe: one YAML file per experiment, parsed into strict models.

Unknown keys are refused with the nearest known one named, values out of range with the key named, and
keys that contradict each other with both named. ``key.path=value`` overrides come from the command line.
Relative paths are relative to the working directory, as on any command line; only ``base``, the recipe
that a file is laid over, is relative to the file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from kdcache.cache.layout import SHARD_LIMIT
from kdcache.recipe_chain import ChainSection
from kdcache.recipe_data import DataSection
from kdcache.recipe_keys import validated
from kdcache.recipe_selection import Section, SelectionSection
from kdcache.recipe_student import Device, Dtype, Quantization, StudentSection, with_teacher_as_student
from kdcache.recipe_sweep import SweepSection
from kdcache.recipe_training import LossSection, TrainingSection
from kdcache.recipe_yaml import read_values

# Bytes of an entry before compression, and how many of them compression makes one of as a rule; the writer checks.
_ENTRY_BYTES, _UNPACKED = 5, 3


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


class MixedCacheSection(Section):
    """A further cache of a mixture."""

    directory: str = Field(description="Cache directory or URL.")
    weight: float = Field(1.0, gt=0, description="Share of its teacher, before division by the sum of the weights.")


class CacheSection(Section):
    """Where the cache lies and how it is cut."""

    directory: str = Field(description="Cache directory; the thing to share.")
    weight: float = Field(
        1.0, gt=0, description="Share of this cache in a mixture; the weights are divided by their sum."
    )
    mixture: tuple[MixedCacheSection, ...] = Field(
        (),
        max_length=64,
        description="Further caches over the same token ids, such as [{directory: runs/b/cache, weight: 0.5}]: the student learns "
        "from the weighted mean of the teachers' distributions. teacher-cache makes cache.directory alone.",
    )
    positions_per_shard: int = Field(
        65536,
        ge=1,
        le=1 << 24,
        description="A shard is closed when it holds this many; a killed run loses at most one shard.",
    )

    @property
    def places(self) -> tuple[tuple[str, float], ...]:
        """Every cache that a student learns from, with its weight; the first is the one that teacher-cache makes."""
        return ((self.directory, self.weight), *((part.directory, part.weight) for part in self.mixture))

    @model_validator(mode="after")
    def _weights_of_a_mixture(self) -> CacheSection:
        if self.weight != 1 and not self.mixture:
            raise ValueError("cache.weight goes with cache.mixture, which is not there")
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
    chain: ChainSection | None = Field(
        None, description="Students that teach the next one, stage by stage; of kdcache chain alone."
    )

    @model_validator(mode="before")
    @classmethod
    def _self_taught(cls, values: Any) -> Any:
        return with_teacher_as_student(values)

    @model_validator(mode="after")
    def _one_seed(self) -> Recipe:
        # What a made student is must be said by its own section: it is loaded by others who see no more than that.
        init = None if self.student is None else self.student.init
        if self.student is not None and init is not None and init.method == "scale" and init.seed is None:
            own = init.model_copy(update={"seed": self.seed})
            # Nobody has said it: rows of a sweep and stages of a chain that change the recipe's seed fill in their own.
            own.model_fields_set.discard("seed")
            self.__dict__["student"] = self.student.model_copy(update={"init": own})
        return self

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
    return validated(Recipe, values)
