"""Is a cache what its teacher says? The teacher is run again on some of its sequences and compared, number by number.

Hashes prove that nobody changed a cache since it was made, not that it was made honestly. A teacher run again never gives
the same bits: other batches, other kernels. So it is run twice, in the batches of the cache's own shards and in others,
and what the two runs disagree by is the **control** (a cache of the teacher's own answers was made as these were written, and
there the other run goes token by token as well). What the cache and the teacher disagree by, beyond the rounding that
``cache_format.md`` states, should be no more than that. The sequences are drawn at random, so that no forger knows which to
keep honest.

Draws can be made again where the plan behind them is known. Those of a cache made from others cannot; whether chance made
them can be asked of any (`off_chance`).

Axes: ``P`` positions, ``C`` some of them, ``H`` head entries, ``M`` tail entries, ``E`` drawn entries, ``B`` declared
temperatures, ``V`` vocabulary.
"""

from __future__ import annotations

import random
import secrets
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from kdcache.cache import layout
from kdcache.cache.codec import CachedSequence, ShardContent
from kdcache.cache.manifest import Plan
from kdcache.cache.reader import Cache, open_cache
from kdcache.cache.rows import SparseRows, concatenate
from kdcache.data.tokens import TokenRow
from kdcache.evaluate import disagreement
from kdcache.evaluate.cached_teacher import cached_teacher
from kdcache.evaluate.disagreement import NOT_COMPARED, Place, Rescore, Scored
from kdcache.progress import Progress, Silent
from kdcache.recipe_data import made_by_steps
from kdcache.teacher.decode import replay
from kdcache.teacher.draws import chance_of
from kdcache.teacher.forward import LOGIT_BYTES, TeacherForward, length_buckets
from kdcache.teacher.select import mean_of_rows

# A stranger's plan can ask for batches of any size.
_BATCH_TOKENS = 1 << 18

Numbers = NDArray[np.float64]
_Entries = tuple[torch.Tensor, torch.Tensor]
_Run = tuple[Scored, Scored]
_Hidden = Callable[[Sequence[TokenRow]], tuple[torch.Tensor, torch.Tensor]]


def rescore(
    directory: str | Path,
    *,
    sequences: int,
    teacher: str | None = None,
    seed: int | None = None,
    progress: Progress | None = None,
) -> Rescore:
    """Run a cache's teacher again on some of its sequences, twice, and compare.

    Args:
        directory: a complete cache.
        sequences: how many to take, at random.
        teacher: folder or id of the teacher; None takes the name in the plan.
        seed: behind the choice of sequences; None takes one that nobody could know when the cache was made.
        progress: told about long work, and which model is loaded.

    Raises:
        KdcacheError: no such cache, or the teacher is not found or has another fingerprint.
    """
    progress = progress or Silent()
    cache = open_cache(directory)
    plan = cache.plan
    seed = secrets.randbits(32) if seed is None else seed
    places = pick(cache, sequences, seed)
    progress.message(
        f"loading the teacher {teacher or plan.teacher.name}{'' if teacher else ', the name that the cache gives'}"
    )
    forward = cached_teacher(cache, teacher)
    stored: list[CachedSequence] = []
    runs: list[_Run] = []
    progress.begin("rescore", len(places), "sequences")
    try:
        for (split, shard), numbers in _by_shard(cache, places).items():
            content = cache.shard(shard)
            runs += _score(plan, forward, content, split, numbers, progress.advance)
            # A copy: a slice would keep its whole shard in memory.
            stored += [replace(content[i], rows=concatenate([content[i].rows])) for i in numbers]
    finally:
        progress.end()
    sides = [first for first, _ in runs], [second for _, second in runs]
    draws = "none" if not disagreement.draw_questions(plan) else "compared" if plan.derived is None else NOT_COMPARED
    return Rescore(
        teacher=plan.teacher.name,
        seed=seed,
        sequences=len(places),
        positions=sum(len(s.rows) for s in stored),
        looked_at=places,
        draws=draws,
        measures=disagreement.measures(plan, stored, *sides),
        members=disagreement.members(plan, stored, *sides),
        drawings=disagreement.drawings(plan, stored, *sides),
    )


