"""PHASE ONE on one screen: a recipe becomes a cache directory.

data -> tokens -> plan -> for each shard that is not there: forward, select, encode, write -> manifest.
Where the teacher is to answer the data's prompts, it does so first, and its answers are the tokens.
A second thread encodes and writes while the model runs; if it fails, the run fails at once. Several workers
make a share of the shards each, with nothing between them but the directory.
"""

from __future__ import annotations

import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from kdcache.cache.manifest import Manifest, Plan
from kdcache.cache.writer import CacheWriter
from kdcache.errors import CacheError, PlanMismatchError, StorageError
from kdcache.models import load_model, refuse_narrow_head
from kdcache.progress import Progress, Silent
from kdcache.recipe import Recipe
from kdcache.teacher.budget import SAMPLE_POSITIONS, adopted_floors, find_floors
from kdcache.teacher.draws import chance_of
from kdcache.teacher.forward import TeacherForward
from kdcache.teacher.generate import generate, prepare
from kdcache.teacher.planning import Ground, PlannedCache, pad_id, plan_cache, teacher_sections
from kdcache.teacher.sample import hidden_sample, sample_rows, shard_content
from kdcache.teacher.spool import Spool
from kdcache.teacher.workers import ALONE, Worker

# Shards that may wait for the writer: more would only hold memory.
_QUEUED = 2


@dataclass(frozen=True)
class CaptureResult:
    """A finished cache: where it is, its plan and manifest, and what this run did of it."""

    directory: Path
    plan: Plan
    manifest: Manifest
    shards_made: int
    positions_made: int
    seconds: float


@dataclass(frozen=True)
class ShareResult:
    """One worker's share of a cache whose other shards are not all there: what it made, and what is left to others."""

    directory: Path
    plan: Plan
    shards_made: int
    positions_made: int
    seconds: float
    unfinished: tuple[int, ...]


@dataclass(frozen=True)
class AnswerShare:
    """One worker's share of the answers that a cache is to be made of, while others are not done: batches made and missing."""

    batches_made: int
    unfinished: int
    seconds: float


def capture(recipe: Recipe, progress: Progress | None = None) -> CaptureResult:
    """Make the recipe's cache, or go on with it where an earlier run stopped.

    Raises:
        KdcacheError: bad input, a directory of another plan, a full disk; committed shards and answers stay.
    """
    progress = progress or Silent()
    drafted = _drafted(recipe, ALONE, progress)
    if isinstance(drafted, AnswerShare):
        raise CacheError("answers are missing that this process should have made; run kdcache teacher-cache again")
    made = _make_share(recipe, drafted, progress)
    return made.complete(made.writer.finalise())


def capture_share(
    recipe: Recipe, worker: Worker, progress: Progress | None = None
) -> CaptureResult | ShareResult | AnswerShare:
    """Make one worker's shards of the recipe's cache; the one that finds all shards there finishes the cache.

    Where the teacher answers first, its batches are shared as shards are, and the worker that then finds all answers
    there makes all shards. Workers know nothing of each other but the files, so any of them can be stopped, started
    again or left out: whoever runs `capture` makes what is missing.

    Raises:
        KdcacheError: as `capture`.
    """
    if worker.count == 1:
        return capture(recipe, progress)
    progress = progress or Silent()
    drafted = _drafted(recipe, worker, progress)
    if isinstance(drafted, AnswerShare):
        return drafted
    made = _make_share(recipe, drafted, progress)
    manifest = made.writer.settled()
    if manifest is None:
        unfinished = made.writer.unfinished()
        if unfinished:
            return made.share(unfinished)
        manifest = made.writer.finalise()
    return made.complete(manifest)


@dataclass(frozen=True)
class _Drafted:
    """A plan whose floors may be open, the teacher where it is loaded already, and where its answers wait if it gave any."""

    planned: PlannedCache
    teacher: TeacherForward | None
    spool: Spool | None
    worker: Worker
    started: float


@dataclass(frozen=True)
class _Made:
    writer: CacheWriter
    shards: int
    positions: int
    started: float
    spool: Spool | None

    def complete(self, manifest: Manifest) -> CaptureResult:
        if self.spool is not None:
            self.spool.remove()
        return CaptureResult(
            self.writer.directory, self.writer.plan, manifest, self.shards, self.positions, self._seconds()
        )

    def share(self, unfinished: list[int]) -> ShareResult:
        return ShareResult(
            self.writer.directory, self.writer.plan, self.shards, self.positions, self._seconds(), tuple(unfinished)
        )

    def _seconds(self) -> float:
        return time.monotonic() - self.started


def _drafted(recipe: Recipe, worker: Worker, progress: Progress) -> _Drafted | AnswerShare:
    started = time.monotonic()
    data, _ = teacher_sections(recipe)
    if data.source == "dataset":
        return _Drafted(plan_cache(recipe, progress), None, None, worker, started)
    task = prepare(recipe, progress)
    done = generate(recipe, task, lambda: load_ground(recipe, task.ground, worker), progress, worker)
    if done.planned is None:
        return AnswerShare(done.made, done.unfinished, time.monotonic() - started)
    # The others may have gone, with answers missing: whoever made some and finds them all there is the last.
    worker = ALONE if done.made else worker
    return _Drafted(done.planned, done.teacher, task.spool, worker, started)


