"""Reward, length and KL over the steps of a reinforcement, as PNG and SVG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kdcache.cache.files import write_file
from kdcache.reinforce.record import PLOT
from kdcache.report.blocks import Figure, Panel
from kdcache.report.drawing import figure_files
from kdcache.report.palette import FAINT, SERIES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Log = Sequence[dict[str, float]]
Curve = tuple[str, str, list[tuple[float, float]]]
_PARTS = (
    ("reward", "reward", FAINT),
    ("reward_correct", "right", SERIES[0]),
    ("reward_format", "well-formed", SERIES[1]),
    ("reward_length", "length penalty", SERIES[2]),
)
_PANELS = (("length", "completion, tokens"), ("kl", "KL to the reference, nats per token"))


def write_plot(folder: Path, logs: Sequence[tuple[str, Log]]) -> list[Path]:
    """Write reward.png and reward.svg: the parts of the reward of one run, or the rewards of several.

    Args:
        folder: of the run, or of the runs.
        logs: name and log of each.
    """
    logs = [(name, log) for name, log in logs if log]
    if not logs:
        return []
    alone = len(logs) == 1
    if alone:
        rewards = [(label, color, _points(logs[0][1], key)) for key, label, color in _PARTS]
        key = tuple((color, label) for label, color, points in rewards if points)
    else:
        rewards = [(name, SERIES[i % len(SERIES)], _points(log, "reward")) for i, (name, log) in enumerate(logs)]
        key = tuple((color, name) for name, color, _ in rewards)
    panels = [_panel("mean reward of a step", rewards)]
    for column, title in _PANELS:
        curves = [(name, SERIES[i % len(SERIES)], _points(log, column)) for i, (name, log) in enumerate(logs)]
        if any(points for _, _, points in curves):
            panels.append(_panel(title, [(name, FAINT if alone else color, points) for name, color, points in curves]))
    figure = Figure(PLOT, "Reward, length and KL over optimizer steps.", tuple(panels), key)
    written = []
    for name, content in figure_files(figure).items():
        write_file(folder / name, content)
        written.append(folder / name)
    return written


def _panel(title: str, curves: Sequence[Curve]) -> Panel:
    drawn = [curve for curve in curves if curve[2]]
    ends = ", ".join(f"{name} from {points[0][1]:.3g} to {points[-1][1]:.3g}" for name, _, points in drawn)
    return Panel(title, f"{title}: {ends}.", _Curves(drawn), 3.8, 2.6)


class _Curves:
    def __init__(self, curves: Sequence[Curve]) -> None:
        self._curves = curves

    def __call__(self, axes: Axes) -> None:
        for _, color, points in self._curves:
            steps, values = [p[0] for p in points], [p[1] for p in points]
            axes.plot(steps, values, color=color, alpha=0.3, linewidth=0.8)
            axes.plot(steps, _smooth(values), color=color, linewidth=1.6)
        axes.set_xlabel("optimizer step")
        axes.margins(x=0.02)


def _smooth(values: list[float]) -> list[float]:
    """The mean of each value and those before it, as many as a tenth of all."""
    window = max(1, len(values) // 10)
    return [sum(part) / len(part) for i in range(len(values)) if (part := values[max(0, i + 1 - window) : i + 1])]


def _points(log: Log, column: str) -> list[tuple[float, float]]:
    return [(row["step"], row[column]) for row in log if column in row]