def pick(cache: Cache, count: int, seed: int) -> list[Place]:
    """One sequence at random from each of ``count`` equal stretches of all splits, in their order."""
    places = [Place(name, i) for name, split in cache.splits.items() for i in range(len(split))]
    count = min(count, len(places))
    chance = random.Random(seed)
    borders = [i * len(places) // count for i in range(count + 1)] if count else [0]
    return [places[chance.randrange(a, b)] for a, b in pairwise(borders)]


def _by_shard(cache: Cache, places: list[Place]) -> dict[tuple[int, int], list[int]]:
    """Split and number of the shards that hold the places, and their sequences there."""
    found: dict[tuple[int, int], list[int]] = {}
    for place in places:
        split = cache.split(place.split)
        nth = bisect_right(split.starts, place.index) - 1
        found.setdefault((split.number, split.shards[nth]), []).append(place.index - split.starts[nth])
    return found


@torch.inference_mode()
def _score(
    plan: Plan,
    forward: TeacherForward,
    content: ShardContent,
    split: int,
    wanted: list[int],
    advance: Callable[[int], None] = lambda count: None,
) -> list[_Run]:
    """The wanted sequences of a shard in the batches that it was made in, and each alone, or not alone where it was."""
    rows = [TokenRow(i, content[i].token_ids, content[i].targets) for i in range(len(content))]
    chosen, numbers, thin = chance_of(plan, split)
    stepwise = made_by_steps(plan.data.splits[split].selected)

    def run(batch: list[int], of: list[int], hidden: _Hidden = forward.hidden) -> dict[int, Scored]:
        hidden_PD, labels_P = hidden([rows[i] for i in batch])
        starts = np.cumsum([0] + [rows[i].positions for i in batch]).tolist()
        found = {}
        for i in of:
            at = batch.index(i)
            span = slice(starts[at], starts[at + 1])
            own = forward.rows_of(
                [rows[i]], hidden_PD[span], labels_P[span], chosen, uniforms=numbers,
                thin=None if plan.derived else thin,
            )[0]  # fmt: skip
            found[i] = _of_cached_entries(forward, hidden_PD[span], content[i].rows, own)
        return found

    first: dict[int, Scored] = {}
    second: dict[int, Scored] = {}
    lengths = content.lengths.tolist()
    for bucket in length_buckets(lengths, min(plan.teacher.batch_tokens, _BATCH_TOKENS)):
        here = [i for i in bucket if i in wanted]
        if here:
            first |= run(bucket, here)
        for i in here:
            if stepwise:
                second |= run([i], [i], lambda members: replay(forward, members))
            else:
                second |= run([i] if len(bucket) > 1 else [i, _companion(lengths, i)], [i])
        advance(len(here))
    return [(first[i], second[i]) for i in wanted]


def _companion(lengths: list[int], own: int) -> int:
    """The sequence nearest in length but not as long, so that one of the two is padded; itself where there is no other."""
    others = (i for i in range(len(lengths)) if i != own)
    return min(others, key=lambda i: (lengths[i] == lengths[own], abs(lengths[i] - lengths[own]), i), default=own)


def _of_cached_entries(forward: TeacherForward, hidden_PD: torch.Tensor, stored: SparseRows, own: SparseRows) -> Scored:
    """The teacher's numbers for the entries that the cache holds, in float64."""
    heads, tails = [np.zeros(0)], [np.zeros(0)]
    declared = len(stored.design.temperatures)
    rests, drawn = [np.zeros((0, declared))], [np.zeros((0, 2 + declared if stored.design.sampled else 0, 3))]
    chunk = max(1, LOGIT_BYTES // (64 * forward.head.width))
    for start in range(0, len(stored), chunk):
        part = stored.slice(start, min(start + chunk, len(stored)))
        logits_CV = forward.head.logits(hidden_PD[start : start + chunk]).double()
        logits_CV -= logits_CV.amax(dim=1, keepdim=True)
        row_H, id_H = head = _places(part.head, part.head_ids, logits_CV.device)
        head_H = logits_CV[row_H, id_H]
        heads.append(head_H.cpu().numpy())
        tail_M = _places(part.tail, part.tail_ids, logits_CV.device)
        tails.append(logits_CV[tail_M].cpu().numpy())
        if part.design.sampled:
            drawn.append(off_chance(logits_CV, part, head, tail_M)[part.kept])
        outside_CV = logits_CV.index_put((row_H, id_H), logits_CV.new_tensor(-torch.inf))
        log_odds = []
        for t in stored.design.temperatures:
            inside_C = logits_CV.new_zeros(len(part)).index_add_(0, row_H, (head_H / t).exp())
            log_odds.append(torch.logsumexp(outside_CV / t, dim=1) - inside_C.log())
        limit = layout.REST_LIMIT
        rests.append(torch.stack(log_odds, dim=1).clamp(-limit, limit - layout.REST_STEP).cpu().numpy())
    tail = np.concatenate(tails)
    if not stored.design.tail_logits:
        tail = mean_of_rows(tail, stored.tail)
    rest = np.concatenate(rests)[stored.kept]
    numbers = np.concatenate(heads), tail, rest.ravel(), np.concatenate(drawn)
    return Scored(own.label_log_prob.astype(np.float64), *numbers, own)


def off_chance(logits_CV: torch.Tensor, rows: SparseRows, head: _Entries, tail: _Entries) -> Numbers:
    """Rows' draws against what chance gives on average by the teacher's own numbers, as `Scored` holds it.

    An entry's place is the share of all chances that belongs to smaller entries (or to lower ids), and half its own: drawn
    by size, places have mean 1/2 and a variance below 1/12. A row's sum over at most m entries has at most m times the
    mean sum of their squares as its variance (Cauchy and Schwarz), however they depend on each other.

    Args:
        logits_CV: float64.
        rows: those of the cache.
        head: rows and ids of their head entries.
        tail: the same of their drawn entries.
    """
    design, count = rows.design, len(rows)
    share_BCV = [torch.softmax(logits_CV / t, dim=1) for t in design.temperatures]
    outside_BCV = [s.index_put(head, s.new_zeros(())) for s in share_BCV]
    (row_E, id_E), weight_E = tail, logits_CV.new_ones(len(tail[0]))
    if rows.head_counts is not None and rows.tail_counts is not None:
        # Draws with replacement fall on the head too, and are independent of each other.
        chance_CV, slots_C = share_BCV[0] * design.draws, logits_CV.new_full((count,), design.draws)
        row_E, id_E = torch.cat([tail[0], head[0]]), torch.cat([tail[1], head[1]])
        counts = np.concatenate([rows.tail_counts, rows.head_counts]).astype(np.float64)
        weight_E, together = torch.from_numpy(counts).to(logits_CV), 1.0 / design.draws
    else:
        chances = [p / floor for p, floor in zip(outside_BCV, design.floors, strict=True)]
        chance_CV, together = torch.stack(chances).amax(dim=0), 1.0
        slots_C = chance_CV.sum(dim=1).ceil().clamp_(min=1.0)
    total_C = chance_CV.sum(dim=1)

    def summed(values_E: torch.Tensor) -> torch.Tensor:
        return logits_CV.new_zeros(count).index_add_(0, row_E, values_E * weight_E) / slots_C

    found = []
    by_id_CV = torch.arange(design.vocab_size, device=row_E.device).expand_as(logits_CV)
    for order_CV in (logits_CV.argsort(dim=1), by_id_CV):
        sorted_CV = chance_CV.gather(1, order_CV)
        middle_CV = (sorted_CV.cumsum(dim=1) - sorted_CV / 2) / total_C.clamp(min=1e-300)[:, None]
        place_CV = torch.empty_like(middle_CV).scatter_(1, order_CV, middle_CV)
        variance_C = total_C / slots_C / 12 * together
        found.append((summed(place_CV[row_E, id_E] - 0.5), variance_C, torch.full_like(total_C, 0.5 * together)))
    for b, outside_CV in enumerate(outside_BCV):
        if design.draws:
            mass_C = outside_CV.sum(dim=1)
            tails_E = (torch.arange(len(row_E), device=row_E.device) < len(tail[0])).to(logits_CV)
            off_C, variance_C = summed(tails_E) - mass_C, mass_C * (1 - mass_C) * together
        else:
            # What an entry stands for, over the most that one can.
            worth_CV = outside_CV / (chance_CV * design.floors[b]).clamp(min=1e-300)
            mean_C = (worth_CV * chance_CV).sum(dim=1) / slots_C
            off_C = summed(worth_CV[row_E, id_E]) - mean_C
            variance_C = (worth_CV.square() * chance_CV).sum(dim=1) / slots_C - mean_C.square()
        found.append((off_C, variance_C, torch.full_like(total_C, together)))
    return torch.stack([torch.stack(f, dim=1) for f in found], dim=1).cpu().numpy()


def _places(counts: NDArray[np.int64], ids: NDArray[np.uint32], device: torch.device) -> _Entries:
    """Rows and vocabulary ids of entries."""
    rows = np.repeat(np.arange(len(counts)), counts)
    return torch.from_numpy(rows).to(device), torch.from_numpy(ids.astype(np.int64)).to(device)
