"""PHASE ONE on one screen: a recipe becomes a cache directory.

data -> tokens -> plan -> for each shard that is not there: forward, select, encode, write -> manifest.
A second thread encodes and writes while the model runs; if it fails, the run fails at once.
"""

from __future__ import annotations

import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from kdcache.cache.manifest import Manifest, Plan
from kdcache.cache.writer import CacheWriter
from kdcache.errors import CacheError
from kdcache.models import load_model, refuse_narrow_head
from kdcache.progress import Progress, Silent
from kdcache.recipe import Recipe
from kdcache.teacher.budget import SAMPLE_POSITIONS, adopted_floors, find_floors
from kdcache.teacher.draws import chance_of
from kdcache.teacher.forward import TeacherForward
from kdcache.teacher.planning import PlannedCache, plan_cache, teacher_sections
from kdcache.teacher.sample import hidden_sample, sample_rows, shard_content

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


def capture(recipe: Recipe, progress: Progress | None = None) -> CaptureResult:
    """Make the recipe's cache, or go on with it where an earlier run stopped.

    Raises:
        KdcacheError: bad input, a directory of another plan, a full disk; committed shards stay.
    """
    progress = progress or Silent()
    started = time.monotonic()
    planned, teacher = settle_floors(recipe, plan_cache(recipe, progress), progress)
    writer = CacheWriter(recipe.cache.directory, planned.plan, planned.tokens.tokens)
    todo, complaints = writer.survey()
    for complaint in complaints:
        progress.warning(f"{complaint}; it is made again now")
    total = len(planned.plan.shards)
    if len(todo) < total:
        progress.message(f"{total - len(todo)} of {total} shards are there already")
    positions = sum(planned.plan.shards[i].positions for i in todo)
    if todo:
        teacher = teacher or load_teacher(recipe, planned)
        progress.begin("teacher cache", positions, "positions")
        try:
            _make_shards(recipe, planned, teacher, writer, todo, progress)
        finally:
            progress.end()
    manifest = writer.finalise()
    return CaptureResult(writer.directory, planned.plan, manifest, len(todo), positions, time.monotonic() - started)


def settle_floors(
    recipe: Recipe, planned: PlannedCache, progress: Progress, *, writing: bool = True
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
    teacher = load_teacher(recipe, planned)
    rows = sample_rows(planned, batch_tokens=section.batch_tokens, positions=SAMPLE_POSITIONS)
    sample = hidden_sample(teacher, rows, batch_tokens=section.batch_tokens)
    return find_floors(planned, sample, progress=progress), teacher


def load_teacher(recipe: Recipe, planned: PlannedCache) -> TeacherForward:
    """The recipe's teacher, ready to give rows over the plan's vocabulary."""
    _, section = teacher_sections(recipe)
    model = load_model(
        section.model,
        revision=section.revision,
        quantization=section.quantization,
        dtype=section.dtype,
        device=section.device,
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
