"""Score a finished run again from what lies on disk: its saved student and its cache."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdcache.cache.store import open_cache
from kdcache.errors import TrainingError
from kdcache.evaluate.perplexity import Score, student_score, teacher_score
from kdcache.models import load_adapter
from kdcache.progress import Progress, Silent
from kdcache.recipe import parse_recipe
from kdcache.student.agreement import VALIDATION
from kdcache.student.assembly import load_student
from kdcache.student.record import RunRecord, load_record

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def score_saved_run(path: Path, *, batch_size: int = 8, progress: Progress | None = None) -> RunRecord:
    """The run's record with freshly measured scores.

    Raises:
        TrainingError: no finished run, or its cache is no longer the one it was trained from.
        ModelError: the saved student cannot be loaded.
    """
    progress = progress or Silent()
    record = load_record(path)
    recipe = parse_recipe(record.values["recipe"])
    cache = open_cache(recipe.cache.directory)
    if cache.id != record.values["cache_id"]:
        raise TrainingError(
            f"{path} was trained from cache {record.values['cache_id'][:12]}, {cache.directory} is {cache.id[:12]}"
        )
    student = recipe.student
    if student is None:
        raise TrainingError(f"{path / 'run.json'} names no student")
    validation, length = cache.split(VALIDATION), recipe.training.max_length

    def score(model: PreTrainedModel, name: str) -> Score:
        return student_score(
            model,
            validation,
            batch_size=batch_size,
            max_length=length,
            precision=recipe.training.precision,
            what=name,
            progress=progress,
        )

    model = load_student(student)
    if student.lora is None:
        before = score(model, "student before")
        after = score(load_student(student, path / "model"), "student after")
    else:
        adapted: Any = load_adapter(model, str(path / "model"), quantized=student.quantization != "none")
        with adapted.disable_adapter():
            before = score(adapted, "student before")
        after = score(adapted, "student after")
    scores = {"student before": before, "student after": after, "teacher": teacher_score(validation, max_length=length)}
    return RunRecord(path, {**record.values, "scores": {k: v.as_record() for k, v in scores.items()}})
