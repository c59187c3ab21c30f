"""The recipe's section on text, and how it becomes tokens."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from kdcache.recipe_selection import Section


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
