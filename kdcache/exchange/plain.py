"""What travels between tools: sequences whose rows are lists of token ids with log-probabilities at one temperature.

No tool but this one weighs drawn entries or keeps a row's mass outside its entries at several temperatures, so a cache is
brought to its exactly kept entries at one T here; what that loses is counted as it happens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.cache.codec import CachedSequence
from kdcache.cache.layout import HIGHEST_TEMPERATURE, LOWEST_TEMPERATURE
from kdcache.cache.reader import Cache
from kdcache.errors import CacheError


@dataclass(frozen=True)
class PlainSequence:
    """One sequence.

    Attributes:
        token_ids: uint32 ``[L]``.
        targets: bool ``[L]``, tokens that are learnt; row ``r`` belongs to the ``r``-th of them, and was predicted one token earlier.
        counts: int64 ``[P]``, entries of each row; 0 where there are none.
        ids: int64 ``[E]``, row after row, the most probable entry of each row first.
        log_probs: float64 ``[E]``, natural logarithms at the temperature of the exchange.
        label_log_probs: float64 ``[P]``, of the learnt tokens at T = 1; not-a-number where it is not known. None: of none of them.
    """

    token_ids: NDArray[np.uint32]
    targets: NDArray[np.bool_]
    counts: NDArray[np.int64]
    ids: NDArray[np.int64]
    log_probs: NDArray[np.float64]
    label_log_probs: NDArray[np.float64] | None = None

    def rows(self) -> Iterator[tuple[int, NDArray[np.int64], NDArray[np.float64]]]:
        """For each row the index of its token, its ids and its log-probabilities."""
        ends = np.cumsum(self.counts)
        for place, start, end in zip(np.flatnonzero(self.targets), ends - self.counts, ends, strict=True):
            yield int(place), self.ids[start:end], self.log_probs[start:end]


@dataclass
class Losses:
    """What was left behind on the way, summed over rows."""

    rows: int = 0
    empty: int = 0
    drawn: int = 0
    cut: int = 0
    kept_mass: float = 0.0
    facts: list[str] = field(default_factory=list)

    @property
    def mean_mass(self) -> float:
        """Mean probability of the entries that are kept, over rows that have some."""
        return self.kept_mass / max(1, self.rows - self.empty)


def temperature_of(cache: Cache, wanted: float | None) -> float:
    """The temperature of the exchange: the one asked for, or 1, or the smallest that the cache can give.

    Raises:
        CacheError: below the smallest declared one, or beyond what any cache may declare.
    """
    lowest = min(cache.temperatures)
    temperature = max(1.0, lowest) if wanted is None else wanted
    if not LOWEST_TEMPERATURE <= temperature <= HIGHEST_TEMPERATURE:
        raise CacheError(
            f"--temperature {temperature:g} lies outside {LOWEST_TEMPERATURE:g} to {HIGHEST_TEMPERATURE:g}"
        )
    if not temperature >= lowest:
        raise CacheError(
            f"--temperature {temperature:g} is below the smallest that the cache declares, {lowest:g}; take that or one above"
        )
    return temperature


def plain_sequence(
    sequence: CachedSequence, temperature: float, *, k: int | None, renormalise: bool, losses: Losses
) -> PlainSequence:
    """The exactly kept entries of a cached sequence at a temperature.

    Args:
        sequence: of a cache.
        temperature: T, as `temperature_of` found it.
        k: largest entries of each row that are taken; None for all.
        renormalise: scale each row's probabilities to a sum of one.
        losses: what is left behind is added to it.
    """
    rows = sequence.rows
    log_z = rows.log_partition_at(temperature)
    owner = np.repeat(np.arange(len(rows)), rows.head)
    log_probs = rows.head_logits.astype(np.float64) / temperature - log_z[owner]
    order = np.lexsort((rows.head_ids, -log_probs, owner))
    rank = np.arange(len(owner)) - rows.head_offsets[:-1][owner]
    if k is not None:
        order = order[rank < k]
    counts = np.bincount(owner[order], minlength=len(rows)).astype(np.int64)
    ids, log_probs, owner = rows.head_ids[order].astype(np.int64), log_probs[order], owner[order]
    mass = np.bincount(owner, weights=np.exp(log_probs), minlength=len(rows))
    losses.rows += len(rows)
    losses.empty += int((counts == 0).sum())
    losses.drawn += len(rows.tail_ids)
    losses.cut += len(rows.head_ids) - len(order)
    losses.kept_mass += float(mass.sum())
    if renormalise:
        log_probs = log_probs - np.log(mass[owner])
    return PlainSequence(
        sequence.token_ids,
        sequence.targets,
        counts,
        ids,
        np.minimum(log_probs, 0.0),
        rows.label_log_prob.astype(np.float64),
    )


def lost_lines(cache: Cache, temperature: float, losses: Losses, *, renormalised: bool) -> list[str]:
    """What the exported data no longer say, for people."""
    others = [t for t in cache.temperatures if t != temperature]
    exact = (
        ""
        if temperature in cache.temperatures
        else " (which the cache does not declare: the mass outside is interpolated)"
    )
    lines = [f"the temperature T = {temperature:g}{exact} is baked in"]
    if others:
        lines[0] += f"; the cache could also give {', '.join(f'{t:g}' for t in others)} and what lies between"
    if losses.drawn:
        lines.append(
            f"{losses.drawn:,} drawn entries are left out: no weights go with them there, and without them they would mislead"
        )
    if losses.cut:
        lines.append(f"{losses.cut:,} entries beyond --k are left out")
    tail = f"the rows hold {losses.mean_mass:.1%} of the teacher's probability on average"
    lines.append(
        f"{tail}; scaled to one, the rest is forgotten" if renormalised else f"{tail}; the rest is not in the data"
    )
    if losses.empty:
        lines.append(
            f"{losses.empty:,} of {losses.rows:,} learnt tokens have no row, and take part in the cross-entropy alone"
        )
    return [*lines, *losses.facts]


def lists(flat: NDArray[Any], counts: NDArray[np.int64], kind: Any) -> Any:
    """A ragged column as an Arrow list array: ``counts`` numbers of ``flat`` each."""
    import pyarrow  # type: ignore[import-untyped]

    offsets = pyarrow.array(np.concatenate(([0], np.cumsum(counts))).astype(np.int32))
    return pyarrow.ListArray.from_arrays(
        offsets, flat if isinstance(flat, pyarrow.Array) else pyarrow.array(flat, type=kind)
    )
