"""A teacher's answers as token rows: from finished batches, or from the cache that was made of them.

A row is the prompt and the answer behind it, as the teacher wrote it, its end included; the answer's tokens are the
targets. What is left out is counted where a plan counts it: prompts that ask nothing and empty answers as empty, prompts
that leave no room and, if asked for, unfinished answers as having no target, unfinished answers that are kept as
truncated.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kdcache.cache.codec import sequence_digest
from kdcache.cache.manifest import SplitPlan
from kdcache.cache.reader import open_cache, read_plan
from kdcache.cache.writer import refuse_occupied, refuse_other_plan
from kdcache.data.tokens import TokenRow, TokenRows
from kdcache.errors import CorruptCacheError, DataError, IncompleteCacheError, PlanMismatchError
from kdcache.progress import Progress
from kdcache.teacher.decode import Answers
from kdcache.teacher.planning import Ground, plan_around, teacher_sections
from kdcache.teacher.splits import SPLITS, SplitPrompts, SplitRows
from kdcache.teacher.spool import SpooledStates

if TYPE_CHECKING:
    from kdcache.recipe import Recipe
    from kdcache.recipe_data import DataSection

Batch = tuple[Path, Sequence[tuple[int, int]], Answers]


def rows_of_answers(
    data: DataSection, ground: Ground, asked: Sequence[SplitPrompts], batches: Sequence[Batch], progress: Progress
) -> tuple[list[SplitRows], SpooledStates]:
    """Token rows of every split that was asked, in the order of its prompts, and where their states lie.

    Args:
        data: the recipe's section.
        ground: teacher and tokenizer.
        asked: the splits.
        batches: for each its file, its prompts (number of the split, number of the prompt) and the answers.
        progress: told what became of the prompts of each split.

    Raises:
        DataError: a split has no answer left.
    """
    found: list[dict[int, TokenRow]] = [{} for _ in asked]
    blank, unfinished = [0] * len(asked), [0] * len(asked)
    places: dict[bytes, tuple[Path, int, int]] = {}
    for path, members, answers in batches:
        stop = 0
        for (split, number), length, ended in zip(
            members, answers.lengths.tolist(), answers.ended.tolist(), strict=True
        ):
            start, stop = stop, stop + length
            own = answers.ids[start:stop].numpy().astype(np.uint32)
            if not str(ground.tokenizer.decode(own.tolist(), skip_special_tokens=True)).strip():
                blank[split] += 1
                continue
            unfinished[split] += not ended
            if not ended and data.generate.unfinished == "drop":
                continue
            prompt = asked[split].prompts[number]
            targets = np.arange(len(prompt.ids) + length) >= len(prompt.ids)
            row = TokenRow(prompt.index, np.concatenate([prompt.ids, own]), targets)
            found[split][number] = row
            places.setdefault(sequence_digest(row.ids, row.targets), (path, start, stop))
    splits = []
    for asking, rows, empty, cut in zip(asked, found, blank, unfinished, strict=True):
        tokenised = _counted(data, asking, [rows[i] for i in sorted(rows)], empty, cut)
        _tell(data, ground, asking, tokenised, empty, cut, progress)
        splits.append(SplitRows(asking.name, asking.shape, asking.shown, tokenised))
    return splits, SpooledStates(places)


def answers_of_cache(
    recipe: Recipe, ground: Ground, splits: Sequence[SplitPrompts | SplitRows]
) -> list[SplitRows] | None:
    """The token rows of the recipe's cache, where it is complete; None where it is not, or not there.

    Raises:
        PlanMismatchError: the directory has a cache of another recipe, or of other prompts.
        CacheError: it holds something else.
    """
    directory = Path(recipe.cache.directory)
    if not refuse_occupied(directory):
        return None
    data, _ = teacher_sections(recipe)
    existing = read_plan(directory)
    stated = {s.name: s for s in existing.data.splits}
    by_name = {split.name: split for split in splits}
    expected = [_expected(data, by_name[name], stated.get(name, existing.data.splits[0])) for name in SPLITS]
    refuse_other_plan(directory, plan_around(recipe, ground, existing, [split.shape for split in splits], expected))
    try:
        cache = open_cache(directory, keep=1)
        found = []
        for name in SPLITS:
            split, plan = by_name[name], stated[name]
            if isinstance(split, SplitRows):
                found.append(split)
                continue
            rows = [TokenRow(i, s.token_ids, s.targets) for i, s in enumerate(cache.split(name))]
            _refuse_other_prompts(directory, split, rows)
            counts = plan.examples, plan.dropped_empty, plan.dropped_no_target, plan.truncated
            found.append(SplitRows(name, split.shape, split.shown, TokenRows(rows, *counts)))
    except (IncompleteCacheError, CorruptCacheError):
        # Its answers are still in the spool, or will be made again and held against the plan.
        return None
    return found


def never_ends(data: DataSection, stop: Sequence[int]) -> str:
    """What may be wrong where answers run into their limit."""
    return (
        f"they ran into data.generate.max_new_tokens {data.generate.max_new_tokens:,} or data.max_length {data.max_length:,}. "
        f"Raise them, or take a teacher that ends its answers (with a token of {', '.join(map(str, stop))}); "
        "data.generate.unfinished drop leaves such answers out"
    )


def _counted(data: DataSection, split: SplitPrompts, rows: list[TokenRow], blank: int, unfinished: int) -> TokenRows:
    dropped = unfinished if data.generate.unfinished == "drop" else 0
    return TokenRows(rows, split.examples, split.empty + blank, split.too_long + dropped, unfinished - dropped)


def _tell(
    data: DataSection,
    ground: Ground,
    split: SplitPrompts,
    rows: TokenRows,
    blank: int,
    unfinished: int,
    progress: Progress,
) -> None:
    kept = data.generate.unfinished == "keep"
    parts = [
        f"{len(rows.rows):,} of {split.examples:,} prompts answered, {sum(r.positions for r in rows.rows):,} tokens"
    ]
    for count, what in (
        (split.empty, "ask nothing"),
        (split.too_long, f"leave no room within {data.max_length} tokens"),
        (blank, "got an empty answer and are dropped"),
        (unfinished, f"got an answer without an end, and are {'kept' if kept else 'dropped'}"),
    ):
        if count:
            parts.append(f"{count:,} {what}")
    said = ", ".join(parts)
    stop = [int(ground.tokenizer.eos_token_id)]
    if not rows.rows:
        why = never_ends(data, stop) if unfinished else "look at the prompts, and at data.prompt"
        raise DataError(f"{split.name}: no answer is left: {said}. {why[0].upper()}{why[1:]}")
    progress.message(f"{split.name}: {said}")
    if 2 * unfinished > len(split.prompts):
        progress.warning(
            f"{split.name}: {unfinished:,} of {len(split.prompts):,} answers have no end: {never_ends(data, stop)}"
        )


def _expected(data: DataSection, split: SplitPrompts | SplitRows, existing: SplitPlan) -> SplitPlan:
    """The split's plan as far as it is known without the answers; the rest as it is in ``existing``."""
    examples = split.examples if isinstance(split, SplitPrompts) else split.tokenised.examples
    return existing.model_copy(
        update={
            "name": split.name,
            "source": split.shown,
            "revision": data.source_of(split.name).revision,
            "selected": data.selected(split.name),
            "examples": examples,
        }
    )


def _refuse_other_prompts(directory: Path, split: SplitPrompts, rows: Sequence[TokenRow]) -> None:
    """Every answer in the cache is to one of the prompts, in their order."""
    waiting = iter(split.prompts)
    for row in rows:
        asked = row.ids[: int(np.argmax(row.targets))]
        if not any(np.array_equal(prompt.ids, asked) for prompt in waiting):
            raise PlanMismatchError(
                f"{directory} holds answers to other prompts than those of {split.shown} (split {split.name}, answer "
                f"{row.index}): the data set has changed. Give the recipe key cache another directory, or put the data back"
            )
