"""Score a finished run again from what lies on disk: its saved student and its cache."""

from __future__ import annotations

from pathlib import Path

from kdcache.cache.reader import open_cache
from kdcache.errors import ModelError, TrainingError
from kdcache.evaluate.perplexity import student_score, teacher_score
from kdcache.models import load_model
from kdcache.progress import Progress, Silent
from kdcache.recipe import parse_recipe
from kdcache.student.record import RunRecord, load_record


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
    validation = cache.split("validation")
    saved = path / "model"

    model = load_model(
        student.model,
        revision=student.revision,
        quantization=student.quantization,
        dtype=student.dtype,
        device=student.device,
    )
    before = student_score(model, validation, batch_size=batch_size, what="student before", progress=progress)
    if student.lora is not None:
        import peft

        if student.quantization != "none":
            model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        try:
            model = peft.PeftModel.from_pretrained(model, str(saved))
        except (OSError, ValueError) as exc:
            raise ModelError(f"cannot load the adapter {saved}: {' '.join(str(exc).split())[:200]}") from exc
    else:
        model = load_model(str(saved), dtype=student.dtype, device=student.device)
    after = student_score(model, validation, batch_size=batch_size, what="student after", progress=progress)
    scores = {"student before": before, "student after": after, "teacher": teacher_score(validation)}
    return RunRecord(path, {**record.values, "scores": {k: v.as_record() for k, v in scores.items()}})
