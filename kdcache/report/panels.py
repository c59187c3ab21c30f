"""What the figures of a report show: bars, traces, evaluation curves, effects. Each panel draws on axes it is given."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, TypeGuard

from kdcache.report.blocks import Figure, Panel
from kdcache.report.collect import Row
from kdcache.report.comparable import Comparison
from kdcache.report.drawing import short
from kdcache.report.effects import Effect
from kdcache.report.leaderboard import figure_text, rank
from kdcache.report.palette import FAINT, LINE, SERIES
from kdcache.report.run_page import SMOOTHING_STEPS, TRACES, smoothed
from kdcache.run_record import AFTER, BEFORE, TEACHER

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Points = list[tuple[float, float]]
_KINDS = {TEACHER: SERIES[2], BEFORE: FAINT, AFTER: SERIES[0]}
_MOST_POINTS = 240
_MOST_PANELS = 60
_HIGHLIGHTED = 5
_LARGEST = 1e100  # what lies beyond no axis shows
_WIDE_RANGE = 20.0
# Numbers that are drawn as places on an axis and not where they lie.
_MOST_CATEGORIES = 6


def bars(rows: Sequence[Row], comparison: Comparison) -> Figure:
    """Perplexity and loss of teacher, students before and students after."""
    shown = [(r.name, r.model, r.row) for r in comparison.references()]
    shown += [(row.name, AFTER, row) for row in sorted(rows, key=rank)]
    panels = []
    for key, label in (("perplexity", "perplexity"), ("loss", "loss, nats per token")):
        values = [(name, model, row.score(model, key)) for name, model, row in shown]
        told = "; ".join(f"{name} {figure_text(v)}" for name, _, v in values if v is not None)
        panels.append(Panel(label, f"Bars of {label}: {told}.", _Bars(values), 4.0, 0.6 + 0.22 * len(values)))
    caption = (
        "Teacher against students, before and after training; rows without a bar have not finished or have failed."
    )
    return Figure("scores", caption, tuple(panels), tuple((color, name) for name, color in _KINDS.items()), columns=2)


def traces(rows: Sequence[Row]) -> Figure | None:
    """Total loss, cross-entropy and divergence of every row while it trained, one small panel each on the same axes."""
    every = [(row, parts) for row in sorted(rows, key=rank) if (parts := _traces(row.log))]
    logged = every[:_MOST_PANELS]
    if not logged:
        return None
    everything = [v for _, parts in logged for _, points in parts for _, v in points]
    top = 1.05 * _percentile(everything, 0.995)
    panels: list[Panel] = []
    key: dict[str, str] = {}
    for row, parts in logged:
        key |= {_COLORS[name]: name for name, _ in parts}
        ends = ", ".join(f"{name} from {points[0][1]:.3g} to {points[-1][1]:.3g}" for name, points in parts)
        panels.append(Panel(row.name, f"Training of {row.name}: {ends}.", _Traces(parts, top), 3.6, 2.3))
    caption = (
        "Training, nats per token over optimizer steps: as logged (light), and the mean of the last steps over it."
    )
    if len(every) > len(logged):
        caption += f" The best {len(logged)} of {len(every)} rows."
    return Figure("training", caption, tuple(panels), tuple(key.items()))


def evaluation_curve(rows: Sequence[Row]) -> Figure | None:
    """Perplexity on the validation split while the rows trained; the best rows in colour."""
    curves = []
    for row in sorted(rows, key=rank):
        points = _points(row.log, "eval_perplexity")
        if points:
            curves.append((row.name, points))
    if not curves:
        return None
    ends = "; ".join(f"{name} {figure_text(points[-1][1])} at step {points[-1][0]:g}" for name, points in curves)
    panel = Panel("validation perplexity", f"Validation perplexity over steps: {ends}.", _Curves(curves), 4.4, 2.8)
    best = curves[:_HIGHLIGHTED]
    key = [(SERIES[i], name) for i, (name, _) in enumerate(best)] + (
        [(LINE, "others")] if len(curves) > len(best) else []
    )
    return Figure(
        "evaluation", "Perplexity on the validation split over optimizer steps.", (panel,), tuple(key), columns=1
    )


def effect_figure(found: Sequence[Effect]) -> Figure | None:
    """A panel for each factor."""
    if not found:
        return None
    panels = []
    for effect in found:
        if effect.alone:
            told = "; ".join(
                f"{level.value}: mean {figure_text(level.mean)} of {len(level.points)}" for level in effect.levels
            )
        else:
            points = [p for level in effect.levels for _, p in level.points]
            told = f"{len(points)} rows from {figure_text(min(points))} to {figure_text(max(points))}"
        panels.append(Panel(effect.title, f"Perplexity by {effect.title}: {told}.", _Effect(effect), 3.6, 2.6))
    caption = "Perplexity by each factor: a point for every row, and a line through the means where rows differ in nothing else."
    return Figure("effects", caption, tuple(panels), ((SERIES[0], "rows"), (SERIES[1], "mean")))


class _Bars:
    def __init__(self, values: Sequence[tuple[str, str, float | None]]) -> None:
        self._values = values

    def __call__(self, axes: Axes) -> None:
        drawn = [v for _, _, v in self._values if _drawable(v)]
        wide = bool(drawn) and min(drawn) > 0 and max(drawn) > _WIDE_RANGE * min(drawn)
        for place, (_, model, value) in enumerate(self._values):
            if not _drawable(value):
                axes.text(
                    0.01,
                    place,
                    "none" if value is None else str(value),
                    va="center",
                    color=FAINT,
                    transform=axes.get_yaxis_transform(),
                )
                continue
            axes.barh(place, value, height=0.7, color=_KINDS[model])
            axes.annotate(
                figure_text(value), (value, place), xytext=(3, 0), textcoords="offset points", va="center", fontsize=8
            )
        if wide:
            axes.set_xscale("log")
            axes.set_xlim(min(drawn) * 0.7, max(drawn) * 4)
        else:
            axes.margins(x=0.18)
        axes.set_yticks(range(len(self._values)), [short(name) for name, _, _ in self._values])
        axes.set_ylim(len(self._values) - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)


class _Traces:
    def __init__(self, parts: Sequence[tuple[str, Points]], top: float) -> None:
        self._parts = parts
        self._top = top

    def __call__(self, axes: Axes) -> None:
        for name, points in self._parts:
            steps, values = [p[0] for p in points], [p[1] for p in points]
            window = max(SMOOTHING_STEPS, round((max(steps) - min(steps)) / 20))
            means = smoothed(steps, values, window)
            color = _COLORS[name]
            axes.plot(*_thinned(steps, values), color=color, alpha=0.35, linewidth=0.8)
            axes.plot(*_thinned(steps, means), color=color, linewidth=1.6)
        axes.set_ylim(0, self._top)


class _Curves:
    def __init__(self, curves: Sequence[tuple[str, Points]]) -> None:
        self._curves = curves

    def __call__(self, axes: Axes) -> None:
        for place, (_, points) in reversed(list(enumerate(self._curves))):
            best = place < _HIGHLIGHTED
            axes.plot(
                [p[0] for p in points], [p[1] for p in points], color=SERIES[place] if best else LINE, marker="o", markersize=3,
                linewidth=1.6 if best else 1.0,
            )  # fmt: skip
        drawn = [v for _, points in self._curves for _, v in points if v > 0]
        if drawn and max(drawn) > _WIDE_RANGE * min(drawn):
            axes.set_yscale("log")
        axes.set_xlabel("optimizer step")


class _Effect:
    def __init__(self, effect: Effect) -> None:
        self._levels = effect.levels
        self._alone = effect.alone

    def __call__(self, axes: Axes) -> None:
        numbers = [level.number for level in self._levels if level.number is not None]
        if not self._alone and len(numbers) == len(self._levels) > _MOST_CATEGORIES:
            self._scatter(axes, numbers)
        else:
            self._categories(axes)
        drawn = [p for level in self._levels for _, p in level.points if _drawable(p) and p > 0]
        if drawn and max(drawn) > _WIDE_RANGE * min(drawn):
            axes.set_yscale("log")

    def _scatter(self, axes: Axes, numbers: list[float]) -> None:
        """Values of a search, where they lie."""
        for number, level in zip(numbers, self._levels, strict=True):
            points = [p for _, p in level.points if _drawable(p)]
            axes.plot([number] * len(points), points, "o", color=SERIES[0], alpha=0.6, markersize=5)
        if min(numbers) > 0 and max(numbers) > _WIDE_RANGE * min(numbers):
            axes.set_xscale("log")

    def _categories(self, axes: Axes) -> None:
        means = [level.mean for level in self._levels]
        for place, level in enumerate(self._levels):
            points = [p for _, p in level.points if _drawable(p)]
            axes.plot([place] * len(points), points, "o", color=SERIES[0], alpha=0.6, markersize=5)
        places = [i for i, mean in enumerate(means) if _drawable(mean) and self._alone]
        axes.plot(
            places, [means[i] for i in places], "_-", color=SERIES[1], markersize=16, markeredgewidth=2, linewidth=1
        )
        axes.set_xticks(range(len(means)), [short(level.value, 14) for level in self._levels])
        if len(means) > _MOST_CATEGORIES:
            axes.tick_params(axis="x", labelrotation=45)
        axes.set_xlim(-0.5, len(means) - 0.5)


_COLORS = {"total loss": FAINT, **{label: SERIES[1] if key == "ce" else SERIES[0] for key, label, _ in TRACES}}


def _traces(log: list[dict[str, float]]) -> list[tuple[str, Points]]:
    names = [("loss", "total loss"), *((key, label) for key, label, _ in TRACES)]
    return [(label, points) for key, label in names if (points := _points(log, key))]


def _points(log: list[dict[str, float]], key: str) -> Points:
    return [(row["step"], row[key]) for row in log if key in row and _drawable(row[key]) and _drawable(row["step"])]


def _thinned(steps: list[float], values: list[float]) -> tuple[list[float], list[float]]:
    """Every n-th point, and the last: more than a small panel shows would only make the page large."""
    stride = max(1, math.ceil(len(steps) / _MOST_POINTS))
    kept = [*range(0, len(steps) - 1, stride), len(steps) - 1]
    return [steps[i] for i in kept], [values[i] for i in kept]


def _percentile(values: Iterable[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] or 1.0


def _drawable(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value) and abs(value) < _LARGEST
