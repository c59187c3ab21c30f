"""What each factor did: rows that agree in everything else are held against each other.

In a grid that is every row; where named rows change one thing at a time, each is held against the one that does not. Keys
that always change together are one factor. Where no two rows differ in a factor alone, as in a search, its points are
shown without a line through them: what they differ by is not its doing alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from kdcache.recipe_keys import value_at
from kdcache.report.collect import Row
from kdcache.report.comparable import Comparison
from kdcache.report.recipes import Base, value_text, varied
from kdcache.run_record import AFTER

# Fewer points that differ in other things as well say nothing.
_FEWEST = 4


@dataclass(frozen=True)
class Level:
    """One value of a factor, and the perplexities of the rows that have it; ``number`` where the value is one."""

    value: str
    points: tuple[tuple[str, float], ...]
    number: float | None = None

    @property
    def mean(self) -> float:
        """Mean perplexity of its rows."""
        return sum(p for _, p in self.points) / len(self.points)


@dataclass(frozen=True)
class Effect:
    """A factor over rows that may be compared; ``among`` names them where there are others.

    ``alone``: whether the rows of its levels differ in nothing else, so that their means may be compared.
    """

    factor: str
    levels: tuple[Level, ...]
    among: str = ""
    alone: bool = True

    @property
    def title(self) -> str:
        """The factor, and among which rows."""
        told = [text for text in (self.among, "" if self.alone else "others vary too") if text]
        return self.factor + (f" ({'; '.join(told)})" if told else "")


def effects(chosen: list[Base], comparison: Comparison, factors: dict[str, tuple[str, ...]]) -> list[Effect]:
    """Every factor that takes two values or more, in each base and each set of comparable rows.

    Args:
        chosen: the bases.
        comparison: tells which rows may be compared.
        factors: base file -> the keys its sweep varied; otherwise those that its rows differ in.
    """
    found = []
    for base in chosen:
        for rows in comparison.sets:
            own = [
                row for row in base.rows if row in rows and math.isfinite(row.score(AFTER, "perplexity") or math.nan)
            ]
            names = [base.name] if len(chosen) > 1 else []
            names += [f"set {comparison.set_name(rows[0])}"] if len(comparison.sets) > 1 else []
            keys = [
                key for key in factors.get(base.file) or varied(base) if len({_text(row, (key,)) for row in own}) > 1
            ]
            together = _together(own, keys)
            for factor in together:
                effect = _effect(own, factor, [other for other in together if other != factor], ", ".join(names))
                if effect is not None:
                    found.append(effect)
    return found


def _effect(rows: list[Row], factor: tuple[str, ...], others: list[tuple[str, ...]], among: str) -> Effect | None:
    name = ", ".join(factor)
    matched = _matched(rows, factor, others)
    if matched:
        return Effect(name, _levels(matched, factor), among)
    return Effect(name, _levels(rows, factor), among, alone=False) if len(rows) >= _FEWEST else None


def _matched(rows: list[Row], factor: tuple[str, ...], others: list[tuple[str, ...]]) -> list[Row]:
    """Rows that differ in the factor alone: of all groups that agree in the others, those with every value, or else the one with
    the most values."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(_text(row, other) for other in others), []).append(row)
    values = {key: {_text(row, factor) for row in group} for key, group in groups.items()}
    most = max(values, key=lambda key: len(values[key]))
    if len(values[most]) < 2:
        return []
    return [row for key, group in groups.items() if values[key] == values[most] for row in group]


def _together(rows: list[Row], keys: list[str]) -> list[tuple[str, ...]]:
    """The keys, those that always change together as one factor."""
    kinds: dict[tuple[int, ...], list[str]] = {}
    for key in keys:
        texts = [_text(row, (key,)) for row in rows]
        kinds.setdefault(tuple(texts.index(text) for text in texts), []).append(key)
    return [tuple(found) for found in kinds.values()]


def _text(row: Row, factor: tuple[str, ...]) -> str:
    return ", ".join(value_text(value_at(row.recipe or {}, key)) for key in factor)


def _levels(rows: list[Row], factor: tuple[str, ...]) -> tuple[Level, ...]:
    groups: dict[str, list[tuple[str, float]]] = {}
    numbers: dict[str, float] = {}
    for row in rows:
        text, value = _text(row, factor), value_at(row.recipe or {}, factor[0])
        perplexity = row.score(AFTER, "perplexity")
        assert perplexity is not None
        groups.setdefault(text, []).append((row.name, perplexity))
        if isinstance(value, int | float) and not isinstance(value, bool):
            numbers[text] = float(value)
    # Numbers by size before everything else by spelling.
    ordered = sorted(groups.items(), key=lambda item: (item[0] not in numbers, numbers.get(item[0], 0.0), item[0]))
    return tuple(
        Level(text, tuple(points), numbers.get(text) if len(factor) == 1 else None) for text, points in ordered
    )
