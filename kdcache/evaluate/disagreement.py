"""How far a cache is off its teacher, beside how far the teacher is off itself; `rescore` runs the teacher."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.cache import layout
from kdcache.cache.codec import CachedSequence, sequence_digest
from kdcache.cache.manifest import Plan
from kdcache.cache.rows import SparseRows

Numbers = NDArray[np.float64]
# The teacher's logits by row and id.
_Held = dict[tuple[int, int], float]

# How often chance alone brings an honest cache's draws into doubt, over all that is asked of them.
FALSE_ALARM = 1e-5
# Disagreement is explained up to so many times the control's: one sample of noise against another.
_FACTOR = 4.0
# Nats that another processor's float32 moves a number by; nothing can be taught by less.
_SLACK_NATS = 2.0**-9
# Share of entries that this moves across the border of what is kept, or a draw to its neighbour.
_SLACK_SHARE = 0.01
_HALF = 2.0**-11, 2.0**-25

COLUMNS = ("off by", "mean", "max", "beyond", "max", "control", "max", "fits")
NOT_COMPARED = "not compared: they were made under the parents' plans"


@dataclass(frozen=True)
class Scored:
    """A sequence as the teacher sees it: its numbers for what the cache holds, and what it would keep itself.

    ``drawn`` (``[kept rows, questions, 3]``): how far the draws are off what chance gives on average, by the questions of
    `draw_questions`; a bound of the variance of that; and how far one independent draw can move it.
    """

    label: Numbers
    head: Numbers
    tail: Numbers
    rest: Numbers
    drawn: Numbers
    own: SparseRows


@dataclass(frozen=True)
class Disagreement:
    """Sizes of one number's differences: how many there are, mean, 99th percentile, largest (0 where there are none)."""

    count: int
    mean: float
    p99: float
    largest: float

    @classmethod
    def of(cls, differences: Numbers) -> Disagreement:
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
class Drawing:
    """A number that is 0 on average where chance drew: its mean over rows, how far chance may take that, the control."""

    name: str
    rows: int
    mean: float
    chance: float
    control: float

    @classmethod
    def of(cls, name: str, first: Numbers, second: Numbers, *, alarm: float) -> Drawing:
        """Of two runs' ``[rows, 3]`` of `Scored`; chance goes further with a probability of at most ``alarm``.

        Bernstein's inequality: rows are independent, since each has its own uniform numbers, and bounded.
        """
        rows = len(first)
        if not rows:
            return cls(name, 0, 0.0, 0.0, 0.0)
        (mean, variance, _), again = first.mean(axis=0), second[:, 0].mean()
        log = math.log(2.0 / alarm)
        linear = log * float(first[:, 2].max()) / (3 * rows)
        chance = linear + math.sqrt(linear**2 + 2 * log * float(variance) / rows)
        return cls(name, rows, float(mean), chance, abs(float(mean - again)))

    @property
    def explained(self) -> bool:
        """Whether chance and the teacher's own noise explain it."""
        return abs(self.mean) <= self.chance + _FACTOR * self.control


@dataclass(frozen=True)
class Place:
    """A sequence of a cache: name of its split, and its number there."""

    split: str
    index: int


