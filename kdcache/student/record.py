"""A run directory: what it holds, when it may be gone on with, and the record of a finished run."""

from __future__ import annotations

import csv
import importlib.metadata
import json
import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from safetensors import SafetensorError, safe_open

from kdcache.cache.reader import Cache
from kdcache.cache.shard import write_file
from kdcache.errors import StorageError, TrainingError
from kdcache.evaluate.perplexity import Score
from kdcache.progress import Progress
from kdcache.recipe import Recipe
from kdcache.student.trainer import DIVERGENCE_KEYS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "safetensors", "zstandard", "numpy")
_LOG_COLUMNS = ("step", "epoch", "loss", "ce", *DIVERGENCE_KEYS, "learning_rate", "grad_norm")
# What may change between two sittings of one run without changing the student.
_FREE_KEYS = (
    "output",
    "cache.directory",
    "cache.positions_per_shard",
    "training.save_steps",
    "training.keep_checkpoints",
    "training.report_to",
    "training.logging_steps",
    "student.device",
    "teacher.device",
)


@dataclass(frozen=True)
class RunRecord:
    """What run.json holds of a finished run."""

    output: Path
    values: dict[str, Any]

    @property
    def scores(self) -> dict[str, dict[str, float]]:
        """Row name -> loss, perplexity, kl_to_teacher, tokens on the validation split."""
        scores: dict[str, dict[str, float]] = self.values["scores"]
        return scores


class RunDirectory:
    """Paths of a run, and the rules for starting in a directory that is not empty."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.model = path / "model"
        self.checkpoints = path / "checkpoints"
        self.log = path / "log.csv"
        self._started = path / "started.json"
        self._record = path / "run.json"

    def prepare(self, recipe: Recipe, cache_id: str, *, resume: bool, overwrite: bool) -> RunRecord | None:
        """Refuse what must not be touched. Returns the record when ``resume`` meets the finished run.

        Raises:
            TrainingError: the directory holds a run that neither flag allows to touch, or another run.
        """
        if self._started.exists() and overwrite:
            for path in (self.model, self.checkpoints):
                shutil.rmtree(path, ignore_errors=True)
            for path in (self.log, self._record, self._started):
                path.unlink(missing_ok=True)
        if self._started.exists():
            if not resume:
                raise TrainingError(
                    f"{self.path} holds an earlier run; go on with it by --resume, start over by --overwrite, or give "
                    "the recipe key output another directory"
                )
            self._refuse_other_run(_identity(recipe, cache_id))
            if self._record.exists():
                return load_record(self.path)
        return None

    def begin(self, recipe: Recipe, cache_id: str) -> None:
        """Make the directory and write down whose it is; called when nothing but the training can fail any more.

        Raises:
            StorageError: it cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise StorageError(f"cannot make the run directory {self.path}: {exc.strerror}") from exc
        write_file(self._started, json.dumps(_identity(recipe, cache_id), indent=1).encode())

    def newest_checkpoint(self, progress: Progress) -> Path | None:
        """The newest checkpoint that was written to its end; broken ones are passed over with a warning."""
        found = sorted(
            self.checkpoints.glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]), reverse=True
        )
        for path in found:
            problem = _broken(path)
            if problem is None:
                return path
            progress.warning(f"{path.name} is not whole ({problem}), an earlier one is used")
            shutil.rmtree(path)
        return None

    def finish(self, record: RunRecord) -> None:
        """Write run.json; its presence means the run is finished."""
        write_file(self._record, json.dumps(record.values, indent=1).encode() + b"\n")

    def _refuse_other_run(self, identity: dict[str, Any]) -> None:
        try:
            earlier = json.loads(self._started.read_text())
            then = {**earlier["recipe"], "cache id": earlier["cache_id"]}
        except (OSError, ValueError, KeyError, TypeError) as exc:
            raise TrainingError(f"{self._started} is not readable; start over by --overwrite") from exc
        now = {**identity["recipe"], "cache id": identity["cache_id"]}
        keys = sorted(k for k in now.keys() | then.keys() if now.get(k) != then.get(k) and k not in _FREE_KEYS)
        if keys:
            shown = "; ".join(f"{k} was {then.get(k)!r}, now {now.get(k)!r}" for k in keys[:6])
            raise TrainingError(
                f"{self.path} holds a run with other settings: {shown}. Put them back, start over by --overwrite, or give "
                "the recipe key output another directory"
            )


