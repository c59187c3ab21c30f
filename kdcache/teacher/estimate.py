"""What a teacher run will cost, measured on a small sample of its own sequences before anything is written."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass
from functools import partial

import torch

from kdcache.cache.codec import encode
from kdcache.cache.shard import compress, pack
from kdcache.cache.strict_json import canonical
from kdcache.progress import Progress, Silent
from kdcache.recipe import Recipe
from kdcache.teacher.capture import load_teacher, select_with, shard_content
from kdcache.teacher.forward import length_buckets
from kdcache.teacher.planning import plan_cache, teacher_sections
from kdcache.teacher.select import select

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

    Raises:
        KdcacheError: as `capture` would.
    """
    planned = plan_cache(recipe, progress or Silent())
    _, section = teacher_sections(recipe)
    rows = [row for split in planned.rows for row in split]
    positions = sum(r.positions for r in rows)
    # Whole batches as the run will form them, evenly spread over the lengths: batches of few or short
    # sequences run at another rate.
    batches = length_buckets([len(r.ids) for r in rows], section.batch_tokens)
    stride = max(1, -(-positions // _SAMPLE_POSITIONS))
    chosen_batches = batches[stride // 2 :: stride] or batches[:1]
    sample = [rows[i] for batch in chosen_batches for i in batch]
    teacher = load_teacher(recipe, planned)
    chosen = partial(select, selection=select_with(recipe))
    teacher(sample[:1], chosen, batch_tokens=section.batch_tokens)  # first call pays for set-up
    cuda = teacher.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    started = time.monotonic()
    sparse = teacher(sample, chosen, batch_tokens=section.batch_tokens)
    if cuda:
        torch.cuda.synchronize()
    seconds = time.monotonic() - started
    data = pack(encode(shard_content(sample, sparse)), plan_digest=planned.plan.digest, index=0)
    scale = positions / len(sparse)
    token_scale = sum(len(r.ids) for r in rows) / sum(len(r.ids) for r in sample)
    if cuda:
        memory = torch.cuda.max_memory_allocated()
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Estimate(
        positions=positions,
        shards=len(planned.plan.shards),
        cache_bytes=round(len(data) * scale) + len(compress(canonical(planned.tokens.tokens))),
        seconds=seconds * token_scale,
        memory_bytes=memory,
        memory_of="GPU" if cuda else "process",
        sampled_positions=len(sparse),
    )
