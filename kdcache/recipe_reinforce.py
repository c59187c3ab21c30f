"""The recipe of `kdcache reinforce`: a YAML file of its own, as strict as the other recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from kdcache.errors import RecipeError
from kdcache.recipe_keys import validated
from kdcache.recipe_selection import Section
from kdcache.recipe_student import LoraSection
from kdcache.recipe_yaml import read_values

SYSTEM = (
    "Think first, then answer. Put the thoughts between <think> and </think> and after them the answer alone between "
    "<answer> and </answer>."
)


class ArithmeticSection(Section):
    """Built-in problems from a seed: chains of small sums, with their worked solutions."""

    operations: tuple[Literal["plus", "minus", "times"], ...] = Field(
        ("plus", "minus"), min_length=1, description="What is done, from left to right; no result is below 0."
    )
    steps: int = Field(2, ge=1, le=8, description="Operations in a problem.")
    largest: int = Field(20, ge=2, le=10_000, description="Largest number in a question; times takes at most 9.")
    train: int = Field(2000, ge=1, le=1_000_000, description="Problems to learn from.")
    test: int = Field(200, ge=1, le=100_000, description="Held-out problems; none of them is learnt from.")
    seed: int = Field(0, ge=0, description="The problems depend on it alone, and not on the seed of the run.")


class QuestionsSection(Section):
    """Questions of a data set."""

    path: str = Field(description="Hugging Face data set id, or a local file or directory, as in the other recipes.")
    name: str | None = Field(None, description="Configuration of the data set, where it has several.")
    split: str = Field("train", description="Split with an optional slice, such as train[:5%] or test[:200].")
    revision: str | None = Field(None, description="Commit, tag or branch of a data set on the Hub.")


class ReinforceDataSection(Section):
    """Which questions, and what is right."""

    arithmetic: ArithmeticSection | None = Field(None, description="Built-in problems, instead of train and test.")
    train: QuestionsSection | None = Field(None, description="Questions to learn from.")
    test: QuestionsSection | None = Field(None, description="Held-out questions, answered before and after.")
    question: str = Field("question", description="Column of the question.")
    answer: str = Field(
        "answer",
        description="Column of what is right: a number, or a text that ends in #### and a number (GSM8K); with rewards.check "
        "python, unit tests as text or a list of lines.",
    )
    solution: str | None = Field(
        None,
        description="Column of a worked solution, which warmup needs; what follows a #### is left out. Built-in problems have "
        "their own.",
    )

    @model_validator(mode="after")
    def _one_source(self) -> ReinforceDataSection:
        if (self.arithmetic is None) == (self.train is None):
            raise ValueError("data should have either arithmetic (built-in problems) or train (a data set)")
        if self.arithmetic is not None and (self.test is not None or self.solution is not None):
            raise ValueError(
                "data.arithmetic has its own held-out problems and solutions: leave data.test and data.solution out"
            )
        return self


class PromptSection(Section):
    """How a question is put."""

    shape: Literal["chat", "plain"] = Field(
        "chat", description="chat: the tokenizer's chat template; plain: system text, question and a line break."
    )
    system: str | None = Field(SYSTEM, max_length=4096, description="System text; null for none.")


class PythonSection(Section):
    """Limits of the sandbox in which generated Python meets its unit tests."""

    seconds: float = Field(5.0, gt=0, le=600, description="Wall clock of one judgement.")
    memory_mib: int = Field(256, ge=64, le=65536, description="Address space of each of its two processes.")


class RewardsSection(Section):
    """reward = format * well_formed + correct * right + length * (a penalty of 0 to -1)."""

    format: float = Field(
        0.2, ge=0, description="Weight of exactly one think and one answer element, in order, and nothing else."
    )
    correct: float = Field(1.0, ge=0, description="Weight of a right answer between the answer tags.")
    check: Literal["numeric", "python"] = Field(
        "numeric",
        description="numeric: the one number in the answer equals the reference; commas, $ and trailing zeros do not count. "
        "python: the code in the answer passes its unit tests in a sandbox.",
    )
    length: float = Field(0.0, ge=0, description="Weight of the penalty on long completions.")
    length_target: int | None = Field(
        None,
        ge=1,
        description="Tokens from which the penalty grows, reaching 1 at training.max_completion_length; needed where "
        "rewards.length is not 0.",
    )
    python: PythonSection = Field(default_factory=lambda: PythonSection(), description="Limits of the sandbox.")

    @model_validator(mode="after")
    def _something_to_earn(self) -> RewardsSection:
        if not (self.format or self.correct):
            raise ValueError("rewards.format and rewards.correct are both 0: nothing to earn")
        if (self.length > 0) != (self.length_target is not None):
            raise ValueError("rewards.length above 0 and rewards.length_target go together")
        return self


class ColdStartSection(Section):
    """Supervised steps on worked solutions before reinforcement: without a chance of reward there is nothing to reinforce."""

    examples: int = Field(512, ge=1, description="Worked solutions: the first of the train split.")
    steps: int = Field(64, ge=1, description="Optimizer steps.")
    batch_size: int = Field(16, ge=1, description="Solutions per step.")
    learning_rate: float = Field(2e-4, gt=0, description="Peak learning rate.")


class ReinforceTrainingSection(Section):
    """How long and how fast; the names are those of TRL's GRPOConfig where it has the same."""

    steps: int = Field(500, ge=1, description="Optimizer steps; each learns from completions that were sampled for it.")
    questions: int | None = Field(
        None,
        ge=1,
        description="Questions that are reinforced: so many at the end of the train split, such as those behind a cold start's; null "
        "takes all.",
    )
    prompts: int = Field(8, ge=1, description="Questions in a step.")
    num_generations: int = Field(
        8, ge=2, description="Completions of each question, which are compared with each other."
    )
    batch_size: int = Field(8, ge=1, description="Completions per forward and backward pass.")
    max_completion_length: int = Field(512, ge=2, description="Tokens of a completion at most.")
    temperature: float = Field(1.0, gt=0, description="Of sampling.")
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus of sampling; 1 keeps all tokens.")
    beta: float = Field(0.04, ge=0, description="Weight of the KL to the reference; 0 needs none, and logs none.")
    loss_type: Literal["grpo", "dr_grpo", "dapo", "bnpo"] = Field("dapo", description="How TRL averages over tokens.")
    scale_rewards: Literal["group", "batch", "none"] = Field(
        "group", description="Whose standard deviation advantages are divided by."
    )
    epsilon: float = Field(0.2, gt=0, lt=1, description="Clipping of the probability ratio.")
    epsilon_high: float | None = Field(None, gt=0, description="Upper clipping where it differs; DAPO takes 0.28.")
    mask_truncated_completions: bool = Field(False, description="Learn nothing from completions that were cut off.")
    learning_rate: float = Field(1e-5, gt=0, description="Peak learning rate.")
    schedule: str = Field("constant", description="A name of transformers' lr_scheduler_type.")
    warmup: int = Field(0, ge=0, description="Steps over which the learning rate rises.")
    optimizer: str = Field("adamw_torch", description="A name of transformers' optim.")
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay.")
    clip: float | None = Field(1.0, gt=0, description="Largest gradient norm; null does not clip.")
    precision: Literal["bf16", "fp16", "fp32"] = Field("bf16", description="Autocast of the training step.")
    gradient_checkpointing: bool = Field(True, description="Recompute activations in the backward pass.")
    logging_steps: int = Field(1, ge=1, description="Steps between two log lines.")
    save_steps: int = Field(50, ge=1, description="Steps between two checkpoints.")
    keep_checkpoints: int = Field(2, ge=1, description="Checkpoints kept; older ones are removed.")
    report_to: list[str] = Field(
        default_factory=list, description="Further loggers of transformers; log.csv is always written."
    )

    @model_validator(mode="after")
    def _whole_groups(self) -> ReinforceTrainingSection:
        if (self.prompts * self.num_generations) % self.batch_size:
            raise ValueError(
                f"training.prompts x training.num_generations ({self.prompts} x {self.num_generations} completions a step) should "
                f"be a multiple of training.batch_size ({self.batch_size})"
            )
        return self

    @property
    def completions(self) -> int:
        """Completions in a step."""
        return self.prompts * self.num_generations


