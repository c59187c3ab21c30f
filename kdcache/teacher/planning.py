"""Recipe values and token rows -> the plan: everything a cache will hold, before the first forward pass."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kdcache.cache import layout
from kdcache.cache.codec import sequence_digest
from kdcache.cache.manifest import (
    DataPlan,
    Plan,
    ShardPlan,
    SplitPlan,
    TeacherIdentity,
    TokenizerIdentity,
)
from kdcache.cache.remote import is_url
from kdcache.cache.selection import SelectionPlan
from kdcache.data.examples import load_examples
from kdcache.data.tokens import TokenRow, TokenRows, template_sha256, tokenise
from kdcache.errors import DataError, RecipeError
from kdcache.models import effective_dtype, identify
from kdcache.progress import Progress
from kdcache.token_maps import TokenMap, load_tokenizer, token_map

if TYPE_CHECKING:
    from kdcache.recipe import Recipe, TeacherSection
    from kdcache.recipe_data import DataSection, SourceSection
    from kdcache.recipe_selection import SelectionSection

_OPEN = 1.0 - 2.0**-20


@dataclass(frozen=True)
class PlannedCache:
    """A plan with what is needed to carry it out: token rows by split, and the tokenizer's map."""

    plan: Plan
    rows: tuple[list[TokenRow], ...]
    tokens: TokenMap

    @property
    def floors_open(self) -> bool:
        """Whether the floors are still to be found from a byte budget."""
        return _OPEN in self.plan.selection.floors

    def with_floors(self, floors: tuple[float, ...]) -> PlannedCache:
        """The same plan with these probability floors."""
        selection = self.plan.selection.model_copy(update={"floors": floors})
        return replace(self, plan=self.plan.model_copy(update={"selection": selection}))

    def shard_rows(self, index: int) -> list[TokenRow]:
        """Token rows of one shard."""
        shard = self.plan.shards[index]
        return self.rows[shard.split][shard.start : shard.start + shard.sequences]


def teacher_sections(recipe: Recipe) -> tuple[DataSection, TeacherSection]:
    """The sections phase one needs.

    Raises:
        RecipeError: one is absent.
    """
    if recipe.data is None or recipe.teacher is None:
        absent = "data" if recipe.data is None else "teacher"
        raise RecipeError(f"teacher-cache needs the recipe section {absent}")
    return recipe.data, recipe.teacher


