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
from kdcache.data.tokens import TokenRow, TokenRows, template_sha256
from kdcache.errors import DataError, RecipeError
from kdcache.model_identity import ModelIdentity, identify
from kdcache.models import effective_dtype
from kdcache.progress import Progress
from kdcache.teacher.splits import SPLITS, SplitRows, read_split
from kdcache.token_maps import TokenMap, load_tokenizer, token_map

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from kdcache.recipe import Recipe, TeacherSection
    from kdcache.recipe_data import DataSection
    from kdcache.recipe_selection import SelectionSection
    from kdcache.teacher.forward import States

_OPEN = 1.0 - 2.0**-20


@dataclass(frozen=True)
class PlannedCache:
    """A plan with what is needed to carry it out: token rows by split, the tokenizer's map, and hidden states of rows where
    they are there already."""

    plan: Plan
    rows: tuple[list[TokenRow], ...]
    tokens: TokenMap
    states: States | None = None

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


@dataclass(frozen=True)
class Ground:
    """What is known of a plan before any text is read: who the teacher is, and its tokens."""

    tokenizer: PreTrainedTokenizerBase
    identity: ModelIdentity
    tokens: TokenMap


def ground_of(recipe: Recipe) -> Ground:
    """Identify the teacher and its tokenizer.

    Raises:
        KdcacheError: bad tokenizer, model or recipe values.
    """
    _, teacher = teacher_sections(recipe)
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
    return Ground(tokenizer, identity, tokens)


def plan_cache(recipe: Recipe, progress: Progress) -> PlannedCache:
    """Read and tokenise the data, identify the teacher, and fix what goes to which shard.

    Raises:
        KdcacheError: bad data, tokenizer, model or recipe values; text that the teacher has yet to write.
    """
    data, _ = teacher_sections(recipe)
    if data.source == "generate":
        raise RecipeError(
            "data.source is generate, and what the teacher answers is known once kdcache teacher-cache has run; give its cache "
            "instead of the recipe"
        )
    ground = ground_of(recipe)
    return plan_rows(recipe, ground, [read_split(data, name, ground.tokenizer, progress) for name in SPLITS])


def plan_rows(recipe: Recipe, ground: Ground, found: Sequence[SplitRows]) -> PlannedCache:
    """The plan over the rows of both splits.

    Raises:
        KdcacheError: token ids that the head does not know, or too many shards.
    """
    data, teacher = teacher_sections(recipe)
    shards: list[ShardPlan] = []
    for number, split in enumerate(found):
        _refuse_unknown_ids(split.tokenised, len(ground.tokens), teacher.model)
        shards += _cut(number, split.tokenised.rows, recipe.cache.positions_per_shard)
    if len(shards) > layout.SHARDS_LIMIT:
        raise RecipeError(
            f"cache.positions_per_shard {recipe.cache.positions_per_shard} makes {len(shards):,} shards, and a cache has at "
            f"most {layout.SHARDS_LIMIT:,}; raise it"
        )
    splits = [_split_plan(data, split) for split in found]
    plan = plan_of(recipe, ground, [split.shape for split in found], splits, shards)
    return PlannedCache(plan, tuple(split.tokenised.rows for split in found), ground.tokens)


def plan_of(
    recipe: Recipe, ground: Ground, shapes: Sequence[str], splits: Sequence[SplitPlan], shards: Sequence[ShardPlan]
) -> Plan:
    """Everything a plan states, around these splits and shards; floors may still be open."""
    return Plan(
        format=layout.FORMAT,
        version=layout.VERSION,
        teacher=teacher_identity(recipe, ground),
        tokenizer=_tokenizer_identity(ground),
        data=_data_plan(recipe, ground, shapes, splits),
        selection=_selection_plan(recipe.selection),
        shards=tuple(shards),
        derived=None,
    )


def plan_around(
    recipe: Recipe, ground: Ground, existing: Plan, shapes: Sequence[str], splits: Sequence[SplitPlan]
) -> Plan:
    """What the recipe would have made of ``existing``: its shards and, where the recipe leaves them open, its floors, and of
    all else what the recipe says."""
    selection = _selection_plan(recipe.selection)
    if _OPEN in selection.floors:
        selection = selection.model_copy(update={"floors": existing.selection.floors})
    return existing.model_copy(
        update={
            "teacher": teacher_identity(recipe, ground),
            "tokenizer": _tokenizer_identity(ground),
            "data": _data_plan(recipe, ground, shapes, splits),
            "selection": selection,
            "derived": None,
        }
    )


def teacher_identity(recipe: Recipe, ground: Ground) -> TeacherIdentity:
    """The teacher as a plan names it."""
    _, teacher = teacher_sections(recipe)
    return TeacherIdentity(
        name=ground.identity.name,
        revision=ground.identity.revision,
        fingerprint=ground.identity.fingerprint,
        architecture=ground.identity.architecture,
        quantization=teacher.quantization,
        dtype=effective_dtype(teacher.quantization, teacher.dtype),
        batch_tokens=teacher.batch_tokens,
    )


def pad_id(ground: Ground) -> int:
    """The token that fills short rows."""
    pad = ground.tokenizer.pad_token_id
    return int(pad if pad is not None else ground.tokenizer.eos_token_id)


def _tokenizer_identity(ground: Ground) -> TokenizerIdentity:
    return TokenizerIdentity(
        name=ground.identity.name,
        fingerprint=ground.tokens.fingerprint,
        vocab_size=len(ground.tokens),
        eos_id=int(ground.tokenizer.eos_token_id),
        pad_id=pad_id(ground),
    )


def _data_plan(recipe: Recipe, ground: Ground, shapes: Sequence[str], splits: Sequence[SplitPlan]) -> DataPlan:
    data, _ = teacher_sections(recipe)
    return DataPlan(
        shape="+".join(sorted(set(shapes))),
        columns={str(ours): theirs for ours, theirs in data.columns.items()},
        prompt=data.prompt,
        system=data.system,
        date=data.date,
        template_sha256=template_sha256(ground.tokenizer, data.prompt),
        max_length=data.max_length,
        splits=tuple(splits),
    )


def _selection_plan(section: SelectionSection) -> SelectionPlan:
    floors: tuple[float, ...] = ()
    if section.method.startswith("threshold"):
        # Until they are found, floors that no probability lies above.
        floors = section.floors or (_OPEN,) * len(section.temperatures)
    return SelectionPlan(**{**section.recorded(), "floors": floors})


def _refuse_unknown_ids(tokenised: TokenRows, vocab_size: int, model: str) -> None:
    for row in tokenised.rows:
        if int(row.ids.max()) >= vocab_size:
            raise DataError(
                f"example {row.index} holds token id {int(row.ids.max())}, for which the head of {model} has no column "
                f"(it has {vocab_size}); remove the example or its special token"
            )


def _split_plan(data: DataSection, split: SplitRows) -> SplitPlan:
    tokenised = split.tokenised
    digest = hashlib.sha256(b"".join(sequence_digest(r.ids, r.targets) for r in tokenised.rows))
    return SplitPlan(
        name=split.name,
        source=split.shown,
        revision=data.source_of(split.name).revision,
        selected=data.selected(split.name),
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
