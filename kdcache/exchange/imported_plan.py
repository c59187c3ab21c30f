"""What a cache of imported data says of itself: its plan, made of what was read and of what was said by who imported it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdcache.cache import layout
from kdcache.cache.codec import CachedSequence
from kdcache.cache.derive import cut_shards, refuse_too_many
from kdcache.cache.manifest import DataPlan, Plan, ShardPlan, SplitPlan, TeacherIdentity, TokenizerIdentity
from kdcache.cache.selection import SelectionPlan
from kdcache.cache.strict_json import canonical_sha256
from kdcache.errors import CacheError
from kdcache.exchange.plain import PlainSequence
from kdcache.exchange.settle import Tally
from kdcache.model_identity import identify
from kdcache.models import effective_dtype

_UNKNOWN = "unknown"


@dataclass(frozen=True)
class Given:
    """What the data do not say of themselves.

    Attributes:
        tokenizer: folder or id of the tokenizer that the ids are of.
        teacher: name of the teacher, or a folder or id from which it can be identified.
        temperature: T of the log-probabilities.
        holdout: sequences at the end of the training split that become the validation split, where there is none.
        positions_per_shard: about so many rows go into a shard.
    """

    tokenizer: str | None = None
    teacher: str | None = None
    temperature: float = 1.0
    holdout: int = 0
    positions_per_shard: int = 65_536


@dataclass
class Split:
    """One split: how it is read, and what the first reading found.

    Of each sequence: tokens and positions, the digest of its tokens and targets, and the digest of its rows as they were read.
    """

    read: Callable[[], Iterator[CachedSequence]]
    name: str
    examples: int = 0
    dropped: int = 0
    sizes: list[tuple[int, int]] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    rows: list[bytes] = field(default_factory=list)


def rows_digest(sequence: PlainSequence) -> bytes:
    """First 16 bytes of SHA-256 over a sequence's rows: entries of each, ids, log-probabilities, and the labels' where they are said."""
    labels = sequence.label_log_probs
    h = hashlib.sha256(f"{len(sequence.counts)} {len(sequence.ids)} {labels is not None}".encode())
    h.update(sequence.counts.astype("<i8").tobytes() + sequence.ids.astype("<i8").tobytes())
    h.update(sequence.log_probs.astype("<f8").tobytes())
    if labels is not None:
        h.update(labels.astype("<f8").tobytes())
    return h.digest()[: layout.DIGEST_BYTES]


def imported_plan(
    kind: str, given: Given, found: list[Split], tokens: list[str | None], tokenizer: Any, tally: Tally
) -> Plan:
    """The plan of the cache that the splits will be.

    Raises:
        CacheError: it would have too many shards.
    """
    shards: list[ShardPlan] = []
    for number, split in enumerate(found):
        shards += cut_shards(
            number, split.sizes, tokens_limit=layout.TOKENS_PER_SHARD, positions_limit=given.positions_per_shard
        )
    refuse_too_many(shards)
    name = Path(given.tokenizer or "").absolute().name if Path(given.tokenizer or "").is_dir() else given.tokenizer
    return Plan(
        format=layout.FORMAT,
        version=layout.VERSION,
        teacher=_teacher(given),
        tokenizer=TokenizerIdentity(
            name=name or _UNKNOWN,
            fingerprint=canonical_sha256(tokens),
            vocab_size=len(tokens),
            eos_id=int(tokenizer.eos_token_id),
            pad_id=pad_of(tokenizer),
        ),
        data=DataPlan(
            shape="imported",
            columns={},
            prompt="imported",
            system=None,
            date="",
            template_sha256=None,
            max_length=tally.longest,
            splits=tuple(_split_plan(kind, given, split) for split in found),
        ),
        selection=selection_of(given.temperature, k=tally.widest),
        shards=tuple(shards),
        derived=None,
    )


def _split_plan(kind: str, given: Given, split: Split) -> SplitPlan:
    return SplitPlan(
        name=split.name,
        source=f"data of {kind}" if kind != "jsonl" else "JSON Lines",
        revision=None,
        # The fingerprint is of tokens alone: other numbers under the same tokens are another cache.
        selected=f"imported at T = {given.temperature:.17g}, rows sha256 {hashlib.sha256(b''.join(split.rows)).hexdigest()}",
        examples=split.examples,
        dropped_empty=0,
        dropped_no_target=split.dropped,
        truncated=0,
        sequences=len(split.sizes),
        tokens=sum(tokens for tokens, _ in split.sizes),
        positions=sum(positions for _, positions in split.sizes),
        fingerprint=hashlib.sha256(b"".join(split.digests)).hexdigest(),
    )


def _teacher(given: Given) -> TeacherIdentity:
    """The teacher, identified where its files are at hand, and otherwise a name."""
    name = given.teacher or _UNKNOWN
    if Path(name).is_dir():
        found = identify(name)
        return TeacherIdentity(
            name=found.name, revision=None, fingerprint=found.fingerprint, architecture=found.architecture,
            quantization="none", dtype=effective_dtype("none", "bfloat16"), batch_tokens=0,
        )  # fmt: skip
    return TeacherIdentity(
        name=name, revision=None, fingerprint=hashlib.sha256(f"by name: {name}".encode()).hexdigest(),
        architecture=_UNKNOWN, quantization=_UNKNOWN, dtype=_UNKNOWN, batch_tokens=0,
    )  # fmt: skip


def identity_notes(given: Given) -> list[str]:
    """What is not known of the teacher."""
    if given.teacher is None:
        return ["the teacher is unknown"]
    if Path(given.teacher).is_dir():
        return [
            "the teacher is the folder that was named; that it made these data, unquantised in bfloat16, is taken on trust"
        ]
    return [f"the teacher is known by the name {given.teacher} alone"]


def selection_of(temperature: float, *, k: int) -> SelectionPlan:
    """The plan's record of rows that somebody else chose.

    Raises:
        CacheError: a temperature that no cache may declare.
    """
    if not layout.LOWEST_TEMPERATURE <= temperature <= layout.HIGHEST_TEMPERATURE:
        raise CacheError(
            f"--temperature {temperature:g} lies outside {layout.LOWEST_TEMPERATURE:g} to {layout.HIGHEST_TEMPERATURE:g}"
        )
    # Entries that somebody else chose, the rest as one bucket; stored in half precision, which rounds less than our steps.
    return SelectionPlan(
        method="top_k", k=k, floors=(), draws=1, temperatures=(temperature,), bytes_per_position=None, tail_logits=True,
        values="half", positions="all", quantile=0.0,
    )  # fmt: skip


def pad_of(tokenizer: Any) -> int:
    """The token that fills a sequence."""
    return int(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)
