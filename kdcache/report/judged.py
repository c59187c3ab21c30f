"""What evaluate and bench-inference wrote of a run, read with suspicion: a part of another kind is left out and named."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdcache.run_record import number, read_json

BEFORE, AFTER, TEACHER = "student before", "student after", "teacher"
MODELS = (BEFORE, AFTER, TEACHER)
_Z95 = 1.96  # standard errors to either side of a 95 % interval
_MAX_TASKS, _MAX_SAMPLES = 200, 200


@dataclass(frozen=True)
class Measure:
    """A value and its standard error, where that is known."""

    value: float
    stderr: float | None

    @property
    def margin(self) -> float | None:
        """Half the width of the 95 % interval."""
        return None if self.stderr is None else _Z95 * self.stderr


@dataclass(frozen=True)
class Task:
    """A task, or a metric of generations, and what each model reached."""

    name: str
    metric: str
    examples: int | None
    shots: int | None
    models: dict[str, Measure]


@dataclass(frozen=True)
class Sample:
    """One prompt and its answers by model."""

    prompt: str
    reference: str
    answers: dict[str, str]


@dataclass(frozen=True)
class Evaluation:
    """evaluation.json; whatever was not evaluated is empty."""

    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    generation: tuple[Task, ...] = ()
    retention: dict[str, float] = field(default_factory=dict)
    tasks: tuple[Task, ...] = ()
    samples: tuple[Sample, ...] = ()

    def score(self, model: str, key: str) -> float | None:
        """One figure of a model."""
        return self.scores.get(model, {}).get(key)


@dataclass(frozen=True)
class Inference:
    """inference.json: the rows as they are, and what they were measured with."""

    rows: tuple[dict[str, Any], ...] = ()
    conditions: str = ""


def read_evaluation(folder: Path, cache_id: str | None) -> tuple[Evaluation, list[str]]:
    """evaluation.json of a run directory, empty where there is none, and what had to be left out."""
    values, notes = _read(folder / "evaluation.json", "kdcache-evaluation")
    if values is None:
        return Evaluation(), notes
    if cache_id is not None and values.get("cache_id") not in (None, cache_id):
        return Evaluation(), [
            f"evaluation.json was measured with the cache {str(values['cache_id'])[:12]}, the run was trained from "
            f"{cache_id[:12]}: left out; evaluate it again"
        ]
    generation = _mapping(values.get("generation"))
    found = Evaluation(
        scores={
            model: {k: n for k, v in _mapping(score).items() if (n := number(v)) is not None}
            for model, score in _mapping(values.get("scores")).items()
            if model in MODELS
        },
        generation=tuple(_generation(generation)),
        retention={k: n for k, v in _mapping(generation.get("retention")).items() if (n := number(v)) is not None},
        tasks=tuple(_tasks(_mapping(values.get("tasks")))),
        samples=tuple(_samples(values.get("samples"))),
    )
    return found, notes


def read_inference(folder: Path) -> tuple[Inference, list[str]]:
    """inference.json of a run directory, empty where there is none, and what had to be left out."""
    values, notes = _read(folder / "inference.json", "kdcache-inference")
    if values is None:
        return Inference(), notes
    rows = [row for row in _items(values.get("rows")) if isinstance(row, dict) and isinstance(row.get("model"), str)]
    counts = (
        ("prompt_tokens", "{:,} prompt tokens"),
        ("new_tokens", "{:,} new tokens"),
        ("batch_size", "batches of {:,}"),
    )
    told = [form.format(n) for key, form in counts if (n := number(values.get(key))) is not None]
    return Inference(tuple(rows), ", ".join(told)), notes


def _read(path: Path, form: str) -> tuple[dict[str, Any] | None, list[str]]:
    try:
        values = read_json(path)
    except FileNotFoundError:
        return None, []
    except (OSError, ValueError) as exc:
        return None, [f"{path.name} is not readable and left out: {exc}"]
    if not isinstance(values, dict) or values.get("format") != form:
        return None, [f"{path.name} is not a {form} record and left out"]
    return values, []


def _generation(values: dict[str, Any]) -> Iterator[Task]:
    models = _mapping(values.get("models"))
    for metric in ("rouge_l", "exact_match"):
        measures = _measures(models, metric, f"{metric}_stderr")
        if measures:
            yield Task("generation", metric, _count(values.get("examples")), None, measures)


def _tasks(values: dict[str, Any]) -> Iterator[Task]:
    for name, task in list(values.items())[:_MAX_TASKS]:
        task = _mapping(task)
        measures = _measures(_mapping(task.get("models")), "value", "stderr")
        if measures:
            yield Task(
                str(name),
                str(task.get("metric", "")),
                _count(task.get("examples")),
                _count(task.get("shots")),
                measures,
            )


def _measures(models: dict[str, Any], value: str, stderr: str) -> dict[str, Measure]:
    found = {}
    for model in MODELS:
        figures = _mapping(models.get(model))
        n = number(figures.get(value))
        if n is not None:
            found[model] = Measure(n, number(figures.get(stderr)))
    return found


def _samples(values: object) -> Iterator[Sample]:
    for sample in _items(values)[:_MAX_SAMPLES]:
        sample = _mapping(sample)
        if isinstance(sample.get("prompt"), str):
            answers = {m: a for m, a in _mapping(sample.get("answers")).items() if m in MODELS and isinstance(a, str)}
            reference = sample.get("reference")
            yield Sample(sample["prompt"], reference if isinstance(reference, str) else "", answers)


def _mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _items(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _count(value: object) -> int | None:
    n = number(value)
    return n if isinstance(n, int) else None