class EvaluationSection(Section):
    """Greedy answers to held-out questions, before and after."""

    examples: int = Field(200, ge=1, description="Held-out questions: the first of the test split.")
    batch_size: int = Field(32, ge=1, description="Answers that are generated at a time.")


class ReinforceRecipe(Section):
    """One reinforcement of a distilled student."""

    output: str = Field(description="Run directory: adapter, logs, plot and the result.")
    seed: int = Field(
        0, ge=0, le=2**32 - 1, description="Order of questions, sampling, and a new adapter's first values."
    )
    data: ReinforceDataSection = Field(description="Which questions, and what is right.")
    prompt: PromptSection = Field(default_factory=lambda: PromptSection(), description="How a question is put.")
    rewards: RewardsSection = Field(default_factory=lambda: RewardsSection(), description="What is worth how much.")
    cold_start: ColdStartSection | None = Field(
        None, description="Supervised steps on worked solutions first; what they end in is the reference of the KL."
    )
    lora: LoraSection = Field(
        default_factory=lambda: LoraSection(dropout=0.0),
        description="The new adapter of a student that was trained in full; one with an adapter goes on with its own.",
    )
    training: ReinforceTrainingSection = Field(
        default_factory=lambda: ReinforceTrainingSection(), description="How long and how fast."
    )
    evaluation: EvaluationSection = Field(
        default_factory=lambda: EvaluationSection(), description="What is answered before and after."
    )

    @model_validator(mode="after")
    def _together(self) -> ReinforceRecipe:
        target = self.rewards.length_target
        if target is not None and target >= self.training.max_completion_length:
            raise ValueError(
                f"rewards.length_target ({target}) should be below training.max_completion_length "
                f"({self.training.max_completion_length})"
            )
        if self.data.arithmetic is not None and self.rewards.check == "python":
            raise ValueError("rewards.check python needs a data set with unit tests; data.arithmetic has numbers")
        if self.cold_start is not None and self.data.arithmetic is None and self.data.solution is None:
            raise ValueError("cold_start needs data.solution, the column of worked solutions")
        return self


def load_reinforce_recipe(path: str | Path, overrides: list[str] | None = None) -> ReinforceRecipe:
    """Read a recipe of reinforcement and apply ``key.path=value`` overrides (values are YAML).

    Raises:
        RecipeError: the file is missing or not YAML, a key is unknown, or a value is not acceptable.
    """
    return parse_reinforce_recipe(read_values(Path(path), overrides or []))


def parse_reinforce_recipe(values: dict[str, Any]) -> ReinforceRecipe:
    """Build the recipe from plain values.

    Raises:
        RecipeError: naming the key, what was expected and, for an unknown key, the nearest known one.
    """
    if "student" in values or "teacher" in values or "cache" in values:
        raise RecipeError(
            "this is a recipe for a cache and its students; kdcache reinforce takes one of recipes/reinforce, such as "
            "recipes/reinforce/embedded.yaml"
        )
    return validated(ReinforceRecipe, values)
