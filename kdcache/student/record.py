"""A run directory: what it holds, when it may be gone on with, and what is recorded of a finished run."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic_core import to_jsonable_python

from kdcache import __version__
from kdcache.cache.files import write_file
from kdcache.cache.mixture import Mixture
from kdcache.cache.reader import Cache
from kdcache.errors import StorageError, TrainingError
from kdcache.evaluate.perplexity import Score
from kdcache.progress import Progress
from kdcache.recipe import Recipe
from kdcache.recipe_keys import recipe_keys
from kdcache.recipe_training import describe
from kdcache.reinforce_record import is_reinforcement
from kdcache.run_directory import LOCK, DirectoryLock, refuse_other_settings, refuse_without_resume
from kdcache.run_record import (
    JUDGED_FILES,
    LOG_FILE,
    PLOT_FILE,
    RECORD_FILE,
    STARTED_FILE,
    TABLE_FILE,
    RunRecord,
    flat_keys,
    load_record,
)
from kdcache.student.checkpoints import checkpoints, problem_of
from kdcache.student.initial import is_made
from kdcache.student.start import BASE, UNBEGUN, MadeBase, base_facts, described_base, put_in_place

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["RunDirectory", "RunRecord", "hardware", "load_record", "run_record", "write_model_card"]

_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "safetensors", "zstandard", "numpy")
GLOBAL_BATCH = "training.batch_size x accumulation x processes"
# What may change between two sittings of one run without changing the student. The global batch may not; how it is cut may.
_FREE_KEYS = (
    "output",
    "training.batch_size",
    "training.accumulation",
    "training.workers",
    "cache.directory",
    # Ids and weights are in the mixture's id.
    "cache.weight",
    "cache.mixture",
    "cache.positions_per_shard",
    "training.save_steps",
    "training.keep_checkpoints",
    "training.report_to",
    "training.logging_steps",
    "student.device",
    "teacher.device",
)


class RunDirectory:
    """Paths of a run, and the rules for starting in a directory that is not empty."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.model = path / "model"
        self.checkpoints = path / "checkpoints"
        self.log = path / LOG_FILE
        self.table = path / TABLE_FILE
        self.plot = path / PLOT_FILE
        self._overwrite = False
        self._lock = DirectoryLock(path)
        self._started = path / STARTED_FILE
        self._record = path / RECORD_FILE

    def prepare(
        self, recipe: Recipe, cache_id: str, *, resume: bool, overwrite: bool, world: int = 1
    ) -> RunRecord | None:
        """Refuse what must not be touched. Returns the record when ``resume`` meets the finished run.

        Raises:
            TrainingError: the directory holds a run that neither flag allows to touch, or another run.
        """
        self._overwrite = overwrite
        if is_reinforcement(self.path):
            raise TrainingError(
                f"{self.path} holds a reinforcement (kdcache reinforce); give the recipe key output another directory"
            )
        apart = (LOCK, *UNBEGUN)
        found = sorted(p.name for p in self.path.iterdir() if p.name not in apart) if self.path.is_dir() else []
        if found and not self._started.exists():
            raise TrainingError(
                f"{self.path} holds something that is no run ({', '.join(found[:4])}); give the recipe key output "
                "another directory"
            )
        # A run that never reached a checkpoint has nothing to lose.
        worked = self._record.exists() or any(self.checkpoints.glob("checkpoint-*"))
        if worked and not overwrite:
            refuse_without_resume(self.path, resume=resume)
            self._refuse_other_run(_identity(recipe, cache_id, world))
            if self._record.exists():
                return load_record(self.path)
        return None

    def begin(self, recipe: Recipe, cache_id: str, *, world: int = 1, made: MadeBase | None = None) -> None:
        """Make the directory and write down whose it is; called when nothing but the training can fail any more.

        Only now is an earlier run forgotten.

        Raises:
            StorageError: it cannot be written.
        """
        self.hold()
        try:
            if self._overwrite:
                for path in (self.model, self.checkpoints):
                    shutil.rmtree(path, ignore_errors=True)
                # What was measured of the student goes with it.
                judged = (self.path / name for name in JUDGED_FILES)
                for path in (self.log, self._record, self.table, self.plot, *judged, self._started):
                    path.unlink(missing_ok=True)
            put_in_place(recipe.student, self.path, made)
        except OSError as exc:
            raise StorageError(f"cannot make the run directory {self.path}: {exc.strerror}") from exc
        values = {**_identity(recipe, cache_id, world), **base_facts(self.path)}
        write_file(self._started, json.dumps(values, indent=1).encode())

    def hold(self) -> None:
        """Make the directory, and hold it until `release` or the end of the process: two trainings would write into each other.

        Raises:
            StorageError: it cannot be made.
            TrainingError: another process holds it.
        """
        self._lock.hold()

    def release(self) -> None:
        """Others may train in the directory again."""
        self._lock.release()

    def newest_checkpoint(self, progress: Progress) -> Path | None:
        """The newest checkpoint that was written to its end; broken ones are passed over with a warning."""
        for path in reversed(checkpoints(self.checkpoints)):
            problem = problem_of(path)
            if problem is None:
                return path
            # Passed over, not removed: what cannot be read now may be readable tomorrow.
            progress.warning(f"{path.name} is not whole ({problem}), an earlier one is used")
        return None

    def finish(self, record: RunRecord) -> None:
        """Write run.json; its presence means the run is finished."""
        write_file(self._record, json.dumps(record.values, indent=1).encode() + b"\n")

    def _refuse_other_run(self, identity: dict[str, Any]) -> None:
        try:
            earlier = json.loads(self._started.read_text())
            then = {**_completed(earlier["recipe"]), "cache id": earlier["cache_id"]}
        except (OSError, ValueError, KeyError, TypeError) as exc:
            raise TrainingError(f"{self._started} is not readable; start over by --overwrite") from exc
        now = {**identity["recipe"], "cache id": identity["cache_id"]}
        refuse_other_settings(self.path, then, now, _FREE_KEYS)