def plan_cache(recipe: Recipe, progress: Progress) -> PlannedCache:
    """Read and tokenise the data, identify the teacher, and fix what goes to which shard.

    Raises:
        KdcacheError: bad data, tokenizer, model or recipe values.
    """
    data, teacher = teacher_sections(recipe)
    if is_url(recipe.cache.directory):
        raise RecipeError(
            f"cache.directory is {recipe.cache.directory}, and a teacher writes into a directory of this machine; give one, "
            "and kdcache push it afterwards"
        )
    tokenizer = load_tokenizer(teacher.model, teacher.revision)
    identity = identify(teacher.model, teacher.revision)
    tokens = token_map(tokenizer, head_width=identity.head_width)
    if recipe.selection.k > len(tokens) and recipe.selection.method == "top_k":
        raise RecipeError(
            f"selection.k is {recipe.selection.k}, but the vocabulary of {teacher.model} has only {len(tokens)} tokens"
        )
    splits, rows, shards, shapes = [], [], [], set()
    for number, (name, source) in enumerate((("train", data.train), ("validation", data.validation))):
        examples = load_examples(
            source.path,
            split=source.split,
            name=source.name,
            revision=source.revision,
            shape=data.shape,
            columns={str(ours): theirs for ours, theirs in data.columns.items()},
        )
        shapes.add(examples.shape)
        tokenised = tokenise(
            examples,
            tokenizer,
            prompt=data.prompt,
            system=data.system,
            date=data.date,
            max_length=data.max_length,
        )
        tell = progress.warning if tokenised.dropped_no_target > tokenised.examples // 20 else progress.message
        tell(f"{name}: {describe(tokenised, data.max_length)}")
        if not tokenised.rows:
            raise DataError(
                f"{source.path} {source.split}: no example has a response token within {data.max_length} tokens "
                f"({describe(tokenised, data.max_length)}); raise data.max_length or look at the columns"
            )
        _refuse_unknown_ids(tokenised, len(tokens), teacher.model)
        splits.append(_split_plan(name, source, examples.name, tokenised))
        rows.append(tokenised.rows)
        shards += _cut(number, tokenised.rows, recipe.cache.positions_per_shard)
    if len(shards) > layout.SHARDS_LIMIT:
        raise RecipeError(
            f"cache.positions_per_shard {recipe.cache.positions_per_shard} makes {len(shards):,} shards, and a cache has at "
            f"most {layout.SHARDS_LIMIT:,}; raise it"
        )
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    plan = Plan(
        format=layout.FORMAT,
        version=layout.VERSION,
        teacher=TeacherIdentity(
            name=identity.name,
            revision=identity.revision,
            fingerprint=identity.fingerprint,
            architecture=identity.architecture,
            quantization=teacher.quantization,
            dtype=effective_dtype(teacher.quantization, teacher.dtype),
            batch_tokens=teacher.batch_tokens,
        ),
        tokenizer=TokenizerIdentity(
            name=identity.name,
            fingerprint=tokens.fingerprint,
            vocab_size=len(tokens),
            eos_id=int(tokenizer.eos_token_id),
            pad_id=int(pad),
        ),
        data=DataPlan(
            shape="+".join(sorted(shapes)),
            columns={str(ours): theirs for ours, theirs in data.columns.items()},
            prompt=data.prompt,
            system=data.system,
            date=data.date,
            template_sha256=template_sha256(tokenizer, data.prompt),
            max_length=data.max_length,
            splits=tuple(splits),
        ),
        selection=_selection_plan(recipe.selection),
        shards=tuple(shards),
        derived=None,
    )
    return PlannedCache(plan, tuple(rows), tokens)


def _selection_plan(section: SelectionSection) -> SelectionPlan:
    floors: tuple[float, ...] = ()
    if section.method.startswith("threshold"):
        # Until they are found, floors that no probability lies above.
        floors = section.floors or (_OPEN,) * len(section.temperatures)
    return SelectionPlan(**{**section.recorded(), "floors": floors})


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


def _refuse_unknown_ids(tokenised: TokenRows, vocab_size: int, model: str) -> None:
    for row in tokenised.rows:
        if int(row.ids.max()) >= vocab_size:
            raise DataError(
                f"example {row.index} holds token id {int(row.ids.max())}, for which the head of {model} has no column "
                f"(it has {vocab_size}); remove the example or its special token"
            )


def _split_plan(name: str, source: SourceSection, shown: str, tokenised: TokenRows) -> SplitPlan:
    digest = hashlib.sha256(b"".join(sequence_digest(r.ids, r.targets) for r in tokenised.rows))
    return SplitPlan(
        name=name,
        source=shown,
        revision=source.revision,
        selected=source.split,
        examples=tokenised.examples,
        dropped_empty=tokenised.dropped_empty,
        dropped_no_target=tokenised.dropped_no_target,
        truncated=tokenised.truncated,
        sequences=len(tokenised.rows),
        tokens=sum(len(r.ids) for r in tokenised.rows),
        positions=sum(r.positions for r in tokenised.rows),
        fingerprint=digest.hexdigest(),
    )


def _cut(split: int, rows: Sequence[TokenRow], positions_per_shard: int) -> list[ShardPlan]:
    """Consecutive sequences; a shard is closed once it holds ``positions_per_shard``, or as many tokens as any may."""
    shards, start, tokens, positions = [], 0, 0, 0
    for index, row in enumerate(rows):
        tokens, positions = tokens + len(row.ids), positions + row.positions
        if positions >= positions_per_shard or tokens >= layout.TOKENS_PER_SHARD or index == len(rows) - 1:
            shards.append(
                ShardPlan(split=split, start=start, sequences=index + 1 - start, tokens=tokens, positions=positions)
            )
            start, tokens, positions = index + 1, 0, 0
    return shards
