"""A recipe's splits as token rows: read from a data set whole or as a stream, one example a row or packed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kdcache.data.examples import Example, ExampleSet, load_examples
from kdcache.data.packing import pack
from kdcache.data.tokens import TokenRows, prompt_ids, tokenise
from kdcache.errors import DataError
from kdcache.progress import Progress

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    from kdcache.recipe_data import DataSection

SPLITS = ("train", "validation")


@dataclass(frozen=True)
class SplitRows:
    """One split: its name, the shape of its examples, the data set's name without a machine's paths, and its rows."""

    name: str
    shape: str
    shown: str
    tokenised: TokenRows


@dataclass(frozen=True)
class Prompt:
    """What the teacher is asked: the example's place in its split, and uint32 ids ``[L]`` up to where an answer begins."""

    index: int
    ids: NDArray[np.uint32]


@dataclass(frozen=True)
class SplitPrompts:
    """The prompts of a split, and what became of the examples that are not among them."""

    name: str
    shape: str
    shown: str
    prompts: list[Prompt]
    examples: int
    empty: int
    too_long: int


def read_split(data: DataSection, name: str, tokenizer: PreTrainedTokenizerBase, progress: Progress) -> SplitRows:
    """Token rows of a split with the responses of its data set; says what became of the examples.

    Raises:
        DataError: bad data, no row at all, or documents to pack that are no plain text.
        TokenizerError: as `tokenise`.
    """
    examples = _examples(data, name, answers=True)
    if data.pack and examples.shape != "text":
        raise DataError(
            f"data.pack packs documents of plain text, and the examples of {data.source_of(name).path} are of shape {examples.shape}; "
            "leave it out, or say data.shape text and which column by data.columns"
        )
    budget = data.token_budget if name == "train" else None
    options: dict[str, Any] = {"max_length": data.max_length, "budget": budget}
    if budget is not None:
        progress.begin(f"read {name}", budget, "tokens")
        options["on_row"] = progress.advance
    try:
        if data.pack:
            tokenised = pack(examples, tokenizer, **options)
        else:
            tokenised = tokenise(examples, tokenizer, prompt=data.prompt, system=data.system, date=data.date, **options)
    finally:
        progress.end()
    _tell(data, name, tokenised, progress)
    return SplitRows(name, examples.shape, examples.name, tokenised)


def read_prompts(data: DataSection, name: str, tokenizer: PreTrainedTokenizerBase, progress: Progress) -> SplitPrompts:
    """What the teacher is to answer of a split; prompts that leave no room for an answer are counted.

    Raises:
        DataError: bad data, or no prompt at all.
        TokenizerError: as `prompt_ids`.
    """
    examples = _examples(data, name, answers=False)
    prompts: list[Prompt] = []
    total = empty = too_long = 0
    for example in examples:
        total += 1
        if example.empty:
            empty += 1
            continue
        prompt = _prompt(example, data, tokenizer)
        if len(prompt.ids) < data.max_length:
            prompts.append(prompt)
        else:
            too_long += 1
    source = data.source_of(name)
    if not prompts:
        raise DataError(
            f"{source.path} {source.split}: of {total:,} examples {empty:,} ask nothing and {too_long:,} leave no room for an answer "
            f"within data.max_length {data.max_length}; raise it, or look at data.columns"
        )
    return SplitPrompts(name, examples.shape, examples.name, prompts, total, empty, too_long)


def describe(tokenised: TokenRows, max_length: int) -> str:
    """One line of what became of the examples."""
    learnt = sum(r.positions for r in tokenised.rows)
    parts = [f"{len(tokenised.rows):,} of {tokenised.examples:,} examples, {learnt:,} response tokens"]
    if tokenised.dropped_empty:
        parts.append(f"{tokenised.dropped_empty:,} dropped as empty")
    if tokenised.dropped_no_target:
        parts.append(f"{tokenised.dropped_no_target:,} dropped with no response token left")
    if tokenised.truncated:
        parts.append(f"{tokenised.truncated:,} longer than {max_length} tokens")
    return ", ".join(parts)


def _examples(data: DataSection, name: str, *, answers: bool) -> ExampleSet:
    source = data.source_of(name)
    return load_examples(
        source.path,
        split=source.split,
        name=source.name,
        revision=source.revision,
        shape=data.shape,
        columns={str(ours): theirs for ours, theirs in data.columns.items()},
        answers=answers,
        stream=data.stream,
        skip=data.held_out if name == "train" else 0,
        take=source.take,
    )


def _prompt(example: Example, data: DataSection, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    return Prompt(example.index, prompt_ids(example, tokenizer, prompt=data.prompt, system=data.system, date=data.date))


def _tell(data: DataSection, name: str, tokenised: TokenRows, progress: Progress) -> None:
    """Say what was read, and refuse nothing at all."""
    source, budget = data.source_of(name), data.token_budget if name == "train" else None
    if data.pack:
        kept = tokenised.examples - tokenised.dropped_empty
        said = (
            f"{kept:,} documents in {len(tokenised.rows):,} rows of {data.max_length} tokens, {tokenised.tokens:,} tokens"
            + (f"; {tokenised.dropped_empty:,} empty documents dropped" if tokenised.dropped_empty else "")
        )
    else:
        said = describe(tokenised, data.max_length)
    tell = progress.warning if tokenised.dropped_no_target > tokenised.examples // 20 else progress.message
    tell(f"{name}: {said}")
    if not tokenised.examples and data.held_out:
        raise DataError(
            f"{source.path} {source.split} ends within the {data.held_out:,} examples that data.validation.take holds out, and "
            "nothing is left to learn from; lower it, or take another stream"
        )
    if not tokenised.rows:
        raise DataError(
            f"{source.path} {source.split}: no example has a response token within {data.max_length} tokens "
            f"({said}); raise data.max_length or look at the columns"
        )
    few = source.take is None or tokenised.examples < source.take
    # A row that would go beyond the budget is left out: less than a row short of it is as good as there.
    if few and budget is not None and tokenised.tokens <= budget - data.max_length:
        progress.warning(
            f"{name}: {source.path} ends after {tokenised.tokens:,} of {budget:,} tokens (data.token_budget)"
        )
    elif few and budget is None and source.take is not None:
        progress.warning(
            f"{name}: {source.path} ends after {tokenised.examples:,} of {source.take:,} examples (data.{name}.take)"
        )
