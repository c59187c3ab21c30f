"""What a teacher run will cost, measured on a small sample of its own sequences before anything is written."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from kdcache.cache.codec import decode, encode, sequence_digest
from kdcache.cache.shard import compress, pack, unpack
from kdcache.cache.strict_json import canonical
from kdcache.data.tokens import TokenRow
from kdcache.progress import Progress, Silent
from kdcache.recipe import Recipe
from kdcache.teacher.answers import rows_of_answers
from kdcache.teacher.capture import load_ground, load_teacher, settle_floors
from kdcache.teacher.draws import chance_of
from kdcache.teacher.forward import TeacherForward
from kdcache.teacher.generate import prepare
from kdcache.teacher.planning import PlannedCache, plan_cache, plan_rows, teacher_sections
from kdcache.teacher.sample import sample_rows, shard_content

# Copies of a shard's arrays that the forward pass, the queue and the writer hold at the same time.
_COPIES = 6
_SAMPLE_POSITIONS = 8192


@dataclass(frozen=True)
class Estimate:
    """Prediction for the whole run: positions, shards, bytes on disk, seconds, peak memory in bytes, and
    on how many positions it was measured; in words what of it is the time for the teacher's answers, and the bytes of
    hidden states that wait on the disk until the cache is complete."""

    positions: int
    shards: int
    cache_bytes: int
    seconds: float
    memory_bytes: int
    memory_of: str
    sampled_positions: int
    answering: str | None = None
    waiting_bytes: int = 0


@dataclass(frozen=True)
class _Whole:
    """The whole run: positions and tokens of all shards, how many, positions of the largest; what answering prompts takes."""

    positions: int
    tokens: int
    shards: int
    largest: int
    answering_seconds: float = 0.0
    answering: str | None = None
    waiting_bytes: int = 0


def estimate(recipe: Recipe, progress: Progress | None = None) -> Estimate:
    """Run the teacher on an even sample of the plan's sequences and scale up. Writes nothing.

    What the run does once (reading the data, loading the teacher, finding floors) is timed as it is done here. Where the
    teacher answers prompts, it answers one batch of them.

    Raises:
        KdcacheError: as `capture` would.
    """
    started, progress = time.monotonic(), progress or Silent()
    data, _ = teacher_sections(recipe)
    if data.source == "generate":
        planned, teacher, whole, spent = _answered_sample(recipe, progress)
    else:
        planned, teacher, spent = plan_cache(recipe, progress), None, 0.0
        whole = _Whole(
            sum(s.positions for s in planned.plan.data.splits),
            sum(s.tokens for s in planned.plan.data.splits),
            len(planned.plan.shards),
            max(s.positions for s in planned.plan.shards),
        )
    planned, teacher = settle_floors(recipe, planned, progress, writing=False, teacher=teacher)
    teacher = teacher or load_teacher(recipe, planned)
    return _measured(recipe, planned, teacher, whole, time.monotonic() - started - spent)


def _answered_sample(recipe: Recipe, progress: Progress) -> tuple[PlannedCache, TeacherForward, _Whole, float]:
    """A plan over one batch of answers, evenly spread over the lengths of prompts; what all of them will come to; and the
    seconds that it took to answer."""
    task = prepare(recipe, progress)
    places = [place for batch in task.batches for place in batch if place[0] == 0]
    size = min(len(places), task.section.batch_size)
    batch = [places[int((i + 0.5) * len(places) / size)] for i in range(size)]
    teacher = load_ground(recipe, task.ground)
    started = time.monotonic()
    answers = task.answer(teacher, batch, lambda tokens: None)
    spent = time.monotonic() - started
    here = Path()
    splits, places_of = rows_of_answers(task.data, task.ground, task.asked[:1], [(here, batch, answers)], Silent())
    planned = plan_rows(recipe, task.ground, splits)

    def states(rows: Sequence[TokenRow]) -> torch.Tensor:
        spans = [places_of.places[sequence_digest(row.ids, row.targets)] for row in rows]
        return torch.cat([answers.states[start:stop] for _, start, stop in spans])

    if task.section.states == "reuse":
        planned = replace(planned, states=states)
    sampled, read = splits[0].tokenised, [split.tokenised for split in task.read]
    prompts = sum(map(len, task.batches))
    positions = round(sum(r.positions for r in sampled.rows) * prompts / size)
    seconds, tokens = spent * len(task.batches), len(answers.ids)
    whole = _Whole(
        positions + sum(r.positions for split in read for r in split.rows),
        round(sampled.tokens * prompts / size) + sum(split.tokens for split in read),
        math.ceil(positions / recipe.cache.positions_per_shard) + len(task.asked) - 1 + len(task.read),
        min(positions, recipe.cache.positions_per_shard),
        seconds,
        f"{seconds:,.0f} s to answer {prompts:,} prompts in {len(task.batches):,} batches of {task.section.batch_size}, "
        f"{tokens / spent:,.0f} tokens/s, {tokens / size:,.0f} tokens each, {1 - answers.ended.float().mean().item():.0%} without an end",
        0 if planned.states is None else round(answers.states.nbytes * prompts / size),
    )
    return planned, teacher, whole, spent


def _measured(recipe: Recipe, planned: PlannedCache, teacher: TeacherForward, whole: _Whole, once: float) -> Estimate:
    plan, (_, section) = planned.plan, teacher_sections(recipe)
    rows = sample_rows(planned, batch_tokens=section.batch_tokens, positions=_SAMPLE_POSITIONS)
    chosen, numbers, thin = chance_of(plan, 0)
    run = partial(teacher, select=chosen, batch_tokens=section.batch_tokens, uniforms=numbers, thin=thin)
    run(rows[:1])  # first call pays for set-up
    cuda = teacher.device.type == "cuda"
    if cuda and whole.answering is None:
        torch.cuda.reset_peak_memory_stats()
    started = time.monotonic()
    sparse = replace(run(rows), design=plan.design(0))
    if cuda:
        torch.cuda.synchronize()
    seconds = time.monotonic() - started
    content = shard_content(rows, sparse)
    started = time.monotonic()
    arrays = encode(content, values=plan.selection.values)
    data = pack(arrays, plan_digest=plan.digest, index=0)
    unpacked, _ = unpack(
        data,
        sequences=len(content),
        tokens=len(content.token_ids),
        positions=len(sparse),
        design=sparse.design,
        entries_limit=sparse.entries,
    )
    decode(unpacked, design=sparse.design, values=plan.selection.values)
    written = time.monotonic() - started
    positions, sampled, largest = whole.positions, len(sparse), whole.largest
    tokens = whole.tokens / len(content.token_ids)
    vocabulary = len(compress(canonical(planned.tokens.tokens)))
    if cuda:
        memory = torch.cuda.max_memory_allocated()
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        # The sample's shard is in the peak already.
        memory += round(sum(a.nbytes for a in arrays.values()) / sampled * max(0, largest - sampled) * _COPIES)
    return Estimate(
        positions=positions,
        shards=whole.shards,
        cache_bytes=round(len(data) / sampled * positions) + vocabulary,
        # A second thread encodes and writes while the model runs; only the last shard is waited for.
        seconds=once
        + whole.answering_seconds
        + max(seconds * tokens + written * largest / sampled, written * positions / sampled),
        memory_bytes=memory,
        memory_of="GPU" if cuda else "process",
        sampled_positions=sampled,
        answering=whole.answering,
        waiting_bytes=whole.waiting_bytes,
    )
