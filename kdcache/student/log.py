"""The training log of a run as a CSV file."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import transformers

from kdcache.cache.files import write_file
from kdcache.student.trainer import DIVERGENCE_KEYS

_LOG_COLUMNS = ("step", "epoch", "loss", "ce", *DIVERGENCE_KEYS, "learning_rate", "grad_norm")


class CsvLog(transformers.TrainerCallback):
    """Appends every training log line to a CSV file; a resumed run first drops what lies after its checkpoint."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the lines up to the step that training goes on from."""
        if not state.is_world_process_zero:
            return
        kept = [row for row in read_log(self._path) if row["step"] <= state.global_step] if self._path.exists() else []
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, _LOG_COLUMNS)
        writer.writeheader()
        writer.writerows({k: _number(v) for k, v in row.items()} for row in kept)
        write_file(self._path, text.getvalue().encode())

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Append one line."""
        if not state.is_world_process_zero or not logs or "loss" not in logs:
            return
        row = {"step": state.global_step, **logs}
        with self._path.open("a", newline="") as f:
            csv.DictWriter(f, _LOG_COLUMNS, extrasaction="ignore").writerow(row)


def read_log(path: Path) -> list[dict[str, float]]:
    """Rows of a log.csv; a value that was not logged is absent."""
    with path.open(newline="") as f:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(f)]


def _number(value: float) -> float | int:
    return int(value) if value.is_integer() else value
