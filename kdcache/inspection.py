"""What a cache holds of one sequence: its text, and for each target what the teacher thought of it.

Facts only; `kdcache.commands` and `kdcache.inspection_html` show them. A cache may come from a stranger: every string given
out is free of control characters, bidirectional overrides and lone surrogates.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from kdcache.cache import layout
from kdcache.cache.codec import CachedSequence, encode
from kdcache.cache.reader import Cache, Split
from kdcache.cache.rows import SparseRows
from kdcache.cache.shard import part_sizes
from kdcache.errors import CacheError

# Probabilities of the actual token from which surprise rises: the class of a token is how many of them it falls short of.
SURPRISE = (0.9, 0.5, 0.1, 0.01)
_LONGEST = 48


@dataclass(frozen=True)
class Choice:
    """One of the teacher's choices: the token, its probability at T, and whether it was drawn rather than kept exactly."""

    token: str
    probability: float
    drawn: bool


@dataclass(frozen=True)
class Distribution:
    """A row of the cache at T.

    Attributes:
        choices: the likeliest entries, largest first.
        kept: mass of the head.
        head: entries kept exactly.
        tail: entries drawn from the rest.
    """

    choices: tuple[Choice, ...]
    kept: float
    head: int
    tail: int

    @property
    def rest(self) -> float:
        """Mass outside the head."""
        return max(0.0, 1.0 - self.kept)


@dataclass(frozen=True)
class TokenView:
    """A token in its place.

    Attributes:
        text: as it reads; line breaks are kept.
        name: on one line, its spaces visible.
        probability: the teacher's, of this token at T = 1; None where it is not a target.
        row: what the teacher expected here; None where it is not a target or its row was left empty.
    """

    text: str
    name: str
    probability: float | None
    row: Distribution | None

    @property
    def surprise(self) -> int | None:
        """0 (expected) to 4 (hardly believed); None where it is not a target."""
        return None if self.probability is None else sum(self.probability < bound for bound in SURPRISE)


@dataclass(frozen=True)
class SequenceView:
    """One sequence of a split, looked at with temperature T."""

    split: str
    index: int
    of: int
    temperature: float
    tokens: tuple[TokenView, ...]
    perplexity: float

    @property
    def targets(self) -> int:
        """Tokens that are learnt."""
        return sum(t.probability is not None for t in self.tokens)

    @property
    def title(self) -> str:
        """What is looked at, in a line."""
        return (
            f"{self.split}, sequence {self.index:,} of {self.of:,}: {len(self.tokens):,} tokens, {self.targets:,} of them "
            f"targets, teacher perplexity {self.perplexity:.3f}"
        )


class Speller:
    """How a vocabulary's token strings read.

    Byte-level vocabularies write a byte as one printable character (a space as ``Ġ``), SentencePiece a space as ``▁`` and
    single bytes as ``<0x0A>``. Which it is, the vocabulary shows.
    """

    def __init__(self, vocabulary: list[str | None]) -> None:
        self._vocabulary = vocabulary
        spaces = {mark: sum(t is not None and t.startswith(mark) for t in vocabulary) for mark in ("Ġ", "▁")}
        self.kind: Literal["bytes", "pieces", "plain"] = "plain"
        if any(spaces.values()):
            self.kind = "bytes" if spaces["Ġ"] >= spaces["▁"] else "pieces"

    @cached_property
    def _bytes(self) -> dict[str, int]:
        """The characters of a byte-level vocabulary: printable Latin-1 as it is, the other bytes from 256 on, in order."""
        as_is = [*range(33, 127), *range(161, 173), *range(174, 256)]
        moved = [b for b in range(256) if b not in set(as_is)]
        return {chr(b): b for b in as_is} | {chr(256 + i): b for i, b in enumerate(moved)}

    def text(self, token_id: int) -> str:
        """The token as it reads, harmless; line breaks are kept."""
        token = self._vocabulary[token_id]
        if token is None:
            return f"⟨{token_id}⟩"
        if self.kind == "bytes" and all(c in self._bytes for c in token):
            token = bytes(self._bytes[c] for c in token).decode("utf-8", "backslashreplace")
        elif self.kind == "pieces":
            byte = re.fullmatch(r"<0x([0-9A-F]{2})>", token)
            token = bytes([int(byte[1], 16)]).decode("utf-8", "backslashreplace") if byte else token.replace("▁", " ")
        return harmless(token if len(token) <= _LONGEST else token[: _LONGEST - 1] + "…")

    def name(self, token_id: int) -> str:
        """The token on one line: spaces and line breaks visible."""
        return self.text(token_id).replace(" ", "␣").replace("\n", "↵") or "⟨empty⟩"


