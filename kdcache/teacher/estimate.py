"""What a teacher run will cost, measured on a small sample of its own sequences before anything is written."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass, replace
from functools import partial

import torch

from kdcache.cache.codec import decode, encode
from kdcache.cache.shard import compress, pack, unpack
from kdcache.cache.strict_json import canonical
from kdcache.progress import Progress, Silent
from kdcache.recipe import Recipe
from kdcache.teacher.capture import load_teacher, settle_floors
from kdcache.teacher.draws import chance_of
from kdcache.teacher.planning import plan_cache, teacher_sections
from kdcache.teacher.sample import sample_rows, shard_content

# Copies of a shard's arrays that the forward pass, the queue and the writer hold at the same time.
_COPIES = 6
_SAMPLE_POSITIONS = 8192


@dataclass(frozen=True)
class Estimate:
    """Prediction for the whole run: positions, shards, bytes on disk, seconds, peak memory in bytes, and
    on how many positions it was measured."""

    positions: int
    shards: int
    cache_bytes: int
    seconds: float
    memory_bytes: int
    memory_of: str
    sampled_positions: int


def estimate(recipe: Recipe, progress: Progress | None = None) -> Estimate:
    """Run the teacher on an even sample of the plan's sequences and scale up. Writes nothing.

    What the run does once (reading the data, loading the teacher, finding floors) is timed as it is done here.

    Raises:
        KdcacheError: as `capture` would.
    """
    started = time.monotonic()
    planned, teacher = settle_floors(
        recipe, plan_cache(recipe, progress or Silent()), progress or Silent(), writing=False
    )
    teacher = teacher or load_teacher(recipe, planned)
    plan, (_, section) = planned.plan, teacher_sections(recipe)
    once = time.monotonic() - started
    rows = sample_rows(planned, batch_tokens=section.batch_tokens, positions=_SAMPLE_POSITIONS)
    chosen, numbers, thin = chance_of(plan, 0)
    run = partial(teacher, select=chosen, batch_tokens=section.batch_tokens, uniforms=numbers, thin=thin)
    run(rows[:1])  # first call pays for set-up
    cuda = teacher.device.type == "cuda"
    if cuda:
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
    positions = sum(s.positions for s in plan.data.splits)
    sampled, largest = len(sparse), max(s.positions for s in plan.shards)
    tokens = sum(s.tokens for s in plan.data.splits) / len(content.token_ids)
    vocabulary = len(compress(canonical(planned.tokens.tokens)))
    if cuda:
        memory = torch.cuda.max_memory_allocated()
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        # The sample's shard is in the peak already.
        memory += round(sum(a.nbytes for a in arrays.values()) / sampled * max(0, largest - sampled) * _COPIES)
    return Estimate(
        positions=positions,
        shards=len(plan.shards),
        cache_bytes=round(len(data) / sampled * positions) + vocabulary,
        # A second thread encodes and writes while the model runs; only the last shard is waited for.
        seconds=once + max(seconds * tokens + written * largest / sampled, written * positions / sampled),
        memory_bytes=memory,
        memory_of="GPU" if cuda else "process",
        sampled_positions=sampled,
    )
