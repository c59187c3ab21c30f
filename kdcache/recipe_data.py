"""The recipe's section on text: which, who wrote the responses, how much of it, and how it becomes tokens."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from kdcache.recipe_selection import Section

# What a plan says of splits whose responses are the teacher's own, and where they were scored in a second pass.
_ANSWERED, _SECOND_PASS = " answered by the teacher: ", ", second pass"
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9}


def _count(value: Any) -> Any:
    """A number as people write large ones: 500k, 10M, 2.5B."""
    found = (
        re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmbg]?)", value.strip(), re.IGNORECASE) if isinstance(value, str) else None
    )
    return value if found is None else round(float(found[1]) * _UNITS[found[2].lower()])


def made_by_steps(selected: str) -> bool:
    """Whether a plan's ``selected`` says that a split was cached as the teacher wrote it, token by token."""
    return _ANSWERED in selected and _SECOND_PASS not in selected


class SourceSection(Section):
    """One split of a data set."""

    path: str = Field(
        description="Hugging Face data set id, or a local .json/.jsonl(.gz)/.parquet file, or a directory of such files "
        "or of a saved data set."
    )
    name: str | None = Field(None, description="Configuration of the data set, where it has several.")
    split: str = Field("train", description="Split with an optional slice, such as train[:5%] or train[100:200].")
    revision: str | None = Field(None, description="Commit, tag or branch of a data set on the Hub.")
    take: int | None = Field(
        None,
        ge=1,
        description="data.stream: so many examples. Where train and validation read the same stream, validation has the "
        "first ones and train those behind them.",
    )


class GenerateSection(Section):
    """How the teacher answers prompts."""

    max_new_tokens: int = Field(
        256, ge=1, le=1 << 20, description="Longest answer in tokens; prompt and answer fit into data.max_length."
    )
    temperature: float = Field(0.0, ge=0, le=100, description="Of sampling; 0 takes the most probable token.")
    top_p: float = Field(
        1.0, gt=0, le=1, description="Sample from the most probable tokens that reach this mass together."
    )
    top_k: int = Field(0, ge=0, description="Sample from so many of the most probable tokens; 0 from all.")
    seed: int = Field(
        0, ge=0, le=2**32 - 1, description="Of sampling: an answer's chance depends on it and the prompt alone."
    )
    batch_size: int = Field(
        16,
        ge=1,
        le=4096,
        description="Prompts that are answered at the same time; in half precision another number may round, and answer, otherwise.",
    )
    splits: Literal["both", "train"] = Field(
        "both", description="Whose prompts are answered; train: validation keeps the responses of its data set."
    )
    unfinished: Literal["keep", "drop"] = Field(
        "keep", description="Answers that run into the limit before their end; they are counted either way."
    )
    states: Literal["reuse", "fresh"] = Field(
        "reuse",
        description="reuse: the cache is made from the hidden states of the generation, which wait on the disk meanwhile; "
        "fresh: from a second pass over the finished answers.",
    )

    @model_validator(mode="after")
    def _sampled(self) -> GenerateSection:
        if self.temperature == 0 and (self.top_p < 1 or self.top_k):
            raise ValueError(
                "data.generate.top_p and data.generate.top_k choose among tokens to draw from, and "
                "data.generate.temperature 0 draws none; raise it, or leave them out"
            )
        return self

    def described(self) -> str:
        """The settings in words, for a cache's plan."""
        how = "greedy"
        if self.temperature:
            how = f"temperature {self.temperature:g}"
            how += f", top-p {self.top_p:g}" if self.top_p < 1 else ""
            how += f", top-k {self.top_k}" if self.top_k else ""
            how += f", seed {self.seed}"
        how += f", at most {self.max_new_tokens:,} tokens"
        how += ", unfinished dropped" if self.unfinished == "drop" else ""
        return how + (_SECOND_PASS if self.states == "fresh" else "")