def run_record(
    recipe: Recipe,
    cache: Cache,
    model: PreTrainedModel,
    scores: dict[str, Score],
    **training: Any,
) -> RunRecord:
    """Everything needed to repeat or compare a run; ``training`` are facts of it such as its steps."""
    parameters = {
        # Packed 4-bit weights remember how many they are.
        "total": sum(_count(p) for p in model.parameters()),
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }
    values = {
        "format": "kdcache-run",
        "kdcache": __version__,
        "recipe": recipe.model_dump(mode="json"),
        "cache_id": cache.id,
        "plan_digest": (cache.first if isinstance(cache, Mixture) else cache).plan.digest,
        **({"mixture": cache.described()} if isinstance(cache, Mixture) else {}),
        # What the cache holds, which the recipe need not say.
        "selection": cache.plan.selection.model_dump(mode="json"),
        "scores": {name: score.as_record() for name, score in scores.items()},
        **training,
        "parameters": parameters,
        "versions": {"python": platform.python_version(), **{p: importlib.metadata.version(p) for p in _PACKAGES}},
        "hardware": hardware(),
    }
    return RunRecord(Path(recipe.output), values)


def _count(parameter: torch.nn.Parameter) -> int:
    """Numbers in a parameter; packed 4-bit weights remember how many they are."""
    packed = getattr(parameter, "quant_state", None)
    return parameter.numel() if packed is None else math.prod(packed.shape)


def write_model_card(folder: Path, recipe: Recipe, cache: Cache, scores: dict[str, Score]) -> None:
    """Say in the saved student's folder what it is, and let others read it as far as the umask allows."""
    student, teacher = recipe.student, cache.plan.teacher
    name = "" if student is None else student.model
    start = described_base(folder.parent) if student is not None and is_made(student) else None
    lines = [
        "---",
        "library_name: peft" if student is not None and student.lora is not None else "library_name: transformers",
        "tags: [knowledge-distillation, kdcache]",
        "---",
        "",
        f"# {Path(name).name}, distilled from {Path(teacher.name).name}",
        "",
        f"Trained with kdcache from cache `{cache.id}`, T = {describe(recipe.loss.temperature)}, "
        f"weights {describe(recipe.loss.ce_weight)} (CE) and {describe(recipe.loss.kd_weight)} (KD).",
        "",
        *([] if start is None else [f"Started from {start}: the folder `{BASE}` of the run directory.", ""]),
        "| model | loss | perplexity |",
        "|---|---:|---:|",
        *(f"| {row} | {score.loss:.4f} | {score.perplexity:.3f} |" for row, score in scores.items()),
        "",
    ]
    (folder / "README.md").write_text("\n".join(lines))
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.iterdir():
        path.chmod(0o666 & ~mask)


def hardware() -> dict[str, Any]:
    """The machine, as far as it bears on speed and numerics."""
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        device = {"name": properties.name, "memory_bytes": properties.total_memory, "count": torch.cuda.device_count()}
    else:
        device = {"name": "cpu", "capability": torch.backends.cpu.get_cpu_capability()}
    return {"device": device, "cpus": os.cpu_count(), "system": platform.system(), "machine": platform.machine()}


def _completed(keys: dict[str, Any]) -> dict[str, Any]:
    """Flat keys of a recipe, with the defaults of those that came after it was written."""
    found = dict(keys)
    for key, (default, _) in recipe_keys(Recipe).items():
        parts = key.split(".")
        above = {".".join(parts[: i + 1]) for i in range(len(parts) - 1)}
        # A section that was null has no keys; a key with others below it has a value already.
        known = key in keys or above & keys.keys() or any(k.startswith(f"{key}.") for k in keys)
        # Of a section that may be left out altogether, and was, none of its keys had a value.
        optional = len(parts) > 1 and Recipe.model_fields[parts[0]].get_default(call_default_factory=True) is None
        left_out = optional and not any(k.startswith(f"{parts[0]}.") for k in keys)
        if default is not ... and not known and not left_out:
            found |= flat_keys({key: to_jsonable_python(default)})
    return found


def _identity(recipe: Recipe, cache_id: str, world: int) -> dict[str, Any]:
    training = recipe.training
    keys = flat_keys(recipe.model_dump(mode="json"))
    # Summed losses are averaged over forward passes: there the cut matters as well.
    cut = f"{training.batch_size} sequences a forward pass, " if recipe.loss.reduction == "sum" else ""
    keys[GLOBAL_BATCH] = f"{cut}{training.batch_size * training.accumulation * world} sequences a step"
    return {"cache_id": cache_id, "recipe": keys}
