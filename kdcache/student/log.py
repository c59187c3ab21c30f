"""The training log of a run as a CSV file."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import transformers

from kdcache.cache.files import write_file
from kdcache.run_record import read_log
from kdcache.student.trainer import DIVERGENCE_KEYS

__all__ = ["CsvLog", "read_log"]

_SCHEDULED = ("temperature", "ce_weight", "kd_weight")
_EVALUATED = ("eval_loss", "eval_perplexity", "eval_kl")
_LOG_COLUMNS = (
    "step", "epoch", "loss", "ce", *DIVERGENCE_KEYS, "hidden", "learning_rate", "grad_norm", *_SCHEDULED, *_EVALUATED,
)  # fmt: skip


class CsvLog(transformers.TrainerCallback):
    """Appends every log line of training and evaluation to a CSV file; a resumed run first drops what lies after its checkpoint."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the lines up to the step that training goes on from."""
        if not state.is_world_process_zero:
            return
        kept = (
            [row for row in _rows(self._path) if int(row["step"]) <= state.global_step] if self._path.exists() else []
        )
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, _LOG_COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(kept)
        write_file(self._path, text.getvalue().encode())

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Append one line."""
        if not state.is_world_process_zero or not logs or not {"loss", "eval_loss"} & logs.keys():
            return
        row = {"step": state.global_step, **logs}
        with self._path.open("a", newline="") as f:
            csv.DictWriter(f, _LOG_COLUMNS, extrasaction="ignore").writerow(row)


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as f:
        return list(csv.DictReader(f))
