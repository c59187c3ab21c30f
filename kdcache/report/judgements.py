"""What evaluate and bench-inference found, as tables: how sure the order is, tasks with intervals, samples, speed and size."""

from __future__ import annotations

from kdcache.intervals import INTERVAL_NOTE
from kdcache.paired import Losses, difference, difference_text, read_losses
from kdcache.report.blocks import Answers, Block, Cell, Column, Folded, Line, Table, Text
from kdcache.report.collect import Collection, Row
from kdcache.report.comparable import Comparison
from kdcache.report.judged import Task
from kdcache.report.leaderboard import METRICS, figure_text, measure_text, rank
from kdcache.report.spent import size
from kdcache.run_record import AFTER, BEFORE, MODELS, TEACHER, number

_OPEN_SAMPLES = 3


def order(comparison: Comparison) -> tuple[Block, ...]:
    """By how much each evaluated student loses against the best on the same sequences, and whether that is sure."""
    tables = []
    for rows in comparison.sets:
        losses = {row.name: _losses(row) for row in sorted(rows, key=rank)}
        known = {name: found for name, found in losses.items() if found is not None}
        if len(known) < 2:
            continue
        best, *others = known
        lines = [Line((Cell(best, best), Cell("the best", 0.0), Cell("-")))]
        for name in others:
            apart = difference(known[name], known[best], AFTER)
            sure = "-" if apart is None else "yes" if apart.sure else "no"
            value = None if apart is None else apart.value
            lines.append(Line((Cell(name, name), Cell(difference_text(apart), value), Cell(sure))))
        columns = (
            Column("student", numeric=False),
            Column("nats per token above the best", title="Difference of the losses, sequence by sequence"),
            Column("sure", numeric=False, title="Whether the 95 % interval leaves out 0"),
        )
        tables.append(Table(f"Is it sure that {best} is the best?", columns, tuple(lines), sortable=True))
    if not tables:
        return ()
    note = "±: half the 95 % interval of the difference over the same sequences, of the validation text alone: another seed of the "
    return (*tables, Text(note + "training may differ by more.", "note"))


def _losses(row: Row) -> Losses | None:
    means = {model: n for model in MODELS if (n := row.evaluation.score(model, "loss")) is not None}
    return read_losses(row.directory, means)


def tasks(found: Collection) -> tuple[Block, ...]:
    """A table for each task: every row's student before and after, its teacher, with 95 % intervals."""
    groups: dict[str, list[tuple[Row, Task]]] = {}
    for row in sorted(found.finished, key=rank):
        for task in (*row.evaluation.generation, *row.evaluation.tasks):
            # Only what was asked in the same way stands in one table.
            groups.setdefault(_title(task), []).append((row, task))
    tables = [_task(title, rows) for title, rows in groups.items()]
    if not tables:
        return ()
    return (Text(INTERVAL_NOTE, "note"), *tables)


def _title(task: Task) -> str:
    return ", ".join(filter(None, (f"{task.name}: {METRICS.get(task.metric, task.metric)}", task.conditions)))


def _task(title: str, rows: list[tuple[Row, Task]]) -> Table:
    lines = []
    for row, task in rows:
        cells = [Cell(row.name, row.name)]
        for model in MODELS:
            measure = task.models.get(model)
            cells.append(Cell(measure_text(measure), None if measure is None else measure.value))
        after, teacher = task.models.get(AFTER), task.models.get(TEACHER)
        kept = None if after is None or teacher is None or not teacher.value else 100 * after.value / teacher.value
        lines.append(Line((*cells, Cell(figure_text(kept, ".1f"), kept))))
    columns = (Column("student", numeric=False), *(Column(model) for model in MODELS))
    retained = Column("retention %", title="Student after training, in % of the teacher")
    return Table(title, (*columns, retained), tuple(lines), sortable=len(lines) > 1)


def samples(found: Collection) -> tuple[Block, ...]:
    """Every prompt with its reference and what teacher, student before and the students after it answered."""
    prompts: dict[str, dict[str, str]] = {}
    for row in sorted(found.finished, key=rank):
        for sample in row.evaluation.samples:
            answers = prompts.setdefault(sample.prompt, {})
            if sample.reference:
                answers.setdefault("reference", sample.reference)
            for model in (TEACHER, BEFORE):
                # Rows of one base and one teacher share them; of others they are told apart.
                if (said := sample.answers.get(model)) is not None and answers.setdefault(model, said) != said:
                    answers[f"{row.name}, {model}"] = said
            if AFTER in sample.answers:
                apart = row.name in (*answers, "reference", TEACHER, BEFORE)
                answers[f"{row.name}, {AFTER}" if apart else row.name] = sample.answers[AFTER]
    blocks: list[Block] = [Answers(prompt, _ordered(answers)) for prompt, answers in prompts.items()]
    if len(blocks) <= _OPEN_SAMPLES:
        return tuple(blocks)
    rest = tuple(blocks[_OPEN_SAMPLES:])
    return (*blocks[:_OPEN_SAMPLES], Folded(f"{len(rest)} more prompts", rest))


def _ordered(answers: dict[str, str]) -> tuple[tuple[str, str], ...]:
    first = [name for name in ("reference", TEACHER, BEFORE) if name in answers]
    return tuple((name, answers[name]) for name in [*first, *(n for n in answers if n not in first)])


def inference(found: Collection) -> tuple[Block, ...]:
    """A table for each run that was measured."""
    tables = []
    for row in found.finished:
        if not row.inference.rows:
            continue
        lines = []
        for measured in row.inference.rows:
            name, error = str(measured["model"]), measured.get("error")
            if error:
                cells = [Cell(name, name), Cell(f"failed: {error}")] + [Cell("-")] * 3
                lines.append(Line(tuple(cells), "failed"))
                continue
            speed, first = number(measured.get("tokens_per_second")), number(measured.get("time_to_first_token"))
            memory, disk = number(measured.get("memory_bytes")), number(measured.get("disk_bytes"))
            of = measured.get("memory_of")
            lines.append(
                Line((
                    Cell(name, name), Cell(figure_text(speed, ",.1f"), speed), Cell(figure_text(first, ".3f"), first),
                    Cell(size(memory) + (f" ({of})" if of else ""), memory), Cell(size(disk), disk),
                ))
            )  # fmt: skip
        columns: tuple[Column, ...] = (Column("model", numeric=False), Column("tokens/s"), Column("first token, s"))
        columns += (Column("memory"), Column("on disk"))
        caption = f"Inference of {row.name}" + (f": {row.inference.conditions}" if row.inference.conditions else "")
        tables.append(Table(caption, columns, tuple(lines), sortable=True))
    return tuple(tables)
