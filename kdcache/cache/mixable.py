"""Whether several caches can be mixed: one vocabulary, the same sequences in the same order, a temperature in common.

A plan states for every split a digest of token ids, target flags and order, so that nothing has to be read to know that two
caches agree; only where they do not are their sequences read, to say which differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

import numpy as np

from kdcache.cache.codec import CachedSequence
from kdcache.cache.reader import Cache, Split
from kdcache.errors import CacheError, PlanMismatchError

_NAMED = 4


def refuse_unmixable(parts: Sequence[Cache]) -> None:
    """Hold each cache against the first.

    Raises:
        PlanMismatchError: they number tokens differently, or hold other sequences, which are named.
        CacheError: no temperature is declared by all, or one keeps some positions alone.
    """
    for other in parts[1:]:
        _refuse_other_vocabulary(parts[0], other)
        _refuse_other_sequences(parts[0], other)
    _refuse_chosen_positions(parts)
    common_temperatures(parts)


def common_temperatures(parts: Sequence[Cache]) -> tuple[float, ...]:
    """Temperatures that all declare, ascending.

    Raises:
        CacheError: there is none.
    """
    common = tuple(t for t in parts[0].temperatures if all(t in cache.temperatures for cache in parts))
    if not common:
        said = "; ".join(f"{c.directory} T = {', '.join(f'{t:g}' for t in c.temperatures)}" for c in parts)
        raise CacheError(
            f"the caches of a mixture should declare a temperature in common, found {said}; make one of them again with "
            "selection.temperatures of the other"
        )
    return common


def _refuse_other_vocabulary(first: Cache, other: Cache) -> None:
    if first.plan.tokenizer.fingerprint == other.plan.tokenizer.fingerprint:
        return
    a, b = first.vocabulary(), other.vocabulary()
    where = next((i for i, (x, y) in enumerate(zip_longest(a, b)) if x != y), min(len(a), len(b)))
    shown = [repr(v[where]) if where < len(v) else "absent" for v in (a, b)]
    raise PlanMismatchError(
        f"{first.directory} and {other.directory} have different vocabularies ({len(a):,} and {len(b):,} tokens; id {where} is "
        f"{shown[0]} and {shown[1]}), and probabilities of different tokens cannot be averaged. That would need an alignment "
        "of the vocabularies, such as optimal transport over sorted probabilities (universal logit distillation), which "
        "kdcache does not do; mix teachers of one tokenizer"
    )


def _refuse_other_sequences(first: Cache, other: Cache) -> None:
    """Splits, and in each of them token ids, targets and order: a plan's fingerprint is a digest of these."""
    if list(first) != list(other):
        raise PlanMismatchError(
            f"{first.directory} has the splits {', '.join(first)}, {other.directory} {', '.join(other)}: caches that are mixed "
            "should hold the same sequences (kdcache subset --split, kdcache merge)"
        )
    for name in first:
        ours, theirs = first.split(name), other.split(name)
        if _fingerprint(ours) != _fingerprint(theirs):
            raise PlanMismatchError(
                f"{first.directory} and {other.directory} hold other sequences in split {name}: {_differences(ours, theirs)}. "
                "Caches that are mixed should be made from the same data with the same prompt and data.max_length, or be the "
                "same kdcache subset of such"
            )


def _fingerprint(split: Split) -> str:
    return split.cache.plan.data.splits[split.number].fingerprint


def _differences(ours: Split, theirs: Split) -> str:
    """The first sequences that differ, in words."""
    found = []
    if len(ours) != len(theirs):
        found.append(f"{len(ours):,} of them against {len(theirs):,}")
    for index, (a, b) in enumerate(zip(ours, theirs, strict=False)):
        if (said := _difference(a, b)) is not None:
            found.append(f"sequence {index} {said}")
        if len(found) == _NAMED:
            break
    return "; ".join(found)


def _difference(a: CachedSequence, b: CachedSequence) -> str | None:
    shorter = min(len(a.token_ids), len(b.token_ids))
    for what, x, y in (("token", a.token_ids, b.token_ids), ("target flag", a.targets, b.targets)):
        differing = np.flatnonzero(x[:shorter] != y[:shorter])
        if len(differing):
            at = int(differing[0])
            return f"from position {at} on ({what} {x[at]} against {y[at]})"
    if len(a.token_ids) != len(b.token_ids):
        return f"from position {shorter} on ({len(a.token_ids)} tokens against {len(b.token_ids)})"
    return None


def _refuse_chosen_positions(parts: Sequence[Cache]) -> None:
    for cache in parts:
        chosen = cache.plan.selection.positions
        if chosen != "all":
            raise CacheError(
                f"{cache.directory} keeps positions by {chosen} alone, and a mixture needs every teacher at every position; make "
                "it with selection.positions all"
            )
