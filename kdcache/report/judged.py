"""What evaluate and bench-inference wrote of a run, read with suspicion: a part of another kind is left out and named."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdcache.intervals import half_width
from kdcache.run_record import (
    EVALUATION_FILE,
    INFERENCE_FILE,
    MODELS,
    number,
    read_json,
    record_digest,
)

_MAX_TASKS, _MAX_SAMPLES = 200, 200


@dataclass(frozen=True)
class Measure:
    """A value, its standard error and how many examples it was taken over, where that is known."""

    value: float
    stderr: float | None
    examples: int | None = None

    @property
    def margin(self) -> float | None:
        """Half the width of the 95 % interval."""
        return half_width(self.value, self.stderr, self.examples)


@dataclass(frozen=True)
class Task:
    """A task, or a metric of generations, and what each model reached.

    ``chat``: whether the prompts went through the chat template; ``budget``: tokens that a generation might have.
    """

    name: str
    metric: str
    examples: int | None
    shots: int | None
    models: dict[str, Measure]
    chat: bool = False
    budget: int | None = None

    @property
    def asked(self) -> tuple[object, ...]:
        """What has to be equal for two rows' values to be comparable."""
        return (self.name, self.metric, self.examples, self.shots, self.chat, self.budget)

    @property
    def conditions(self) -> str:
        """How it was asked, in words."""
        told = [] if self.examples is None else [f"{self.examples:,} examples"]
        if self.shots is not None:
            told.append(f"{self.shots} examples shown first" if self.shots else "none shown first")
        told += ["through the chat template"] if self.chat else []
        told += [] if self.budget is None else [f"at most {self.budget:,} tokens"]
        return ", ".join(told)


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
    values, notes = _read(folder / EVALUATION_FILE, "kdcache-evaluation")
    if values is None:
        return Evaluation(), notes
    if cache_id is not None and values.get("cache_id") not in (None, cache_id):
        return Evaluation(), [
            f"{EVALUATION_FILE} was measured with the cache {str(values['cache_id'])[:12]}, the run was trained from "
            f"{cache_id[:12]}: left out; evaluate it again"
        ]
    if _outdated(values, folder):
        return Evaluation(), [
            f"{EVALUATION_FILE} is of an earlier training in this directory: left out; evaluate it again"
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
    values, notes = _read(folder / INFERENCE_FILE, "kdcache-inference")
    if values is None:
        return Inference(), notes
    if _outdated(values, folder):
        return Inference(), [
            f"{INFERENCE_FILE} is of an earlier training in this directory: left out; measure it again"
        ]
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


def _outdated(values: dict[str, Any], folder: Path) -> bool:
    """Whether it names another training than the run's; earlier versions named none."""
    of = values.get("run_sha256")
    return of is not None and of != record_digest(folder)


def _generation(values: dict[str, Any]) -> Iterator[Task]:
    models = _mapping(values.get("models"))
    for metric in ("rouge_l", "exact_match"):
        examples = _count(values.get("examples"))
        measures = _measures(models, metric, f"{metric}_stderr", examples)
        if measures:
            yield Task("generation", metric, examples, None, measures, budget=_count(values.get("max_new_tokens")))


def _tasks(values: dict[str, Any]) -> Iterator[Task]:
    for name, task in list(values.items())[:_MAX_TASKS]:
        task = _mapping(task)
        examples = _count(task.get("examples"))
        measures = _measures(_mapping(task.get("models")), "value", "stderr", examples)
        if measures:
            yield Task(
                str(name),
                str(task.get("metric", "")),
                examples,
                _count(task.get("shots")),
                measures,
                chat=task.get("chat_template") is True,
            )


def _measures(models: dict[str, Any], value: str, stderr: str, examples: int | None) -> dict[str, Measure]:
    found = {}
    for model in MODELS:
        figures = _mapping(models.get(model))
        n = number(figures.get(value))
        if n is not None:
            found[model] = Measure(n, number(figures.get(stderr)), examples)
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
