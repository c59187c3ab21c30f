"""PHASE ONE on one screen: a recipe becomes a cache directory.

data -> tokens -> plan -> for each shard that is not there: forward, select, encode, write -> manifest.
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
from kdcache.errors import CacheError, PlanMismatchError
from kdcache.models import load_model, refuse_narrow_head
from kdcache.progress import Progress, Silent
from kdcache.recipe import Recipe
from kdcache.teacher.budget import SAMPLE_POSITIONS, adopted_floors, find_floors
from kdcache.teacher.draws import chance_of
from kdcache.teacher.forward import TeacherForward
from kdcache.teacher.planning import PlannedCache, plan_cache, teacher_sections
from kdcache.teacher.sample import hidden_sample, sample_rows, shard_content
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


def capture(recipe: Recipe, progress: Progress | None = None) -> CaptureResult:
    """Make the recipe's cache, or go on with it where an earlier run stopped.

    Raises:
        KdcacheError: bad input, a directory of another plan, a full disk; committed shards stay.
    """
    made = _make_share(recipe, ALONE, progress or Silent())
    return made.complete(made.writer.finalise())


def capture_share(recipe: Recipe, worker: Worker, progress: Progress | None = None) -> CaptureResult | ShareResult:
    """Make one worker's shards of the recipe's cache; the one that finds all shards there finishes the cache.

    Workers know nothing of each other but the files, so any of them can be stopped, started again or left out:
    whoever runs `capture` makes what is missing.

    Raises:
        KdcacheError: as `capture`.
    """
    if worker.count == 1:
        return capture(recipe, progress)
    made = _make_share(recipe, worker, progress or Silent())
    manifest = made.writer.settled()
    if manifest is None:
        unfinished = made.writer.unfinished()
        if unfinished:
            return made.share(unfinished)
        manifest = made.writer.finalise()
    return made.complete(manifest)


@dataclass(frozen=True)
class _Made:
    writer: CacheWriter
    shards: int
    positions: int
    started: float

    def complete(self, manifest: Manifest) -> CaptureResult:
        return CaptureResult(
            self.writer.directory, self.writer.plan, manifest, self.shards, self.positions, self._seconds()
        )

    def share(self, unfinished: list[int]) -> ShareResult:
        return ShareResult(
            self.writer.directory, self.writer.plan, self.shards, self.positions, self._seconds(), tuple(unfinished)
        )

    def _seconds(self) -> float:
        return time.monotonic() - self.started


def _make_share(recipe: Recipe, worker: Worker, progress: Progress) -> _Made:
    started = time.monotonic()
    drafted = plan_cache(recipe, progress)
    planned, teacher = settle_floors(recipe, drafted, progress, worker=worker)
    writer, planned = _open_writer(Path(recipe.cache.directory), drafted, planned)
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
        finally:
            progress.end()
    return _Made(writer, len(todo), positions, started)


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
    recipe: Recipe, planned: PlannedCache, progress: Progress, *, writing: bool = True, worker: Worker = ALONE
) -> tuple[PlannedCache, TeacherForward | None]:
    """The plan with its probability floors: given, taken from the run that goes on, or found with the teacher (returned
    where it had to be loaded).

    Raises:
        CacheError: ``writing``, and the cache directory holds something else, or another plan.
    """
    if not planned.floors_open:
        return planned, None
    try:
        adopted = adopted_floors(planned, Path(recipe.cache.directory))
    except CacheError:
        if writing:
            raise
        adopted = None
    if adopted is not None:
        return adopted, None
    _, section = teacher_sections(recipe)
    teacher = load_teacher(recipe, planned, worker)
    rows = sample_rows(planned, batch_tokens=section.batch_tokens, positions=SAMPLE_POSITIONS)
    sample = hidden_sample(teacher, rows, batch_tokens=section.batch_tokens)
    return find_floors(planned, sample, progress=progress), teacher


def load_teacher(recipe: Recipe, planned: PlannedCache, worker: Worker = ALONE) -> TeacherForward:
    """The recipe's teacher on the worker's device, ready to give rows over the plan's vocabulary."""
    _, section = teacher_sections(recipe)
    model = load_model(
        section.model,
        revision=section.revision,
        quantization=section.quantization,
        dtype=section.dtype,
        device=worker.device(section.device),
    )
    refuse_narrow_head(model, len(planned.tokens), section.model)
    return TeacherForward(model, vocab_size=len(planned.tokens), pad_id=planned.plan.tokenizer.pad_id)


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
