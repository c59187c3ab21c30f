"""How far a cache is off its teacher, beside how far the teacher is off itself; `rescore` fills these in."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Disagreement is explained up to so many times the control's: one sample of noise against another.
_FACTOR = 4.0
# Nats that another processor's float32 moves a number by; nothing can be taught by less.
_SLACK_NATS = 2.0**-9
# Share of entries that this moves across the border of what is kept, or a draw to its neighbour.
_SLACK_SHARE = 0.01

COLUMNS = ("off by", "mean", "max", "beyond", "max", "control", "max", "fits")


@dataclass(frozen=True)
class Disagreement:
    """Sizes of one number's differences: how many there are, mean, 99th percentile, largest (0 where there are none)."""

    count: int
    mean: float
    p99: float
    largest: float

    @classmethod
    def of(cls, differences: NDArray[np.float64]) -> Disagreement:
        """Of absolute differences."""
        if not len(differences):
            return cls(0, 0.0, 0.0, 0.0)
        return cls(
            len(differences), float(differences.mean()), float(np.quantile(differences, 0.99)), float(differences.max())
        )


@dataclass(frozen=True)
class Measure:
    """One number of the format: cache against teacher, the same beyond what the format may round, teacher against itself."""

    name: str
    cache: Disagreement
    beyond: Disagreement
    control: Disagreement

    @property
    def explained(self) -> bool:
        """Whether rounding and the teacher's own noise explain what the cache is off by."""
        found, noise = self.beyond, self.control
        pairs = ((found.mean, noise.mean), (found.p99, noise.p99), (found.largest, noise.largest))
        return all(a <= _SLACK_NATS + _FACTOR * b for a, b in pairs)


@dataclass(frozen=True)
class Membership:
    """Entries that only one of two holds, as a share of all: cache against teacher, and teacher against itself."""

    name: str
    entries: int
    cache: float
    control: float

    @property
    def explained(self) -> bool:
        """Whether the teacher's own noise explains it."""
        return self.cache <= _SLACK_SHARE + _FACTOR * self.control


@dataclass(frozen=True)
class Rescore:
    """What running the teacher again showed."""

    teacher: str
    sequences: int
    positions: int
    measures: list[Measure]
    members: list[Membership]

    @property
    def explained(self) -> bool:
        """Whether the cache is what its teacher says."""
        return all(self._each())

    def as_record(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        record = asdict(self) | {"explained": self.explained}
        for values, explained in zip([*record["measures"], *record["members"]], self._each(), strict=True):
            values["explained"] = explained
        return record

    def table(self) -> list[list[str]]:
        """Cells under `COLUMNS`: numbers in nats, then who is kept, as shares."""
        cells = []
        for m in self.measures:
            if not m.cache.count:
                continue
            numbers = (m.cache.mean, m.cache.largest, m.beyond.p99, m.beyond.largest, m.control.p99, m.control.largest)
            cells.append([m.name, *(f"{x:.4f}" for x in numbers), _verdict(m.explained)])
        for share in self.members:
            shares = (f"{share.cache:.2%}", "", "", "", f"{share.control:.2%}", "")
            cells.append([share.name, *shares, _verdict(share.explained)])
        return cells

    def _each(self) -> list[bool]:
        return [m.explained for m in self.measures] + [m.explained for m in self.members]


def _verdict(explained: bool) -> str:
    return "yes" if explained else "NO"