def harmless(text: str) -> str:
    """Text whose control characters, overrides and lone surrogates are written out, as ``\\x1b``; line breaks stay."""
    return "".join(c if c == "\n" or c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def look_at(
    cache: Cache,
    speller: Speller,
    *,
    split: str,
    index: int,
    temperature: float | None = None,
    top: int = 5,
) -> SequenceView:
    """One sequence of a cache with what the teacher thought of each of its targets.

    Args:
        cache: an open cache.
        speller: of the cache's vocabulary.
        split: name of the split.
        index: of the sequence in it.
        temperature: T of the distributions; None takes the smallest declared one.
        top: how many choices to name.

    Raises:
        CacheError: there is no such split or sequence, or the cache cannot give that temperature.
    """
    chosen: Split = cache.split(split)
    if not 0 <= index < len(chosen):
        raise CacheError(f"split {split} has sequences 0 to {len(chosen) - 1:,}; there is no sequence {index:,}")
    t = min(cache.temperatures) if temperature is None else temperature
    if not 0 < t <= layout.HIGHEST_TEMPERATURE:
        raise CacheError(f"a temperature lies above 0 and is at most {layout.HIGHEST_TEMPERATURE:g}; found {t:g}")
    sequence = chosen[index]
    rows = _distributions(sequence.rows, speller, t, top)
    label_nats = sequence.rows.label_log_prob.astype(np.float64)
    return SequenceView(
        split=split,
        index=index,
        of=len(chosen),
        temperature=t,
        tokens=_tokens(sequence, speller, rows),
        perplexity=float(np.exp(min(-label_nats.mean(), 700.0))) if len(label_nats) else 1.0,
    )


def _tokens(sequence: CachedSequence, speller: Speller, rows: list[Distribution | None]) -> tuple[TokenView, ...]:
    probabilities = np.exp(sequence.rows.label_log_prob.astype(np.float64)).tolist()
    views, row = [], 0
    for token, target in zip(sequence.token_ids.tolist(), sequence.targets.tolist(), strict=True):
        text, name = speller.text(token), speller.name(token)
        views.append(TokenView(text, name, probabilities[row] if target else None, rows[row] if target else None))
        row += target
    return tuple(views)


def _distributions(rows: SparseRows, speller: Speller, t: float, top: int) -> list[Distribution | None]:
    log_z = rows.log_partition_at(t)
    kept = np.exp(rows.head_log_sum(t) - log_z)
    found: list[Distribution | None] = []
    for p in range(len(rows)):
        if not rows.kept[p]:
            found.append(None)
            continue
        head = slice(*rows.head_offsets[p : p + 2].tolist())
        # Without logits of their own, drawn entries share their mean: there is nothing to rank them by.
        tail = slice(*rows.tail_offsets[p : p + 2].tolist()) if rows.design.tail_logits else slice(0, 0)
        ids = np.concatenate([rows.head_ids[head], rows.tail_ids[tail]])
        logits = np.concatenate([rows.head_logits[head], rows.tail_logits[tail]]).astype(np.float64)
        order = np.argsort(-logits, kind="stable")[:top]
        choices = (
            Choice(speller.name(int(ids[i])), float(np.exp(logits[i] / t - log_z[p])), bool(i >= rows.head[p]))
            for i in order
        )
        found.append(Distribution(tuple(choices), float(kept[p]), int(rows.head[p]), int(rows.tail[p])))
    return found


def size_by_part(cache: Cache) -> dict[str, float]:
    """Bytes per position of the first shard by part, its tensors each compressed alone."""
    arrays = encode(cache.shard(0), values=cache.plan.selection.values)
    positions = cache.plan.shards[0].positions
    return {part: size / positions for part, size in part_sizes(arrays).items()}
