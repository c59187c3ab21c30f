"""Figures of `paper_mini.py` in the shape of the reference paper's."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from paper_mini_page import MAIN, SUMMED_KL, Results, Row

from kdcache.report import smoothed

COLORS = {"sum": "C3", "A1": "C0", "CE": "C1", SUMMED_KL: "0.4"}
TRACED = {"ce": "cross-entropy, nats per token", "kl": "KL to the teacher at T, nats per token"}


def figures(results: Results, stem: Path) -> list[Path]:
    """Draw all three; returns their paths, ``stem`` and a number."""
    import matplotlib

    matplotlib.use("Agg")
    drawn = (_totals(results), _bars(results), _parts(results))
    paths = [stem.with_name(f"{stem.name}-{number}.png") for number in (1, 2, 3)]
    from matplotlib import pyplot

    for figure, path in zip(drawn, paths, strict=True):
        figure.savefig(path, dpi=110)
        pyplot.close(figure)
    return paths


def _totals(results: Results) -> Any:
    """Total loss: a panel for each way of training, since a sum and a mean share no scale."""
    from matplotlib import pyplot

    names = [name for name in MAIN if results.of(name)]
    figure, axes = pyplot.subplots(1, len(names), figsize=(4.4 * len(names), 3.6), squeeze=False, layout="constrained")
    for axis, name in zip(axes[0], names, strict=True):
        for number, row in enumerate(results.of(name)):
            steps, values = _trace(row, "loss")
            if number == 0:
                axis.plot(steps, values, color="0.8", linewidth=0.8, label="seed 0, as logged")
            label = "mean of 10 steps" if number == 0 else None
            axis.plot(steps, smoothed(steps, values), color=COLORS[name], alpha=1 - 0.3 * number, label=label)
        axis.set_title(MAIN[name], fontsize=10)
        axis.set_xlabel("optimizer step")
        axis.legend(frameon=False, fontsize=8)
        _plain(axis)
    axes[0][0].set_ylabel("total loss")
    return figure


def _bars(results: Results) -> Any:
    """Loss and perplexity of teacher, student before, and the main rows."""
    from matplotlib import pyplot

    bars: list[tuple[str, str, dict[str, list[float]]]] = []
    for model, color in (("teacher", "0.35"), ("student before", "0.7")):
        bars.append((model, color, {k: [results.score(model, k)] for k in ("loss", "perplexity")}))
    short = {"sum": "summed,\nno clipping", "A1": "averaged,\nclipped (A1)", "CE": "CE alone"}
    for name in MAIN:
        if rows := results.of(name):
            bars.append((short[name], COLORS[name], {k: [r.after[k] for r in rows] for k in ("loss", "perplexity")}))
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for axis, key in zip(axes, ("loss", "perplexity"), strict=True):
        for place, (_, color, values) in enumerate(bars):
            own = values[key]
            mean = statistics.mean(own)
            axis.bar(place, mean, color=color, width=0.7)
            if len(own) > 1:
                axis.errorbar(place, mean, [[mean - min(own)], [max(own) - mean]], color="k", capsize=4)
            axis.annotate(
                f"{mean:.3f}" if key == "loss" else f"{mean:.2f}", (place, mean), (0, 6), textcoords="offset points", ha="center",
                fontsize=8,
            )  # fmt: skip
        axis.set_xticks(range(len(bars)), [name for name, _, _ in bars], fontsize=8)
        axis.set_ylabel("loss, nats per token" if key == "loss" else "perplexity")
        axis.margins(y=0.12)
        _plain(axis)
    return figure


def _parts(results: Results) -> Any:
    """CE and KL per token: the mean over seeds of each way of training, smoothed."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    # Where two ways of training are one line, the dashes of the second show it.
    drawn = {"CE": "-", "A1": "-", "sum": (0, (4, 4)), SUMMED_KL: "-"}
    titles = {**MAIN, SUMMED_KL: "KL alone summed, without clipping"}
    for axis, (key, label) in zip(axes, TRACED.items(), strict=True):
        for name, style in drawn.items():
            steps, values = _mean_trace(results.of(name), key)
            if steps:
                axis.plot(
                    steps, smoothed(steps, values), color=COLORS[name], linestyle=style, linewidth=1.4,
                    label=titles[name] if key == "ce" else None,
                )  # fmt: skip
        axis.set_xlabel("optimizer step")
        axis.set_ylabel(label)
        _plain(axis)
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=9)
    return figure


def _mean_trace(rows: list[Row], key: str) -> tuple[list[float], list[float]]:
    """The mean over rows at the steps that all of them logged."""
    traces = [dict(zip(*_trace(row, key), strict=True)) for row in rows]
    steps = sorted(set.intersection(*(set(trace) for trace in traces))) if traces else []
    return steps, [statistics.mean(trace[step] for trace in traces) for step in steps]


def _trace(row: Row, key: str) -> tuple[list[float], list[float]]:
    lines = [line for line in row.log if key in line and "loss" in line]
    return [line["step"] for line in lines], [line[key] for line in lines]


def _plain(axis: Any) -> None:
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