class CsvLog(transformers.TrainerCallback):
    """Appends every training log line to a CSV file; a resumed run first drops what lies after its checkpoint."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the lines up to the step that training goes on from."""
        if not state.is_world_process_zero:
            return
        kept = [row for row in read_log(self._path) if row["step"] <= state.global_step] if self._path.exists() else []
        with self._path.open("w", newline="") as f:
            writer = csv.DictWriter(f, _LOG_COLUMNS)
            writer.writeheader()
            writer.writerows({k: _number(v) for k, v in row.items()} for row in kept)

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


def load_record(path: Path) -> RunRecord:
    """The record of a finished run.

    Raises:
        TrainingError: there is none, or it is not readable.
    """
    try:
        values = json.loads((path / "run.json").read_text())
    except FileNotFoundError as exc:
        raise TrainingError(
            f"{path} holds no finished run (no run.json); finish it with kdcache train-student --resume"
        ) from exc
    except (OSError, ValueError) as exc:
        raise TrainingError(f"{path / 'run.json'} is not readable: {exc}") from exc
    if not isinstance(values, dict) or values.get("format") != "kdcache-run":
        raise TrainingError(f"{path / 'run.json'} is not the record of a kdcache run")
    return RunRecord(path, values)


def run_record(
    recipe: Recipe, cache: Cache, model: PreTrainedModel, scores: dict[str, Score], steps: int, seconds: float
) -> RunRecord:
    """Everything needed to repeat or compare a run."""
    parameters = {
        "total": sum(p.numel() for p in model.parameters()),
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }
    values = {
        "format": "kdcache-run",
        "kdcache": importlib.metadata.version("kdcache"),
        "recipe": recipe.model_dump(mode="json"),
        "cache_id": cache.id,
        "plan_digest": cache.plan.digest,
        "scores": {name: score.as_record() for name, score in scores.items()},
        "steps": steps,
        "seconds": round(seconds, 1),
        "parameters": parameters,
        "versions": {"python": platform.python_version(), **{p: importlib.metadata.version(p) for p in _PACKAGES}},
        "hardware": hardware(),
    }
    return RunRecord(Path(recipe.output), values)


def hardware() -> dict[str, Any]:
    """The machine, as far as it bears on speed and numerics."""
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        device = {"name": properties.name, "memory_bytes": properties.total_memory, "count": torch.cuda.device_count()}
    else:
        device = {"name": "cpu", "capability": torch.backends.cpu.get_cpu_capability()}
    return {"device": device, "cpus": os.cpu_count(), "system": platform.system(), "machine": platform.machine()}


def _broken(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be resumed from, or None."""
    state = checkpoint / "trainer_state.json"
    try:
        json.loads(state.read_text())
        for weights in checkpoint.glob("*.safetensors"):
            with safe_open(weights, framework="pt"):
                continue
        for name in ("optimizer.pt", "scheduler.pt"):
            torch.load(checkpoint / name, map_location="cpu", weights_only=True)
    except (OSError, ValueError, RuntimeError, EOFError, SafetensorError) as exc:
        return f"{type(exc).__name__}: {' '.join(str(exc).split())[:120]}"
    return None


def _identity(recipe: Recipe, cache_id: str) -> dict[str, Any]:
    return {"cache_id": cache_id, "recipe": _flat(recipe.model_dump(mode="json"))}


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _number(value: float) -> float | int:
    return int(value) if value == int(value) else value
