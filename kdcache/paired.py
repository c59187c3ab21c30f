"""Losses sequence by sequence, and how sure it is that one student is better than another.

Two students are scored on the same sequences, which are easy or hard for both: the difference of their losses is known far
better than either loss. With ``d_s`` the difference of a sequence's summed losses in nats and ``n_s`` its tokens, the
difference per token is ``sum d / sum n``, with the standard error of a ratio over clusters, and an interval by Student's t.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kdcache.cache.files import write_file
from kdcache.intervals import width_of
from kdcache.run_record import MODELS, SEQUENCES_FILE

Sums = Mapping[int, tuple[float, float]]


@dataclass(frozen=True)
class Losses:
    """Of each sequence that was scored: its place in the split, its tokens, and each model's summed loss in nats."""

    sequences: tuple[int, ...]
    tokens_S: NDArray[np.float64]
    nats_S: dict[str, NDArray[np.float64]]


@dataclass(frozen=True)
class Difference:
    """Nats per token that a student loses against another; ``margin`` is half its 95 % interval, None for one sequence."""

    value: float
    margin: float | None

    @property
    def sure(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.margin is not None and abs(self.value) > self.margin


def ratio_error(sums_S: NDArray[np.float64], counts_S: NDArray[np.float64]) -> float | None:
    """Standard error of ``sums.sum() / counts.sum()`` over clusters; None for fewer than two of them, or no counts.

    ``sqrt(S / (S - 1) * sum (x_s - m n_s)^2) / sum n`` with ``m = sum x / sum n``.
    """
    clusters, total = len(sums_S), float(counts_S.sum())
    if clusters < 2 or not total:
        return None
    residuals = sums_S - sums_S.sum() / total * counts_S
    return float(np.sqrt(clusters / (clusters - 1) * (residuals**2).sum()) / total)


def write_losses(run: Path, models: Mapping[str, Sums]) -> None:
    """Write by_sequence.csv of a run directory.

    Args:
        run: the run directory.
        models: by model, each sequence's tokens and summed loss in nats; all over the same sequences.

    Raises:
        StorageError: it cannot be written.
    """
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["sequence", "tokens", *models])
    for sequence in sorted(next(iter(models.values()))):
        tokens = int(next(iter(models.values()))[sequence][0])
        table.writerow([sequence, tokens, *(f"{sums[sequence][1]:.8g}" for sums in models.values())])
    write_file(run / SEQUENCES_FILE, text.getvalue().encode())


def read_losses(run: Path, losses: Mapping[str, float]) -> Losses | None:
    """by_sequence.csv of a run directory; None where there is none, or it is not the one that ``losses`` are the means of.

    Args:
        run: the run directory.
        losses: mean loss per token by model, as evaluation.json has it.
    """
    try:
        with (run / SEQUENCES_FILE).open(newline="", encoding="utf-8") as file:
            rows = list(csv.reader(file))
        head, table = rows[0], np.array([[float(cell) for cell in row] for row in rows[1:]], dtype=np.float64)
        models = {name: table[:, i] for i, name in enumerate(head) if name in MODELS}
        found = Losses(tuple(int(i) for i in table[:, 0]), table[:, 1], models)
    except (OSError, ValueError, IndexError, OverflowError, csv.Error):
        return None
    total = found.tokens_S.sum()
    wanted = {name: losses[name] for name in models if name in losses}
    if not wanted or not np.isfinite(table).all() or not total:
        return None
    agree = all(abs(models[name].sum() / total - loss) <= 1e-5 * max(1.0, abs(loss)) for name, loss in wanted.items())
    return found if agree else None


def difference(student: Losses, best: Losses, model: str) -> Difference | None:
    """How much more one student loses than another; None where they were not scored on the same sequences."""
    same = student.sequences == best.sequences and np.array_equal(student.tokens_S, best.tokens_S)
    if not same or model not in student.nats_S or model not in best.nats_S:
        return None
    apart_S = student.nats_S[model] - best.nats_S[model]
    error = ratio_error(apart_S, student.tokens_S)
    return Difference(
        float(apart_S.sum() / student.tokens_S.sum()), None if error is None else width_of(len(apart_S)) * error
    )


def difference_text(found: Difference | None) -> str:
    """``+0.0123 ± 0.0045``, a dash where there is none."""
    if found is None:
        return "-"
    return f"{found.value:+.4f}" + ("" if found.margin is None else f" ± {found.margin:.4f}")
