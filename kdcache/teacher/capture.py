"""PHASE ONE on one screen: a recipe becomes a cache directory.

data -> tokens -> plan -> for each shard that is not there: forward, select, encode, write -> manifest.
A second thread encodes and writes while the model runs; if it fails, the run fails at once.
"""

from __future__ import annotations

import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from kdcache.cache.codec import ShardContent
from kdcache.cache.manifest import Manifest
from kdcache.cache.rows import SparseRows
from kdcache.cache.writer import CacheWriter
from kdcache.data.tokens import TokenRow
from kdcache.models import load_model, refuse_narrow_head
from kdcache.progress import Progress, Silent
from kdcache.recipe import Recipe
from kdcache.teacher.forward import TeacherForward
from kdcache.teacher.planning import PlannedCache, plan_cache, teacher_sections
from kdcache.teacher.select import Selection, select

# Shards that may wait for the writer: more would only hold memory.
_QUEUED = 2


@dataclass(frozen=True)
class CaptureResult:
    """A finished cache: where it is, its manifest, and what this run did of it."""

    directory: Path
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
    planned = plan_cache(recipe, progress)
    writer = CacheWriter(recipe.cache.directory, planned.plan, planned.tokens.tokens)
    todo, complaints = writer.survey()
    for complaint in complaints:
        progress.warning(f"{complaint}; it is made again now")
    total = len(planned.plan.shards)
    if len(todo) < total:
        progress.message(f"{total - len(todo)} of {total} shards are there already")
    positions = sum(planned.plan.shards[i].positions for i in todo)
    if todo:
        teacher = load_teacher(recipe, planned)
        progress.begin("teacher cache", positions, "positions")
        try:
            _make_shards(recipe, planned, teacher, writer, todo, progress)
        finally:
            progress.end()
    manifest = writer.finalise()
    return CaptureResult(writer.directory, manifest, len(todo), positions, time.monotonic() - started)


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


def select_with(recipe: Recipe) -> Selection:
    """The recipe's selection as the value `select` takes."""
    section = recipe.selection
    return Selection(section.method, section.k, section.floor, section.temperatures)


def shard_content(rows: list[TokenRow], sparse: SparseRows) -> ShardContent:
    """Token rows and their sparse rows, laid end to end."""
    return ShardContent(
        lengths=np.array([len(r.ids) for r in rows], dtype=np.int64),
        token_ids=np.concatenate([r.ids for r in rows]),
        targets=np.concatenate([r.targets for r in rows]),
        rows=sparse,
    )


def _make_shards(
    recipe: Recipe,
    planned: PlannedCache,
    teacher: TeacherForward,
    writer: CacheWriter,
    todo: list[int],
    progress: Progress,
) -> None:
    _, section = teacher_sections(recipe)
    chosen = partial(select, selection=select_with(recipe))
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
                rows = planned.shard_rows(index)
                sparse = teacher(rows, chosen, batch_tokens=section.batch_tokens, on_batch=on_batch)
                written.append(pool.submit(writer.commit, index, shard_content(rows, sparse)))
                collect(_QUEUED)
            collect(0)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
