"""Finished runs, judged: what was asked for is measured, and written beside what was measured before.

open the runs and build the tasks -> the teachers, each once -> the students, base by base -> evaluation.json of each run.

A student before training that several runs share is measured once, and so is a teacher.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from kdcache.cache.mixture import Mixture
from kdcache.devices import give_back_memory
from kdcache.errors import CacheError, ModelError
from kdcache.evaluate.by_sequence import SequenceSums, teacher_errors, teacher_losses
from kdcache.evaluate.generation import Prompts, answer_text, generate, judged, prompts_of, retention, scorer
from kdcache.evaluate.harness import Harness, Measured, as_record
from kdcache.evaluate.perplexity import teacher_score
from kdcache.evaluate.results import earlier_results, write_results
from kdcache.evaluate.saved_run import (
    SavedRun,
    Students,
    load_teacher,
    open_saved_run,
    run_directories,
    run_score,
)
from kdcache.evaluate.saved_student import refuse_missing_student
from kdcache.paired import Sums, write_losses
from kdcache.progress import Progress, Silent
from kdcache.run_record import AFTER, BEFORE, TEACHER
from kdcache.token_maps import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_BATCH = 8
_T = TypeVar("_T")


@dataclass(frozen=True)
class Wanted:
    """What to measure.

    Attributes:
        batch_size: sequences per forward pass; None for as many as in the run for scores, and 8 for everything else.
        generate: validation prompts that are answered and scored; 0 for none.
        max_new_tokens: tokens that an answer may have; None for as many as the longest reference, at most 256.
        samples: prompts whose answers are kept to be read; 0 for none.
        tasks: of lm-evaluation-harness.
        task_data: folder of the bundled tasks' files.
        limit: examples of each task; None for all.
        chat_template: put the tasks' prompts through the student's chat template.
        teacher: folder or id of the teacher; None for the recipe's, or the name in the cache.
        cache: directory or URL where the runs' cache lies now; None for where their recipes say.
    """

    batch_size: int | None = None
    generate: int = 0
    max_new_tokens: int | None = None
    samples: int = 0
    tasks: tuple[str, ...] = ()
    task_data: Path | None = None
    limit: int | None = None
    chat_template: bool = False
    teacher: str | None = None
    cache: str | None = None

    @property
    def prompts(self) -> int:
        """Prompts that have to be answered."""
        return max(self.generate, self.samples)


@dataclass(frozen=True)
class Evaluation:
    """A run and what evaluation.json holds of it; ``measured`` names the parts that are new, ``tasks`` the tasks."""

    run: Path
    values: dict[str, Any]
    measured: tuple[str, ...]
    tasks: tuple[str, ...]


@dataclass(frozen=True)
class _Answers:
    """What a model said to the prompts and to the tasks."""

    texts: list[str]
    tasks: dict[str, Measured]


def evaluate(
    paths: Sequence[Path], wanted: Wanted | None = None, progress: Progress | None = None
) -> Iterator[Evaluation]:
    """Evaluate run directories, and the finished rows of sweep directories; each is written as soon as it is done.

    Raises:
        KdcacheError: bad input, before a model is loaded; or a model that cannot be loaded.
    """
    wanted, progress = wanted or Wanted(), progress or Silent()
    session = _Session(wanted, progress)
    directories = run_directories(paths, progress)
    opened = [open_saved_run(path, cache=wanted.cache, progress=progress) for path in directories]
    for run in opened:
        # What cannot be read is found before the work and not after it; what is kept is read when it is written.
        earlier_results(run.path, run.digest, progress)
    session.prepare(opened)
    # A base stays in memory as long as runs with it follow.
    order = list(dict.fromkeys(run.base for run in opened))
    for run in sorted(opened, key=lambda r: order.index(r.base)):
        parts = session.measure(run)
        if run.reinforced:
            parts["before"] = f"the base of its adapter, {run.student.model}"
        values = write_results(run.path, run.digest, run.cache.id, parts, progress)
        write_losses(run.path, session.losses)
        yield Evaluation(run.path, values, tuple(session.parts), tuple(parts.get("tasks", ())))
    session.students.release()


class _Session:
    """Models, prompts and tasks of one call, and what has been measured with them."""

    def __init__(self, wanted: Wanted, progress: Progress) -> None:
        self.wanted, self.progress = wanted, progress
        self.students = Students()
        self.parts = ["scores", *(p for p, n in (("generation", wanted.generate), ("samples", wanted.samples),
                                                 ("tasks", len(wanted.tasks))) if n)]  # fmt: skip
        self._prompts: dict[str, Prompts] = {}
        self._harness: Harness | None = None
        self._once: dict[tuple[Any, ...], Any] = {}
        # Of the run that was measured last.
        self.losses: dict[str, Sums] = {}

    def prepare(self, runs: list[SavedRun]) -> None:
        """Everything that can fail without a model; then the teachers, which leave before the students come."""
        wanted = self.wanted
        for run in runs:
            refuse_missing_student(run.path, run.student)
        if wanted.generate:
            scorer()
        for run in runs:
            if wanted.prompts:
                self._prompts[run.cache.id] = prompts_of(run.validation, wanted.prompts, wanted.max_new_tokens)
            load_tokenizer(str(run.path / "model"))
        if wanted.prompts:
            found = min(len(p.prompts) for p in self._prompts.values())
            if found < wanted.prompts:
                self.progress.warning(f"{wanted.prompts} prompts were asked for, the validation split has {found}")
        if wanted.tasks:
            self._harness = Harness(
                wanted.tasks, task_data=wanted.task_data, limit=wanted.limit,
                chat_template=wanted.chat_template, progress=self.progress,
            )  # fmt: skip
        if wanted.prompts or wanted.tasks:
            for run in runs:
                self._remembered((TEACHER, run.cache.id), lambda run=run: self._teacher(run))  # type: ignore[misc]

    def measure(self, run: SavedRun) -> dict[str, Any]:
        """The parts of evaluation.json that were asked for."""
        precision = run.recipe.training.precision
        same = (run.base, run.student.lora is None, run.cache.id, precision)
        length = run.recipe.training.max_length
        size = self.wanted.batch_size or run.batch_size
        with self.students.before(run) as model:
            before = self._remembered(("score", *same, length, size), lambda: self._score(run, model, BEFORE))
            said = {BEFORE: self._remembered(("said", *same), lambda: self._answers(run, model, BEFORE, precision))}
        del model
        with self.students.after(run) as model:
            after = self._score(run, model, AFTER)
            said[AFTER] = self._answers(run, model, AFTER, precision)
        teacher = self._remembered(("score", run.cache.id, length), lambda: self._teacher_score(run))
        if (answers := self._once.get((TEACHER, run.cache.id))) is not None:
            said[TEACHER] = answers
        found = {BEFORE: before, AFTER: after, TEACHER: teacher}
        self.losses = {name: losses for name, (_, losses) in found.items()}
        parts: dict[str, Any] = {"scores": {name: score for name, (score, _) in found.items()}}
        if self.wanted.prompts:
            parts |= self._generation(run, {name: a.texts for name, a in said.items()})
        if self._harness is not None:
            parts["tasks"] = as_record({name: a.tasks for name, a in said.items()})
        return parts

    def _remembered(self, key: tuple[Any, ...], measure: Callable[[], _T]) -> _T:
        if key not in self._once:
            self._once[key] = measure()
        found: _T = self._once[key]
        return found

    def _score(self, run: SavedRun, model: PreTrainedModel, name: str) -> tuple[dict[str, Any], Sums]:
        sums = SequenceSums(model, run.cache.vocab_size, mixed=isinstance(run.cache, Mixture))
        with sums.listening():
            score = run_score(run, model, name, batch_size=self.wanted.batch_size, progress=self.progress, observe=sums)
        return {**score.as_record(), **sums.as_record()}, sums.losses()

    def _teacher_score(self, run: SavedRun) -> tuple[dict[str, Any], Sums]:
        length = run.recipe.training.max_length
        score = teacher_score(run.validation, max_length=length).as_record()
        return {**score, **teacher_errors(run.validation, length)}, teacher_losses(run.validation, length)

    def _answers(self, run: SavedRun, model: PreTrainedModel, name: str, precision: str) -> _Answers:
        size, texts, tasks = self.wanted.batch_size or _BATCH, [], {}
        tokenizer = load_tokenizer(str(run.path / "model"))
        if self.wanted.prompts:
            texts = generate(
                model, self._prompts[run.cache.id], tokenizer,
                batch_size=size, precision=precision, what=name, progress=self.progress,
            )  # fmt: skip
        if self._harness is not None:
            tasks = self._harness.run(
                model, tokenizer, batch_size=size, precision=precision, what=name, progress=self.progress
            )
        return _Answers(texts, tasks)

    def _teacher(self, run: SavedRun) -> _Answers | None:
        """The teacher's answers; None, and a warning, where the recipe's teacher is not on this machine."""
        try:
            model = load_teacher(run, self.wanted.teacher)
        except (CacheError, ModelError) as exc:
            if self.wanted.teacher is not None:
                raise
            self.progress.warning(f"the teacher is left out: {exc}")
            return None
        try:
            return self._answers(run, model, TEACHER, "fp32")
        finally:
            del model
            give_back_memory()

    def _generation(self, run: SavedRun, texts: dict[str, list[str]]) -> dict[str, Any]:
        prompts, tokenizer = self._prompts[run.cache.id], load_tokenizer(str(run.path / "model"))
        references = [answer_text(ids, prompts.eos_id, tokenizer) for ids in prompts.references]
        parts: dict[str, Any] = {}
        count = min(self.wanted.generate, len(references))
        if count:
            models = {name: judged(said[:count], references[:count]) for name, said in texts.items()}
            parts["generation"] = {"examples": count, "max_new_tokens": prompts.budget, "models": models}
            if TEACHER in models:
                parts["generation"]["retention"] = retention(models[AFTER], models[TEACHER])
        if self.wanted.samples:
            parts["samples"] = [
                {
                    "prompt": answer_text(ids, -1, tokenizer),
                    "reference": reference,
                    "answers": {name: said[i] for name, said in texts.items()},
                }
                for i, (ids, reference) in enumerate(zip(prompts.prompts, references, strict=True))
                if i < self.wanted.samples
            ]
        return parts
