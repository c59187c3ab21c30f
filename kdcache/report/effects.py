"""What each factor did: the mean perplexity of the rows that share a value of it, while the other factors vary."""

from __future__ import annotations

import math
from dataclasses import dataclass

from kdcache.report.collect import Row
from kdcache.report.comparable import Comparison
from kdcache.report.judged import AFTER
from kdcache.report.recipes import Base, value_at, value_text, varied


@dataclass(frozen=True)
class Level:
    """One value of a factor, and the perplexities of the rows that have it."""

    value: str
    points: tuple[tuple[str, float], ...]

    @property
    def mean(self) -> float:
        """Mean perplexity of its rows."""
        return sum(p for _, p in self.points) / len(self.points)


@dataclass(frozen=True)
class Effect:
    """A factor over rows that may be compared; ``among`` names them where there are others."""

    factor: str
    levels: tuple[Level, ...]
    among: str = ""

    @property
    def title(self) -> str:
        """The factor, and among which rows."""
        return self.factor + (f" ({self.among})" if self.among else "")


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
            for factor in factors.get(base.file) or varied(base):
                levels = _levels(own, factor)
                if len(levels) > 1:
                    found.append(Effect(factor, levels, ", ".join(names)))
    return found


def _levels(rows: list[Row], factor: str) -> tuple[Level, ...]:
    groups: dict[str, tuple[object, list[tuple[str, float]]]] = {}
    for row in rows:
        value = value_at(row.recipe or {}, factor)
        perplexity = row.score(AFTER, "perplexity")
        assert perplexity is not None
        groups.setdefault(value_text(value), (value, []))[1].append((row.name, perplexity))
    ordered = sorted(groups.items(), key=lambda item: _order(item[1][0], item[0]))
    return tuple(Level(text, tuple(points)) for text, (_, points) in ordered)


def _order(value: object, text: str) -> tuple[int, float, str]:
    """Numbers by size before everything else by spelling."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return (0, float(value), "")
    return (1, 0.0, text)