def _make_share(recipe: Recipe, drafted: _Drafted, progress: Progress) -> _Made:
    worker = drafted.worker
    planned, teacher = settle_floors(recipe, drafted.planned, progress, worker=worker, teacher=drafted.teacher)
    writer, planned = _open_writer(Path(recipe.cache.directory), drafted.planned, planned)
    own = worker.shards(len(planned.plan.shards))
    todo, complaints = writer.survey(own)
    for complaint in complaints:
        progress.warning(f"{complaint}; it is made again now")
    if worker.count > 1:
        progress.message(
            f"{worker} makes {len(own)} of {len(planned.plan.shards)} shards; --worker 0/1 makes all of them in one process"
        )
    if len(todo) < len(own):
        progress.message(f"{len(own) - len(todo)} of {len(own)} shards are there already")
    positions = sum(planned.plan.shards[i].positions for i in todo)
    if todo:
        teacher = teacher or load_teacher(recipe, planned, worker)
        progress.begin("teacher cache", positions, "positions")
        try:
            _make_shards(recipe, planned, teacher, writer, todo, progress)
        except StorageError:
            # Another worker that was last as well may be done by now, and have taken the answers away.
            if drafted.spool is None or writer.settled() is None:
                raise
        finally:
            progress.end()
    return _Made(writer, len(todo), positions, drafted.started, drafted.spool)


def _open_writer(directory: Path, drafted: PlannedCache, planned: PlannedCache) -> tuple[CacheWriter, PlannedCache]:
    """The writer of a plan; where another worker was first with floors of its own, these hold for all."""
    try:
        return CacheWriter(directory, planned.plan, planned.tokens.tokens), planned
    except PlanMismatchError:
        adopted = adopted_floors(drafted, directory) if drafted.floors_open else None
        if adopted is None:
            raise
        return CacheWriter(directory, adopted.plan, adopted.tokens.tokens), adopted


def settle_floors(
    recipe: Recipe,
    planned: PlannedCache,
    progress: Progress,
    *,
    writing: bool = True,
    worker: Worker = ALONE,
    teacher: TeacherForward | None = None,
) -> tuple[PlannedCache, TeacherForward | None]:
    """The plan with its probability floors: given, taken from the run that goes on, or found with the teacher (returned
    where it is loaded, perhaps before).

    Raises:
        CacheError: ``writing``, and the cache directory holds something else, or another plan.
    """
    if teacher is not None:
        teacher.states = planned.states
    if not planned.floors_open:
        return planned, teacher
    try:
        adopted = adopted_floors(planned, Path(recipe.cache.directory))
    except CacheError:
        if writing:
            raise
        adopted = None
    if adopted is not None:
        return adopted, teacher
    _, section = teacher_sections(recipe)
    teacher = teacher or load_teacher(recipe, planned, worker)
    rows = sample_rows(planned, batch_tokens=section.batch_tokens, positions=SAMPLE_POSITIONS)
    sample = hidden_sample(teacher, rows, batch_tokens=section.batch_tokens)
    return find_floors(planned, sample, progress=progress), teacher


def load_teacher(recipe: Recipe, planned: PlannedCache, worker: Worker = ALONE) -> TeacherForward:
    """The recipe's teacher on the worker's device, ready to give rows over the plan's vocabulary."""
    forward = _load(recipe, len(planned.tokens), planned.plan.tokenizer.pad_id, worker)
    forward.states = planned.states
    return forward


def load_ground(recipe: Recipe, ground: Ground, worker: Worker = ALONE) -> TeacherForward:
    """The recipe's teacher before there is a plan."""
    return _load(recipe, len(ground.tokens), pad_id(ground), worker)


def _load(recipe: Recipe, tokens: int, pad: int, worker: Worker) -> TeacherForward:
    _, section = teacher_sections(recipe)
    model = load_model(
        section.model,
        revision=section.revision,
        quantization=section.quantization,
        dtype=section.dtype,
        device=worker.device(section.device),
    )
    refuse_narrow_head(model, tokens, section.model)
    return TeacherForward(model, vocab_size=tokens, pad_id=pad)


def _make_shards(
    recipe: Recipe,
    planned: PlannedCache,
    teacher: TeacherForward,
    writer: CacheWriter,
    todo: list[int],
    progress: Progress,
) -> None:
    _, section = teacher_sections(recipe)
    written: deque[Future[int]] = deque()

    def collect(limit: int) -> None:
        # result() raises what the writer raised, here in the thread that can stop the run.
        while written and (written[0].done() or len(written) > limit):
            written.popleft().result()

    def on_batch(positions: int) -> None:
        collect(_QUEUED)
        progress.advance(positions)

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="shard-writer") as pool:
        try:
            for index in todo:
                rows, split = planned.shard_rows(index), planned.plan.shards[index].split
                chosen, numbers, thin = chance_of(planned.plan, split)
                sparse = teacher(
                    rows, chosen, batch_tokens=section.batch_tokens, uniforms=numbers, thin=thin, on_batch=on_batch
                )
                sparse = replace(sparse, design=planned.plan.design(split))
                written.append(pool.submit(writer.commit, index, shard_content(rows, sparse)))
                collect(_QUEUED)
            collect(0)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