@dataclass(frozen=True)
class Rescore:
    """What running the teacher again showed; ``draws`` says whether they could be made again and compared."""

    teacher: str
    seed: int
    sequences: int
    positions: int
    looked_at: list[Place]
    draws: str
    measures: list[Measure]
    members: list[Membership]
    drawings: list[Drawing]

    @property
    def explained(self) -> bool:
        """Whether nothing that was compared is off by more than it may be."""
        return all(m.explained for group in (self.measures, self.members, self.drawings) for m in group)

    def as_record(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        record = asdict(self) | {"explained": self.explained}
        for name in ("measures", "members", "drawings"):
            for values, each in zip(record[name], getattr(self, name), strict=True):
                values["explained"] = each.explained
        return record

    def table(self) -> list[list[str]]:
        """Cells under `COLUMNS`: numbers in nats, then who is kept, as shares, then what chance gives on average."""
        cells = []
        for m in (m for m in self.measures if m.cache.count):
            numbers = (m.cache.mean, m.cache.largest, m.beyond.p99, m.beyond.largest, m.control.p99, m.control.largest)
            cells.append([m.name, *(f"{x:.4f}" for x in numbers), _verdict(m.explained)])
        for share in self.members:
            shares = (f"{share.cache:.2%}", "", "", "", f"{share.control:.2%}", "")
            cells.append([share.name, *shares, _verdict(share.explained)])
        if self.draws == NOT_COMPARED:
            cells.append(["other draws", "", "", "", "", "", "", "?"])
        for d in self.drawings:
            means = (f"{d.mean:+.4f}", "", f"{max(0.0, abs(d.mean) - d.chance):.4f}", "", f"{d.control:.4f}", "")
            cells.append([d.name, *means, _verdict(d.explained)])
        return cells


def draw_questions(plan: Plan) -> list[str]:
    """What is asked of draws: are small entries drawn too often, or some part of the vocabulary; is it the mass left over?"""
    if not plan.design(0).sampled:
        return []
    return ["drawn by size", "drawn by id", *(f"drawn mass {t:g}" for t in plan.selection.temperatures)]


def measures(plan: Plan, stored: list[CachedSequence], batched: list[Scored], alone: list[Scored]) -> list[Measure]:
    """Every number of the format: what is stored against the first run, and the second run against the first."""
    quantised = plan.selection.values == "quantised"
    head_step = layout.HEAD_STEP if quantised else None
    tail_step = layout.TAIL_STEP if quantised and plan.selection.tail_logits else None
    kinds: dict[str, tuple[str, Callable[[SparseRows], NDArray[np.float32]], Callable[[Numbers], Numbers]]] = {
        "label": ("label log-prob", lambda rows: rows.label_log_prob, _rounding(None)),
        "head": ("head logits", lambda rows: rows.head_logits, _rounding(head_step)),
        "tail": ("tail logits", lambda rows: rows.tail_logits, _rounding(tail_step)),
        "rest": ("rest log-odds", lambda rows: rows.rest[rows.kept].ravel(), _rest_rounding(plan)),
    }
    found = []
    for kind, (title, of_rows, bound) in kinds.items():
        held = _joined(of_rows(s.rows) for s in stored)
        first, second = (_joined(getattr(s, kind) for s in run) for run in (batched, alone))
        floor = _lowest(kind, head_step if kind == "head" else tail_step)
        first, second = np.maximum(first, floor), np.maximum(second, floor)
        off = np.abs(held - first)
        beyond = np.maximum(off - bound(first), 0.0)
        control = Disagreement.of(np.abs(first - second))
        found.append(Measure(title, Disagreement.of(off), Disagreement.of(beyond), control))
    return found


def members(plan: Plan, stored: list[CachedSequence], batched: list[Scored], alone: list[Scored]) -> list[Membership]:
    """Who is in the head, which rows are left empty and, where draws can be made again, who was drawn.

    The rows of a derived cache may have lost their smallest entries after these were rounded, or later tokens of the text
    after positions were selected: entries a step from the border, and rows left empty, are then as good as equal.
    """
    derived = plan.derived is not None
    quantised = plan.selection.values == "quantised"
    kinds = ["head"] + (["tail"] if plan.design(0).sampled and not derived else [])
    found = []
    for kind in kinds:
        total = held_alone = twice_alone = 0
        for sequence, first, second in zip(stored, batched, alone, strict=True):
            rows, runs = sequence.rows, [first.own, second.own]
            if derived:
                runs = [own.emptied(rows.kept) for own in runs]
            held = _entries(rows, kind, getattr(first, kind))
            own, again = (_entries(r, kind, getattr(r, f"{kind}_logits")) for r in runs)
            near: dict[int, tuple[float, float]] = {}
            for (row, _), logit in own.items() if derived else ():
                lowest = min(logit, near[row][0]) if row in near else logit
                near[row] = lowest, _SLACK_NATS + (layout.HEAD_STEP if quantised else 2 * abs(lowest) * _HALF[0])
            total += len(held)
            held_alone += _apart(held, own, near)
            twice_alone += _apart(own, again, near)
        title = {"head": "other heads", "tail": "other draws"}[kind]
        found.append(Membership(title, total, held_alone / max(1, 2 * total), twice_alone / max(1, 2 * total)))
    return found


def drawings(plan: Plan, stored: list[CachedSequence], batched: list[Scored], alone: list[Scored]) -> list[Drawing]:
    """Whether draws are such as chance makes, whoever's numbers were behind them; equal texts, equal numbers, count once."""
    questions = draw_questions(plan)
    distinct = list({sequence_digest(s.token_ids, s.targets): i for i, s in enumerate(stored)}.values())
    first, second = (np.concatenate([run[i].drawn for i in distinct]) for run in (batched, alone))
    alarm = FALSE_ALARM / max(1, len(questions))
    return [Drawing.of(name, first[:, n], second[:, n], alarm=alarm) for n, name in enumerate(questions)]


def _rounding(step: float | None) -> Callable[[Numbers], Numbers]:
    """What the format may be off by (``cache_format.md``, section 4): half a step, or half precision's rounding."""
    if step is not None:
        return lambda x: np.full_like(x, step / 2)
    return lambda x: np.maximum(np.abs(x) * _HALF[0], _HALF[1])


def _rest_rounding(plan: Plan) -> Callable[[Numbers], Numbers]:
    """The same of the rest, row by row all temperatures; more where entries may have joined it after they were rounded."""
    if plan.derived is None or plan.design(0).sampled:
        return _rounding(layout.REST_STEP)
    if plan.selection.values == "quantised":
        moved = layout.HEAD_STEP / np.array(plan.selection.temperatures)
        return lambda x: layout.REST_STEP + np.resize(moved, len(x))
    # An entry's logarithm is off by a share of itself, and on average over some mass that is log V - log(mass) at most.
    width = 2 * math.log(plan.tokenizer.vocab_size)
    return lambda x: layout.REST_STEP + _HALF[0] * (width + np.abs(x))


def _lowest(kind: str, step: float | None) -> float:
    """What everything below is stored as."""
    if kind == "rest":
        return -layout.REST_LIMIT
    return -layout.HALF_LIMIT if kind == "label" or step is None else -layout.LEVEL_LIMIT * step


def _joined(parts: Iterable[NDArray[Any]]) -> Numbers:
    return np.concatenate([p.astype(np.float64) for p in parts])


def _entries(rows: SparseRows, kind: str, logits: NDArray[Any]) -> _Held:
    owners = np.repeat(np.arange(len(rows)), getattr(rows, kind)).tolist()
    return dict(zip(zip(owners, getattr(rows, f"{kind}_ids").tolist(), strict=True), logits.tolist(), strict=True))


def _apart(one: _Held, other: _Held, near: Mapping[int, tuple[float, float]]) -> int:
    """How many entries only one holds, but for those ``near`` a row's border: (border, distance)."""
    either = one | other
    lone = ((row, either[row, i]) for row, i in one.keys() ^ other.keys())
    return sum(abs(logit - border) > step for row, logit in lone for border, step in [near.get(row, (math.inf, 0.0))])


def _verdict(explained: bool) -> str:
    return "yes" if explained else "NO"
