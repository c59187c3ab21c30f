"""Run records and fidelity reports -> tables and plots."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from kdcache.errors import StorageError

if TYPE_CHECKING:
    from kdcache.evaluate.fidelity_run import FidelityReport
    from kdcache.student.record import RunRecord

SMOOTHING_STEPS = 10
_TRACES = (
    ("ce", "cross-entropy", "C1"),
    ("kl", "KL to teacher, at T", "C2"),
    ("soft_ce", "soft cross-entropy, at T", "C2"),
    ("reverse_kl", "reverse KL, at T", "C2"),
    ("jsd", "generalised JSD, at T", "C2"),
)


def result_rows(scores: dict[str, dict[str, float]]) -> list[tuple[str, ...]]:
    """Model, loss, perplexity, KL to the teacher and tokens, as text."""
    return [
        (name, f"{s['loss']:.4f}", f"{s['perplexity']:.3f}", f"{s['kl_to_teacher']:.4f}", f"{int(s['tokens']):,}")
        for name, s in scores.items()
    ]


def result_columns(scores: dict[str, dict[str, float]]) -> tuple[str, ...]:
    """Heads of `result_rows`; the KL's temperature is named where it is not 1."""
    t = max(s.get("kl_temperature", 1.0) for s in scores.values())
    return ("model", "loss", "perplexity", "KL to teacher" + ("" if t == 1 else f", T = {t:g}"), "tokens")


def kl_note(scores: dict[str, dict[str, float]]) -> str:
    """What the column of KLs is."""
    if any(s.get("kl_is_bound") for s in scores.values()):
        return "KL(teacher || student) is a lower bound: the mass outside the cache's entries counts as one bucket."
    return "KL(teacher || student) is an unbiased estimate of the full one, from the cache's drawn entries."


def result_markdown(record: RunRecord) -> str:
    """The result table as Markdown, with what it was measured on."""
    lines = [
        _markdown(result_columns(record.scores), result_rows(record.scores)),
        "Loss in nats per token, summed over the response tokens of the cache's validation split; the teacher's row comes",
        f"from the cache alone. {kl_note(record.scores)}",
        f"Cache {record.values['cache_id'][:12]}, {record.values['steps']} steps, {record.values['seconds']:.0f} s"
        + (f" since step {record.values['resumed_at']}." if record.values["resumed_at"] else "."),
    ]
    return "\n".join(lines) + "\n"


def smoothed(steps: list[float], values: list[float], window: int = SMOOTHING_STEPS) -> list[float]:
    """Mean over the log lines of the last ``window`` optimizer steps."""
    result = []
    for i, step in enumerate(steps):
        recent = [v for s, v in zip(steps[: i + 1], values[: i + 1], strict=True) if s > step - window]
        result.append(sum(recent) / len(recent))
    return result


def loss_plot(log: list[dict[str, float]], path: Path, *, title: str) -> None:
    """Total loss (smoothed over 10 steps) above, CE and KL per token below.

    Raises:
        ValueError: the log is empty.
    """
    if not log:
        raise ValueError("the log has no lines to plot")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    trained = [row for row in log if "loss" in row]
    steps = [row["step"] for row in trained]
    figure, (total, parts) = pyplot.subplots(2, 1, figsize=(7, 6), sharex=True, layout="constrained")
    losses = [row["loss"] for row in trained]
    total.plot(steps, losses, color="0.75", linewidth=1, label="as logged")
    total.plot(steps, smoothed(steps, losses), color="C0", label=f"mean of {SMOOTHING_STEPS} steps")
    total.set_ylabel("total loss")
    total.set_title(title)
    total.legend(frameon=False)
    other = parts.twinx()
    for key, label, color in _TRACES:
        points = [(row["step"], row[key]) for row in log if key in row]
        if points:
            axis = parts if key == "ce" else other
            axis.plot([p[0] for p in points], [p[1] for p in points], color=color)
            axis.set_ylabel(f"{label}, nats per token", color=color)
    evaluated = [(row["step"], row["eval_loss"]) for row in log if "eval_loss" in row]
    if evaluated:
        label = "CE on the validation split"
        parts.plot(
            [p[0] for p in evaluated], [p[1] for p in evaluated], color="k", marker="o", markersize=3, label=label
        )
        parts.legend(frameon=False)
    parts.set_xlabel("optimizer step")
    other.spines["top"].set_visible(False)
    for axis in (total, parts):
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def write_pages(record: RunRecord) -> list[Path]:
    """Write table.md and loss.png into the run directory; returns their paths.

    Raises:
        StorageError: they cannot be written.
    """
    from kdcache.student.log import read_log
    from kdcache.student.record import RunDirectory

    run = RunDirectory(record.output)
    try:
        run.table.write_text(result_markdown(record))
        log = read_log(run.log) if run.log.exists() else []
        if log:
            loss_plot(log, run.plot, title=f"{record.output.name}: training loss")
    except OSError as exc:
        raise StorageError(f"cannot write the pages of {record.output}: {exc.strerror or exc}") from exc
    return [run.table, *([run.plot] if log else [])]


