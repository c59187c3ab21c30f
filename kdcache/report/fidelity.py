"""Fidelity reports -> tables and the plot of bytes against error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from kdcache.errors import StorageError
from kdcache.markdown import table

if TYPE_CHECKING:
    from kdcache.evaluate.fidelity_run import FidelityReport

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
            + table(FIDELITY_COLUMNS, fidelity_rows(report)) + "\n" + table(PARTS_COLUMNS, parts_rows(report))
        )  # fmt: skip
        paths[1].write_text(json.dumps(report.as_record(), indent=1))
        if len(paths) > 2:
            fidelity_plot(report, paths[2])
    except OSError as exc:
        raise StorageError(f"cannot write to {folder}: {exc.strerror or exc}") from exc
    return paths
