"""A finished run opened again: its record, recipe, cache and saved student."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdcache import __version__
from kdcache.cache.mixture import Mixture, open_caches
from kdcache.cache.reader import Cache, Split
from kdcache.cache.remote import is_url
from kdcache.chain_record import CHAIN_FILE, read_chain, run_of
from kdcache.devices import give_back_memory
from kdcache.errors import BrokenRunError, CacheError, RecipeError, TrainingError
from kdcache.evaluate.cached_teacher import cached_teacher_model
from kdcache.evaluate.perplexity import Score, student_score, teacher_score
from kdcache.models import load_adapter
from kdcache.progress import Progress, Silent
from kdcache.recipe import Recipe, parse_recipe
from kdcache.recipe_student import StudentSection
from kdcache.reinforce_record import load_trained
from kdcache.run_record import AFTER, BEFORE, TEACHER, RunRecord, load_record, record_digest
from kdcache.student.agreement import VALIDATION
from kdcache.student.assembly import load_student
from kdcache.student.initial import is_made
from kdcache.student.start import as_started, base_identity
from kdcache.sweep_record import SWEEP_FILE, read_sweep

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class SavedRun:
    """A finished run and what it was trained from; ``digest`` is its record's when it was opened.

    Of a reinforcement, recipe and cache are those of the run that it started from.
    """

    path: Path
    record: RunRecord
    recipe: Recipe
    student: StudentSection
    cache: Cache
    digest: str

    @property
    def validation(self) -> Split:
        """The split that students are scored on."""
        return self.cache.split(VALIDATION)

    @property
    def reinforced(self) -> bool:
        """Whether it is a reinforcement, which has no scores of its own."""
        return "distilled_student" in self.record.values

    @property
    def base(self) -> str:
        """What the student before training is a function of: runs with the same one can share it. Of a made one that is what
        was made, since the model that the recipe names may have changed between two runs."""
        made = base_identity(self.path) if is_made(self.student) else None
        return self.student.model_dump_json(exclude={"lora"}) + (made or "")

    @property
    def batch_size(self) -> int:
        """Sequences per forward pass in the run: with the same, scores come out the same to the last bit."""
        size = self.record.values.get("forward_pass")
        return size if isinstance(size, int) and size > 0 else self.recipe.training.batch_size


def run_directories(paths: Sequence[Path], progress: Progress | None = None) -> list[Path]:
    """The run directories that are meant: a sweep directory stands for its finished rows, a chain's for its finished stages.

    Raises:
        TrainingError: a sweep or a chain that is not readable, or has nothing finished.
    """
    progress, found = progress or Silent(), []
    for path in paths:
        if (path / SWEEP_FILE).exists():
            kind, part = "sweep", "row"
            runs = [(row, path / row["directory"]) for row in read_sweep(path)["rows"]]
        elif (path / CHAIN_FILE).exists():
            kind, part = "chain", "stage"
            runs = [(stage, run_of(path, stage["name"])) for stage in read_chain(path)["stages"]]
        else:
            found.append(path)
            continue
        rows = [(values["name"], run, _state(run, values)) for values, run in runs]
        left = [f"{name} ({state})" for name, _, state in rows if state != "finished"]
        if left:
            progress.warning(f"of {path} these {part}s are left out: {', '.join(left)}")
        found += [run for _, run, state in rows if state == "finished"]
        if len(left) == len(rows):
            raise TrainingError(f"the {kind} {path} has no finished {part}; kdcache {kind} goes on with it")
    return list(dict.fromkeys(found))


def _state(run: Path, values: dict[str, Any]) -> str:
    """A row's or a stage's state; that of a finished one whose record is broken by now is said as well."""
    if values["state"] == "finished":
        try:
            load_record(run)
        except BrokenRunError as exc:
            return f"finished, but {exc}"
    return str(values["state"])


def trained_recipe(record: RunRecord) -> tuple[Recipe, StudentSection]:
    """The recipe of a finished run, and its student's section.

    Raises:
        TrainingError: this version does not read it, or it has no student.
    """
    try:
        recipe = parse_recipe(record.values["recipe"])
    except RecipeError as exc:
        raise TrainingError(
            f"{record.output} is a run directory of kdcache {record.values.get('kdcache', 'unknown')}, whose recipe kdcache "
            f"{__version__} does not read: {exc}; judge it with the version that wrote it, or train it again"
        ) from exc
    if recipe.student is None:
        raise TrainingError(f"the record in {record.output} names no student")
    return recipe, recipe.student


def first_student(record: RunRecord) -> StudentSection:
    """The student's section as the distillation had it: of a reinforcement another than the record's own, whose base may be a
    student that was trained or made before.

    Raises:
        TrainingError: as `trained_recipe`.
    """
    if "distilled_student" not in record.values:
        return trained_recipe(record)[1]
    recipe = {**record.values["recipe"], "student": record.values["distilled_student"]}
    return trained_recipe(RunRecord(record.output, {**record.values, "recipe": recipe}))[1]


def open_saved_run(path: Path, *, cache: str | None = None, progress: Progress | None = None) -> SavedRun:
    """A finished run with its cache.

    Args:
        path: the run directory.
        cache: directory or URL where its cache lies now; None for where the recipe says.
        progress: told of a cache that is brought from a URL.

    Raises:
        TrainingError: no finished run, one whose recipe this version does not read, or another cache.
        CacheError: the cache is not there, incomplete, or has no split to score on.
    """
    record = load_trained(path)
    digest = record_digest(path)
    recipe, student = trained_recipe(record)
    places = recipe.cache.places if cache is None else ((cache, 1.0),)
    if cache is not None and recipe.cache.mixture:
        said = ", ".join(place for place, _ in recipe.cache.places)
        raise TrainingError(f"{path} was trained from a mixture of caches, and --cache names one; put them at {said}")
    for place, _ in places if cache is None else ():
        if not is_url(place) and not Path(place).is_dir():
            way = "put it there" if recipe.cache.mixture else "say where it lies with --cache DIRECTORY_OR_URL"
            raise CacheError(f"the cache of {path} is not at {place}; {way}")
    opened = open_caches(places, progress=progress)
    if opened.id != record.values["cache_id"]:
        way = "mix the caches that it names" if recipe.cache.mixture else "say where that one lies with --cache"
        raise TrainingError(
            f"{path} was trained from cache {record.values['cache_id'][:12]}, {opened.directory} is {opened.id[:12]}; {way}"
        )
    opened.split(VALIDATION)
    return SavedRun(path, record, recipe, student, opened, digest)


class Students:
    """Students before and after their training, one base in memory at a time: runs that share one load it once."""

    def __init__(self) -> None:
        self._base: str | None = None
        self._adapter: Path | None = None
        self._model: Any = None

    @contextmanager
    def before(self, run: SavedRun) -> Iterator[PreTrainedModel]:
        """The student as it started.

        Raises:
            ModelError: the base or the run's adapter cannot be loaded.
        """
        model = self._ready(run)
        with nullcontext() if run.student.lora is None else model.disable_adapter():
            yield model

    @contextmanager
    def after(self, run: SavedRun) -> Iterator[PreTrainedModel]:
        """The student as it was saved: the same model with its adapter, or a fully trained one, which is loaded here.

        Raises:
            ModelError: base, adapter or saved model cannot be loaded.
        """
        if run.student.lora is None:
            yield load_student(run.student, run.path / "model")
            give_back_memory()
        else:
            yield self._ready(run)

    def _ready(self, run: SavedRun) -> Any:
        if self._base != run.base:
            self.release()
            # A made one lies in the run directory, where it needs no model that it was made from.
            self._model, self._base = load_student(as_started(run.student, run.path)), run.base
        wanted = None if run.student.lora is None else run.path / "model"
        if self._adapter not in (None, wanted):
            self._model, self._adapter = self._model.unload(), None
            # peft warns of a second adapter where it finds the first one's configuration.
            vars(self._model).pop("peft_config", None)
        if wanted is not None and self._adapter is None:
            quantized = run.student.quantization != "none"
            self._model, self._adapter = load_adapter(self._model, str(wanted), quantized=quantized), wanted
        return self._model

    def release(self) -> None:
        """Forget the base."""
        self._base = self._adapter = self._model = None
        give_back_memory()


def load_teacher(run: SavedRun, place: str | None = None) -> PreTrainedModel:
    """The teacher of a run's cache; `cached_teacher_model` at ``place``, where the recipe says, or by the name in the plan.

    Raises:
        ModelError: it is not there, or cannot be loaded.
        CacheError: another model lies there, or the run learnt from a mixture of teachers.
    """
    if isinstance(run.cache, Mixture):
        raise CacheError(f"{run.path} learnt from {run.cache.plan.teacher.name}, which is no model that could be asked")
    section = run.recipe.teacher
    name = place or (None if section is None else section.model)
    return cached_teacher_model(run.cache, name, device=run.student.device if section is None else section.device)


def run_score(
    run: SavedRun, model: PreTrainedModel, what: str, *, batch_size: int | None, progress: Progress, **options: Any
) -> Score:
    """A student of a run on the validation split, in the arithmetic of the run; ``options`` as `student_score`."""
    return student_score(
        model,
        run.validation,
        batch_size=batch_size or run.batch_size,
        max_length=run.recipe.training.max_length,
        precision=run.recipe.training.precision,
        what=what,
        progress=progress,
        **options,
    )


def score_saved_run(path: Path, *, batch_size: int | None = None, progress: Progress | None = None) -> RunRecord:
    """The run's record with freshly measured scores.

    Args:
        path: the run directory.
        batch_size: sequences per forward pass; None for as many as in the run, which gives the same bits.
        progress: told about long work.

    Raises:
        TrainingError: no finished run, or its cache is no longer the one it was trained from.
        ModelError: the saved student cannot be loaded.
    """
    progress = progress or Silent()
    run = open_saved_run(path, progress=progress)
    score, students = partial(run_score, run, batch_size=batch_size, progress=progress), Students()
    with students.before(run) as model:
        before = score(model, BEFORE)
    with students.after(run) as model:
        after = score(model, AFTER)
    teacher = teacher_score(run.validation, max_length=run.recipe.training.max_length)
    scores = {BEFORE: before, AFTER: after, TEACHER: teacher}
    return RunRecord(path, {**run.record.values, "scores": {k: v.as_record() for k, v in scores.items()}})