FIDELITY_COLUMNS = (
    "setting", "T", "bytes", "mass", "p1", "KL", "p99", "TV", "top-1", "cos", "error",
)  # fmt: skip
PARTS_COLUMNS = ("bytes per position", "entries", "in all", "ids", "values", "partition", "text")


def fidelity_rows(report: FidelityReport) -> list[tuple[str, ...]]:
    """A row for each setting and temperature; temperatures that a setting cannot give are left out."""
    rows: list[tuple[str, ...]] = []
    for setting in report.settings:
        chosen = setting is report.settings[0]
        for f in setting.figures:
            if not chosen and f.temperature not in report.declared:
                continue
            rows.append((
                setting.name, f"{f.temperature:g}", f"{setting.bytes_per_position:.1f}",
                f"{f.kept_mass:.3f}", f"{f.kept_mass_p1:.2f}", f"{f.kl:.3f}", f"{f.kl_p99:.2f}",
                f"{f.total_variation:.2f}", f"{f.top_1:.3f}",
                "-" if f.gradient_cosine is None else f"{f.gradient_cosine:.3f}",
                "-" if f.gradient_error is None else f"{f.gradient_error:.4f}",
            ))  # fmt: skip
    return rows


def parts_rows(report: FidelityReport) -> list[tuple[str, ...]]:
    """Where the bytes of each setting go; parts are compressed alone, so they add up only about."""
    return [
        (s.name, *(f"{v:.1f}" for v in (s.entries, s.bytes_per_position, *s.parts.values()))) for s in report.settings
    ]


def fidelity_plot(report: FidelityReport, path: Path) -> None:
    """Bytes per position against error (of the gradient where there is a student, else KL), a panel per temperature."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    gradient = report.student is not None
    figure, axes = pyplot.subplots(
        1,
        len(report.declared),
        figsize=(5.2 * len(report.declared), 4.4),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, t in zip(axes[0], report.declared, strict=True):
        series: dict[str, list[tuple[float, float]]] = {}
        for setting in report.settings:
            for f in setting.figures:
                error = f.gradient_error if gradient else f.kl
                if f.temperature == t and error is not None:
                    series.setdefault(setting.name.rstrip("0123456789 B"), []).append(
                        (setting.bytes_per_position, error)
                    )
        for name, points in series.items():
            points.sort()
            chosen = name == report.settings[0].name
            axis.plot(
                [p[0] for p in points], [p[1] for p in points], marker="*" if chosen else "o", linestyle="-" if len(points) > 1 else "",
                markersize=16 if chosen else 5, color="black" if chosen else None, fillstyle="none" if chosen else "full",
                zorder=3 if chosen else 2, label=name,
            )  # fmt: skip
        axis.set(xscale="log", yscale="log", title=f"T = {t:g}", xlabel="bytes per position")
        ticks = [b for b in (16, 24, 42, 64, 96, 192, 384) if axis.get_xlim()[0] <= b <= axis.get_xlim()[1]]
        axis.set_xticks(ticks, [str(b) for b in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3, which="both")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("error of the student's gradient" if gradient else "KL(full || rebuilt), nats")
    axes[0][0].legend(frameon=False)
    figure.suptitle(report.title, fontsize="medium")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def write_fidelity(report: FidelityReport, folder: Path) -> list[Path]:
    """Write fidelity.md, fidelity.json and, for several settings, fidelity.png; returns their paths.

    Raises:
        StorageError: they cannot be written.
    """
    # One setting alone makes no curve.
    ends = ("md", "json", "png") if len(report.settings) > 1 else ("md", "json")
    paths = [folder / f"fidelity.{end}" for end in ends]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        paths[0].write_text(
            f"{report.title}.\n\n"
            + _markdown(FIDELITY_COLUMNS, fidelity_rows(report)) + "\n" + _markdown(PARTS_COLUMNS, parts_rows(report))
        )  # fmt: skip
        paths[1].write_text(json.dumps(report.as_record(), indent=1))
        if len(paths) > 2:
            fidelity_plot(report, paths[2])
    except OSError as exc:
        raise StorageError(f"cannot write to {folder}: {exc.strerror or exc}") from exc
    return paths


def _markdown(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|---|" + "---:|" * (len(columns) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"
