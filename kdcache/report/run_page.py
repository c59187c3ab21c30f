"""A finished run's own pages: table.md and loss.png, and the table that commands print."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdcache.errors import StorageError, TrainingError
from kdcache.markdown import table
from kdcache.run_record import number

if TYPE_CHECKING:
    from kdcache.run_record import RunRecord

SMOOTHING_STEPS = 10
TRACES = (
    ("ce", "cross-entropy", "C1"),
    ("kl", "KL to teacher, at T", "C2"),
    ("soft_ce", "soft cross-entropy, at T", "C2"),
    ("reverse_kl", "reverse KL, at T", "C2"),
    ("jsd", "generalised JSD, at T", "C2"),
)


def result_rows(scores: dict[str, dict[str, float]]) -> list[tuple[str, ...]]:
    """Model, loss, perplexity, KL to the teacher and tokens, as text."""
    return [
        (
            name,
            f"{s['loss']:.4f}",
            f"{s['perplexity']:.3f}",
            _told(s, "kl_to_teacher", ".4f"),
            _told(s, "tokens", ",.0f"),
        )
        for name, s in scores.items()
    ]


def _told(values: dict[str, Any], key: str, form: str) -> str:
    """A figure that a record of another version may lack."""
    found = number(values.get(key))
    return "-" if found is None else format(found, form)


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
    resumed = record.values.get("resumed_at")
    lines = [
        table(result_columns(record.scores), result_rows(record.scores)),
        "Loss in nats per token, summed over the response tokens of the cache's validation split; the teacher's row comes",
        f"from the cache alone. {kl_note(record.scores)}",
        f"Cache {record.values['cache_id'][:12]}, {record.values.get('steps', 'unknown')} steps, "
        f"{_told(record.values, 'seconds', '.0f')} s" + (f" since step {resumed}." if resumed else "."),
    ]
    return "\n".join(lines) + "\n"


def smoothed(steps: list[float], values: list[float], window: int = SMOOTHING_STEPS) -> list[float]:
    """Mean over the log lines of the last ``window`` optimizer steps."""
    result, first = [], 0
    for i, step in enumerate(steps):
        while steps[first] <= step - window:
            first += 1
        recent = values[first : i + 1]
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
    for key, label, color in TRACES:
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
        TrainingError: log.csv is not the table that training logs; table.md is written all the same.
    """
    from kdcache.run_record import LOG_FILE, PLOT_FILE, TABLE_FILE, read_log

    path, page, plot = record.output / LOG_FILE, record.output / TABLE_FILE, record.output / PLOT_FILE
    try:
        page.write_text(result_markdown(record))
        log = read_log(path) if path.exists() else []
        if log:
            loss_plot(log, plot, title=f"{record.output.name}: training loss")
    except OSError as exc:
        raise StorageError(f"cannot write the pages of {record.output}: {exc.strerror or exc}") from exc
    except (ValueError, KeyError) as exc:
        raise TrainingError(f"{path} is damaged, so that {PLOT_FILE} cannot be drawn: {exc}") from exc
    return [page, *([plot] if log else [])]
