"""Run records -> tables and plots."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kdcache.errors import StorageError

if TYPE_CHECKING:
    from kdcache.student.record import RunRecord

SMOOTHING_STEPS = 10
_TRACES = (
    ("ce", "cross-entropy", "C1"),
    ("kl", "KL to teacher, at T", "C2"),
    ("soft_ce", "soft cross-entropy, at T", "C2"),
    ("reverse_kl", "reverse KL, at T", "C2"),
    ("jsd", "generalised JSD, at T", "C2"),
)


def result_rows(scores: dict[str, dict[str, float]]) -> list[tuple[str, str, str, str, str]]:
    """Model, loss, perplexity, KL to the teacher and tokens, as text."""
    return [
        (name, f"{s['loss']:.4f}", f"{s['perplexity']:.3f}", f"{s['kl_to_teacher']:.4f}", f"{int(s['tokens']):,}")
        for name, s in scores.items()
    ]


RESULT_COLUMNS = ("model", "loss", "perplexity", "KL to teacher", "tokens")


def result_markdown(record: RunRecord) -> str:
    """The result table as Markdown, with what it was measured on."""
    lines = [
        "| " + " | ".join(RESULT_COLUMNS) + " |",
        "|---|---:|---:|---:|---:|",
        *("| " + " | ".join(row) + " |" for row in result_rows(record.scores)),
        "",
        "Loss in nats per token, summed over the response tokens of the cache's validation split; the teacher's row comes",
        "from the cache alone. KL(teacher || student) at T = 1, with the mass outside the cached entries as one bucket.",
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

    steps = [row["step"] for row in log]
    figure, (total, parts) = pyplot.subplots(2, 1, figsize=(7, 6), sharex=True, layout="constrained")
    losses = [row["loss"] for row in log]
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
