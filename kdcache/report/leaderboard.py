"""The leaderboard: a line for every row, teacher and students before training as reference lines above them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from kdcache.recipe_keys import value_at
from kdcache.report.blocks import Cell, Column, Line, Table
from kdcache.report.collect import Collection, Row
from kdcache.report.comparable import Comparison, Reference
from kdcache.report.judged import Measure, Task
from kdcache.report.recipes import Base, value_text, varied
from kdcache.run_record import AFTER, TEACHER, number

METRICS = {"rouge_l": "ROUGE-L", "exact_match": "exact match"}
Figure = Callable[[Row, str], float | int | None]


@dataclass(frozen=True)
class _Score:
    """A column of figures: of one model of a row, or, where ``of_row``, of the row whatever the model."""

    column: Column
    figure: Figure
    form: str = ".3f"
    of_row: bool = False


def leaderboard(found: Collection, comparison: Comparison, chosen: list[Base]) -> Table:
    """Every row; the best perplexity first, rows without scores last."""
    several = len(comparison.sets) > 1
    scores = [s for s in _scores(found) if _has(s, found, comparison)]
    columns = [
        Column("student", numeric=False),
        Column("changed", numeric=False, title="Keys changed against the base recipe"),
    ]
    if several:
        columns.append(
            Column("scored on", numeric=False, title="Rows with the same letter were scored on the same tokens")
        )
    columns += [s.column for s in scores]
    columns.append(Column("bytes each", title="Bytes per position of the cache it was trained from"))
    lines = [_reference_line(r, scores, comparison, several) for r in comparison.references()]
    changes = {row.name: _changes(row, base) for base in chosen for row in base.rows}
    ranked = sorted(found.rows, key=rank)
    lines += [_line(row, scores, comparison, several, changes.get(row.name, {})) for row in ranked]
    caption = "Students by perplexity on the validation split, and what they are held against"
    return Table(caption, tuple(columns), tuple(lines), sortable=True, sorted_by=2 + several)


def rank(row: Row) -> tuple[int, float]:
    """Order of the leaderboard: by perplexity, then those that diverged, are not finished, and have failed."""
    perplexity = row.score(AFTER, "perplexity")
    if perplexity is None:
        return (3 if row.state == "failed" else 2, 0.0)
    return (0, perplexity) if math.isfinite(perplexity) else (1, 0.0)


def figure_text(value: float | int | None, form: str = ".3f") -> str:
    """A figure for people; a dash where there is none."""
    if value is None:
        return "-"
    return f"{value:.3e}" if math.isfinite(value) and abs(value) >= 1e6 and "," not in form else format(value, form)


def measure_text(measure: Measure | None) -> str:
    """A value with its 95 % interval."""
    if measure is None:
        return "-"
    return f"{measure.value:.3f}" + ("" if measure.margin is None else f" ± {measure.margin:.3f}")


def _scores(found: Collection) -> list[_Score]:
    def of(key: str) -> Figure:
        return lambda row, model: row.score(model, key)

    temperatures = {t for row in found.finished if (t := row.score(AFTER, "kl_temperature")) is not None}
    at = f", T = {next(iter(temperatures)):g}" if len(temperatures) == 1 and temperatures != {1} else ""
    scores = [
        _Score(Column("perplexity", title="On the response tokens of the validation split"), of("perplexity")),
        _Score(Column("loss", title="Nats per response token"), of("loss"), ".4f"),
        _Score(
            Column(f"KL to teacher{at}", title="KL(teacher || student), nats per token"), of("kl_to_teacher"), ".4f"
        ),
        _Score(
            Column("top-1", title="Share of positions where student and teacher have the same likeliest token"),
            lambda row, model: row.evaluation.score(model, "top_1_agreement"),
        ),
        *_judged(found),
    ]
    return [
        *scores,
        _Score(Column("steps"), lambda row, _: _told(row, "steps"), ",.0f", of_row=True),
        _Score(
            Column("minutes", title="Training and scoring"),
            lambda row, _: None if row.seconds is None else row.seconds / 60,
            ".1f",
            of_row=True,
        ),
    ]


def _line(row: Row, scores: list[_Score], comparison: Comparison, several: bool, changes: dict[str, str]) -> Line:
    text = ", ".join(f"{key}={value}" for key, value in changes.items())
    cells = [Cell(row.name, row.name), Cell(text or "-", text or None)]
    if row.record is None:
        # The reason takes the place of the figures, which there are none of.
        said = f"{row.state}: {row.reason}" if row.reason else row.state
        cells[1:2] = [Cell(said + (f" ({text})" if text else ""), None)]
        cells += [Cell("-")] * (several + len(scores) + 1)
        cells[-2] = _cell(None if row.seconds is None else row.seconds / 60, ".1f")
        return Line(tuple(cells), "failed" if row.state == "failed" else "open")
    if several:
        cells.append(Cell(comparison.set_name(row), comparison.set_name(row)))
    cells += [_cell(score.figure(row, AFTER), score.form) for score in scores]
    return Line((*cells, _cell(comparison.cache_of(row).bytes_per_position, ".1f")))


def _reference_line(reference: Reference, scores: list[_Score], comparison: Comparison, several: bool) -> Line:
    row = reference.row
    cells = [Cell(reference.name, reference.name), Cell("reference")]
    if several:
        cells.append(Cell(comparison.set_name(row), comparison.set_name(row)))
    cells += [Cell("-") if s.of_row else _cell(s.figure(row, reference.model), s.form) for s in scores]
    return Line((*cells, Cell("-")), "reference")


def _has(score: _Score, found: Collection, comparison: Comparison) -> bool:
    """Whether anybody has such a figure; the first three and the costs are always shown."""
    if score.of_row or score.column.label.startswith(("perplexity", "loss", "KL")):
        return True
    return any(score.figure(row, model) is not None for row in comparison.rows for model in (AFTER, TEACHER))


def _changes(row: Row, base: Base) -> dict[str, str]:
    """Keys that tell a row from its neighbours: those its sweep changed, or, of runs given alone, those that vary."""
    if row.sweep is not None:
        return {key: value_text(value) for key, value in row.changes.items()}
    return {key: value_text(value_at(row.recipe or {}, key)) for key in varied(base)}


def _judged(found: Collection) -> Iterator[_Score]:
    """A column for everything that was asked; what was asked in two ways has two, which say how they differ."""
    generations = _asked([task for row in found.finished for task in row.evaluation.generation])
    tasks = _asked([task for row in found.finished for task in row.evaluation.tasks])
    for task, apart in sorted(generations, key=lambda pair: list(METRICS).index(pair[0].metric)):
        label = METRICS[task.metric] + apart
        yield _Score(Column(label, title=f"Of generations against the references, {task.conditions}"), _value_of(task))
    for task, apart in generations:
        if task.metric == "rouge_l":
            title = f"ROUGE-L of the student, in % of the teacher's, {task.conditions}"
            yield _Score(Column(f"retention %{apart}", title=title), _retained_of(task), ".1f")
    for task, apart in tasks:
        yield _Score(Column(task.name + apart, title=f"{task.metric}, {task.conditions}"), _value_of(task))


def _asked(tasks: list[Task]) -> list[tuple[Task, str]]:
    """One of each that was asked in the same way, and what tells it from those of its name and metric."""
    kinds = {task.asked: task for task in tasks}
    told = []
    for task in kinds.values():
        others = [other for other in kinds.values() if other.name == task.name]
        # Generations have a column for each metric anyhow; of a task the metric may be what differs.
        others = [other for other in others if other.name != "generation" or other.metric == task.metric]
        differs = {
            "metric": task.metric, "examples": f"n = {task.examples}", "shots": f"{task.shots}-shot",
            "chat": "chat" if task.chat else "no chat", "budget": f"{task.budget} tokens",
        }  # fmt: skip
        apart = [text for key, text in differs.items() if len({getattr(other, key) for other in others}) > 1]
        told.append((task, f" ({', '.join(apart)})" if apart else ""))
    return told


def _value_of(wanted: Task) -> Figure:
    def figure(row: Row, model: str) -> float | None:
        for task in (*row.evaluation.generation, *row.evaluation.tasks):
            if task.asked == wanted.asked and model in task.models:
                return task.models[model].value
        return None

    return figure


def _retained_of(wanted: Task) -> Figure:
    def figure(row: Row, model: str) -> float | None:
        same = any(task.asked == wanted.asked for task in row.evaluation.generation)
        return row.evaluation.retention.get("rouge_l") if same and model == AFTER else None

    return figure


def _told(row: Row, key: str) -> float | int | None:
    return None if row.record is None else number(row.record.values.get(key))


def _cell(value: float | int | None, form: str) -> Cell:
    return Cell(figure_text(value, form), value)