class DataSection(Section):
    """Which text, and how it becomes tokens."""

    source: Literal["dataset", "generate"] = Field(
        "dataset",
        description="Who wrote the responses. dataset: the data set; generate: the teacher answers its prompts, and no column of "
        "responses is needed.",
    )
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
    stream: bool = Field(
        False,
        description="Read the data set from its beginning as far as it is needed, and no further; for sets of any size.",
    )
    token_budget: Annotated[int, BeforeValidator(_count)] | None = Field(
        None, ge=2, le=1 << 40, description="Tokens of the train split, such as 10M; reading stops there."
    )
    pack: bool = Field(
        False,
        description="Text: documents one behind the other in rows of max_length tokens, what is left of one going on in the next "
        "row; within a row attention sees earlier documents.",
    )
    generate: GenerateSection = Field(
        default_factory=lambda: GenerateSection(), description="data.source generate: how the teacher answers."
    )

    def answered(self, split: str) -> bool:
        """Whether the teacher answers the prompts of ``train`` or ``validation``."""
        return self.source == "generate" and (split == "train" or self.generate.splits == "both")

    def source_of(self, split: str) -> SourceSection:
        """The section of ``train`` or ``validation``."""
        return self.train if split == "train" else self.validation

    @property
    def held_out(self) -> int:
        """Examples of the train split's stream that are the validation split's."""
        same = all(getattr(self.train, k) == getattr(self.validation, k) for k in ("path", "name", "split", "revision"))
        return (self.validation.take or 0) if self.stream and same else 0

    def selected(self, split: str) -> str:
        """What a cache's plan records of a split as selected: the recipe's slice, and all that is done beyond it."""
        source, text = self.source_of(split), self.source_of(split).split
        if self.answered(split):
            return f"{text}{_ANSWERED}{self.generate.described()}"
        if split == "train" and self.held_out:
            text += f", behind the first {self.held_out:,} examples"
        if source.take is not None:
            text += f", {source.take:,} examples"
        if split == "train" and self.token_budget is not None:
            text += f", at most {self.token_budget:,} tokens"
        return text + (", packed" if self.pack else "")

    @model_validator(mode="after")
    def _consistent(self) -> DataSection:
        if self.source == "generate":
            for key, there in (
                ("stream", self.stream),
                ("token_budget", self.token_budget is not None),
                ("pack", self.pack),
            ):
                if there:
                    raise ValueError(
                        f"data.{key} is for data.source dataset; prompts to be answered are chosen by a slice, such as "
                        "data.train.split train[:1000]"
                    )
            if self.shape == "text":
                raise ValueError("data.shape text has no prompts that data.source generate could have answered")
        elif self.generate != GenerateSection():
            raise ValueError("data.generate goes with data.source generate; leave one out or add the other")
        if self.pack and self.shape not in ("auto", "text"):
            raise ValueError(f"data.pack packs documents of plain text, data.shape is {self.shape}; leave one out")
        if self.token_budget is not None and self.token_budget < self.max_length:
            raise ValueError(
                f"data.token_budget {self.token_budget:,} is less than one row of data.max_length {self.max_length:,} tokens; "
                "raise it, or lower data.max_length"
            )
        for name, part in (("train", self.train), ("validation", self.validation)):
            if part.take is not None and not self.stream:
                raise ValueError(
                    f"data.{name}.take goes with data.stream; otherwise a slice does it: data.{name}.split "
                    f"{part.split.partition('[')[0]}[:{part.take}]"
                )
            if self.stream and "[" in part.split:
                raise ValueError(
                    f"data.{name}.split is {part.split}, and a stream has no length to cut a slice of; name the split alone, "
                    "and say how much by data.token_budget, data.train.take and data.validation.take"
                )
        if self.stream and self.token_budget is None and self.train.take is None:
            raise ValueError(
                "data.stream has no end of its own: give data.token_budget, such as 10M, or data.train.take"
            )
        if self.stream and self.validation.take is None:
            raise ValueError("data.stream has no end of its own: give data.validation.take, such as 100 examples")
        return self
