"""Plan and manifest: what a cache will hold, fixed before the first forward pass, and what it holds.

Both are strictly parsed: unknown fields, wrong types and numbers out of range are refused. The plan's
digest is the SHA-256 of its canonical JSON; a cache's id is the SHA-256 of its manifest file's bytes.
"""

from __future__ import annotations

import builtins
import hashlib
import math
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, FailFast, Field, ValidationError, model_validator

from kdcache.cache import layout
from kdcache.cache.rows import RowDesign
from kdcache.cache.selection import SelectionPlan, Strict
from kdcache.cache.strict_json import canonical_sha256, parse_object, readable
from kdcache.errors import CorruptCacheError

Count = Annotated[int, Field(ge=0, lt=1 << 53)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Text = Annotated[str, Field(max_length=4096)]
_VALUES_LIMIT = 4096
_SHARD_FIELDS = 16
ModelType = TypeVar("ModelType", bound=BaseModel)


class TeacherIdentity(Strict):
    """Which model produced the logits, and in which arithmetic."""

    name: Text
    revision: Text | None
    fingerprint: Sha256
    architecture: Text
    quantization: Text
    dtype: Text
    batch_tokens: Count


class TokenizerIdentity(Strict):
    """The token map; ``fingerprint`` is the SHA-256 of the vocabulary's canonical JSON."""

    name: Text
    fingerprint: Sha256
    vocab_size: Annotated[int, Field(ge=2, le=layout.VOCAB_LIMIT)]
    eos_id: Count
    pad_id: Count


class SplitPlan(Strict):
    """One named split: where it came from and what became of its examples."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,31}$")]
    source: Text
    revision: Text | None
    selected: Text
    examples: Count
    dropped_empty: Count
    dropped_no_target: Count
    truncated: Count
    sequences: Annotated[int, Field(ge=1, lt=1 << 53)]
    tokens: Annotated[int, Field(ge=1, lt=1 << 53)]
    positions: Annotated[int, Field(ge=1, lt=1 << 53)]
    fingerprint: Sha256


class DataPlan(Strict):
    """How text became tokens."""

    shape: Text
    columns: dict[Text, Text]
    prompt: Text
    system: Text | None
    date: Text
    template_sha256: Sha256 | None
    max_length: Count
    splits: Annotated[tuple[SplitPlan, ...], Field(min_length=1, max_length=16), FailFast()]


class ShardPlan(Strict):
    """Sequences ``start : start + sequences`` of split number ``split``."""

    split: Count
    start: Count
    sequences: Annotated[int, Field(ge=1, lt=1 << 32)]
    tokens: Annotated[int, Field(ge=1, lt=1 << 32)]
    positions: Annotated[int, Field(ge=1, lt=1 << 32)]


class Derivation(Strict):
    """What a cache was made from other caches by: the operation, its settings, and the parents' cache ids."""

    operation: Literal["subset", "merge"]
    parents: Annotated[tuple[Sha256, ...], Field(min_length=1, max_length=1024)]
    settings: dict[Text, Text]


class Plan(Strict):
    """Everything that fixes a cache's content, and which sequences go to which shard."""

    format: Literal["kdcache"]
    version: int
    teacher: TeacherIdentity
    tokenizer: TokenizerIdentity
    data: DataPlan
    selection: SelectionPlan
    shards: Annotated[tuple[ShardPlan, ...], Field(min_length=1, max_length=layout.SHARDS_LIMIT), FailFast()]
    derived: Derivation | None

    @model_validator(mode="after")
    def _shards_tile_the_splits(self) -> Plan:
        if len({s.name for s in self.data.splits}) != len(self.data.splits):
            raise ValueError("split names should differ")
        reached = [0] * len(self.data.splits)
        totals = [[0, 0] for _ in self.data.splits]
        for number, shard in enumerate(self.shards):
            if shard.split >= len(reached) or shard.start != reached[shard.split]:
                raise ValueError(f"shard {number} does not continue its split")
            reached[shard.split] += shard.sequences
            totals[shard.split][0] += shard.tokens
            totals[shard.split][1] += shard.positions
        for split, sequences, (tokens, positions) in zip(self.data.splits, reached, totals, strict=True):
            if (sequences, tokens, positions) != (split.sequences, split.tokens, split.positions):
                raise ValueError(f"the shards of split {split.name} do not add up to it")
        if max(self.tokenizer.eos_id, self.tokenizer.pad_id) >= self.tokenizer.vocab_size:
            raise ValueError("tokenizer.eos_id and tokenizer.pad_id should lie below tokenizer.vocab_size")
        return self

    @property
    def digest(self) -> str:
        """Hex SHA-256 of the canonical JSON."""
        return canonical_sha256(self.model_dump(mode="json"))

    def to_bytes(self) -> bytes:
        """The bytes of ``plan.json``."""
        return readable(self.model_dump(mode="json"))

    def design(self, split: int) -> RowDesign:
        """What the rows of a split share. Positions are selected in the first split alone: the others are for scoring."""
        thinned = split == 0 and self.selection.positions != "all"
        return self.selection.design(self.tokenizer.vocab_size, thinned=thinned)

    def split_index(self, name: str) -> int | None:
        """Number of the split called ``name``, or None."""
        return next((i for i, s in enumerate(self.data.splits) if s.name == name), None)

    def differences(self, other: Plan) -> list[str]:
        """Fields that differ, as ``key: this plan's value, the other's value``."""
        return _differences(self.model_dump(mode="json"), other.model_dump(mode="json"))


class ShardEntry(Strict):
    """What became of one shard: SHA-256 of its file, its sizes in bytes, its entries."""

    sha256: Sha256
    content_sha256: Sha256
    bytes: Count
    raw_bytes: Count
    entries: Count

    def promises(self, data: builtins.bytes) -> bool:
        """Whether these are the bytes of the shard's file."""
        return len(data) == self.bytes and hashlib.sha256(data).hexdigest() == self.sha256


class SplitSummary(Strict):
    """Totals of one split. ``teacher_nll`` is the summed negative log-probability of the labels, nats.

    ``kept_positions`` counts the rows that are not left empty. ``kept_mass_mean`` and ``kept_mass_p1`` (first percentile,
    to 0.001) are over these, with one value per declared temperature: the mass of the exactly kept entries.
    """

    name: str
    sequences: Count
    tokens: Count
    positions: Count
    kept_positions: Count
    entries: Count
    teacher_nll: Annotated[float, Field(ge=0)]
    kept_mass_mean: tuple[Annotated[float, Field(ge=0, le=1)], ...]
    kept_mass_p1: tuple[Annotated[float, Field(ge=0, le=1)], ...]

    @property
    def teacher_perplexity(self) -> float:
        """exp of the teacher's loss per position."""
        return math.exp(min(self.teacher_nll / self.positions, 700.0))


class Manifest(Strict):
    """The record of a complete cache; written last and rebuildable from the shards."""

    format: Literal["kdcache"]
    version: int
    plan_digest: Sha256
    splits: Annotated[tuple[SplitSummary, ...], FailFast()]
    shards: Annotated[tuple[ShardEntry, ...], FailFast()]

    def to_bytes(self) -> bytes:
        """The bytes of ``manifest.json``."""
        return readable(self.model_dump(mode="json"))

    @property
    def cache_id(self) -> str:
        """Hex SHA-256 of the manifest file's bytes."""
        return hashlib.sha256(self.to_bytes()).hexdigest()


def parse_plan(data: bytes) -> Plan:
    """Strictly parse ``plan.json``.

    Raises:
        CorruptCacheError: not a plan of this format and version.
    """
    return _parse(Plan, data, layout.PLAN_FILE)


def parse_manifest(data: bytes, plan: Plan) -> Manifest:
    """Strictly parse ``manifest.json`` and hold it against its plan.

    Raises:
        CorruptCacheError: not a manifest, or not of this plan.
    """
    manifest = _parse(Manifest, data, layout.MANIFEST_FILE)
    if manifest.plan_digest != plan.digest:
        raise CorruptCacheError(
            f"{layout.MANIFEST_FILE} names plan {manifest.plan_digest[:12]}, {layout.PLAN_FILE} is {plan.digest[:12]}"
        )
    if len(manifest.shards) != len(plan.shards) or [s.name for s in manifest.splits] != [
        s.name for s in plan.data.splits
    ]:
        raise CorruptCacheError(f"{layout.MANIFEST_FILE} lists other shards or splits than {layout.PLAN_FILE}")
    for index, shard in enumerate(manifest.shards):
        if max(shard.bytes, shard.raw_bytes) > layout.SHARD_LIMIT:
            raise CorruptCacheError(
                f"{layout.MANIFEST_FILE}: shard {index} should have at most {layout.SHARD_LIMIT} bytes, it claims "
                f"{max(shard.bytes, shard.raw_bytes)}"
            )
    temperatures = len(plan.selection.temperatures)
    for stated, planned in zip(manifest.splits, plan.data.splits, strict=True):
        counts = (stated.sequences, stated.tokens, stated.positions)
        if counts != (planned.sequences, planned.tokens, planned.positions):
            raise CorruptCacheError(f"{layout.MANIFEST_FILE}: the counts of split {stated.name} are not the plan's")
        if not len(stated.kept_mass_mean) == len(stated.kept_mass_p1) == temperatures:
            raise CorruptCacheError(
                f"{layout.MANIFEST_FILE}: split {stated.name} should state {temperatures} kept masses"
            )
    return manifest


def _parse(model: type[ModelType], data: bytes, name: str) -> ModelType:
    value = parse_object(data, what=name)
    if value.get("format") != layout.FORMAT:
        raise CorruptCacheError(f"{name} is not from a kdcache cache")
    if value.get("version") != layout.VERSION:
        raise CorruptCacheError(
            f"{name} has format version {value.get('version')!r}, this kdcache reads version {layout.VERSION}"
        )
    _refuse_unwieldy(value, name)
    del value
    try:
        return model.model_validate_json(data)
    except ValidationError as exc:
        first = exc.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the whole"
        raise CorruptCacheError(f"{name}: {where}: {first['msg']}") from exc


def _refuse_unwieldy(value: dict[str, object], name: str) -> None:
    """Validation collects every fault it finds, at a kilobyte each; shards, which may be many, fail at the first."""
    waiting: list[object] = [v for key, v in value.items() if key != "shards"]
    shards = value.get("shards")
    if isinstance(shards, list):
        waiting += [s for s in shards if isinstance(s, dict) and len(s) > _SHARD_FIELDS][:1]
    count = len(waiting)
    while waiting:
        found = waiting.pop()
        inside = found.values() if isinstance(found, dict) else found if isinstance(found, list) else ()
        count += len(inside)
        if count > _VALUES_LIMIT:
            raise CorruptCacheError(f"{name} holds more than {_VALUES_LIMIT} values beside its shards")
        waiting.extend(inside)


def _differences(a: object, b: object, path: str = "") -> list[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        keys = sorted(set(a) | set(b))
        return [d for k in keys for d in _differences(a.get(k), b.get(k), f"{path}.{k}" if path else k)]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in _differences(x, y, f"{path}.{i}")]
    if a == b:
        return []
    if isinstance(a, list) and isinstance(b, list) and max(len(a), len(b)) > 8:
        return [f"{path}: {len(a)} entries against {len(b)}"]
    return [f"{path}: {a!r} against {b!r}"]
