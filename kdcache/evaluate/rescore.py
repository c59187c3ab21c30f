"""Is a cache what its teacher says? The teacher is run again on some of its sequences and compared, number by number.

Hashes prove that nobody changed a cache since it was made, not that it was made honestly. A teacher run again never gives
the same bits: other batches, other kernels. So it is run twice, in batches as the cache was made and one sequence at a
time, and what the two runs disagree by is the **control**. What the cache and the teacher disagree by, beyond the rounding
that ``cache_format.md`` states, should be no more than that.

Axes: ``P`` positions, ``H`` head entries, ``M`` tail entries, ``B`` declared temperatures, ``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kdcache.cache import layout
from kdcache.cache.codec import CachedSequence
from kdcache.cache.manifest import Plan
from kdcache.cache.reader import Cache, Split, open_cache
from kdcache.cache.rows import SparseRows
from kdcache.data.tokens import TokenRow
from kdcache.errors import CacheError, ModelError
from kdcache.evaluate.disagreement import Disagreement, Measure, Membership, Rescore
from kdcache.models import identify, load_model, refuse_narrow_head
from kdcache.progress import Progress, Silent
from kdcache.teacher.draws import chance_of
from kdcache.teacher.forward import LOGIT_BYTES, TeacherForward, length_buckets
from kdcache.teacher.select import mean_of_rows

Numbers = NDArray[np.float64]

_HALF = 2.0**-11, 2.0**-25


@dataclass(frozen=True)
class _Scored:
    """A sequence as the teacher sees it: its numbers for what the cache holds, and what it would keep itself."""

    label: Numbers
    head: Numbers
    tail: Numbers
    rest: Numbers
    own: SparseRows


def rescore(
    directory: str | Path, *, sequences: int, teacher: str | None = None, progress: Progress | None = None
) -> Rescore:
    """Run a cache's teacher again on some of its sequences, twice, and compare.

    Args:
        directory: a complete cache.
        sequences: how many to take, evenly spread over all splits.
        teacher: folder or id of the teacher; None takes the name in the plan.
        progress: told about long work.

    Raises:
        KdcacheError: no such cache, or the teacher is not found or has another fingerprint.
    """
    progress = progress or Silent()
    cache = open_cache(directory)
    picked = pick(cache, sequences)
    forward = cached_teacher(cache, teacher)
    progress.begin("rescore", 2 * len(picked), "sequences")
    try:
        batched = _score(cache.plan, forward, picked, cache.plan.teacher.batch_tokens, progress.advance)
        alone = _score(cache.plan, forward, picked, 1, progress.advance)
    finally:
        progress.end()
    stored = [s for _, s in picked]
    return Rescore(
        teacher=cache.plan.teacher.name,
        sequences=len(picked),
        positions=sum(len(s.rows) for s in stored),
        measures=_measures(cache.plan, stored, batched, alone),
        members=_members(cache.plan, stored, batched, alone),
    )


def pick(cache: Cache, count: int) -> list[tuple[int, CachedSequence]]:
    """Evenly spread sequences over all splits, each with the number of its split: the same for the same cache."""
    splits: list[Split] = list(cache.splits.values())
    places = [(split, i) for split in splits for i in range(len(split))]
    count = min(count, len(places))
    chosen = (places[int((i + 0.5) * len(places) / count)] for i in range(count))
    return [(split.number, split[i]) for split, i in chosen]


def cached_teacher(cache: Cache, teacher: str | None) -> TeacherForward:
    """The teacher that a cache names, loaded as the cache was made with it.

    Args:
        cache: whose.
        teacher: folder or id where it lies; None takes the name in the plan.

    Raises:
        CacheError: it is not there, or is another model.
        ModelError: it cannot be loaded.
    """
    identity, name = cache.plan.teacher, teacher or cache.plan.teacher.name
    try:
        found = identify(name, identity.revision)
    except ModelError as exc:
        raise CacheError(
            f"the teacher of {cache.directory} is not found at {name}; say where it lies with --teacher"
        ) from exc
    # A folder copied from the Hub has a fingerprint of its files, the plan one of repository and commit.
    copied = Path(name).is_dir() and identity.revision is not None
    if found.fingerprint != identity.fingerprint and not copied:
        raise CacheError(
            f"{name} is not the teacher of {cache.directory}: its fingerprint is {found.fingerprint[:12]}, the plan's "
            f"{identity.fingerprint[:12]} ({identity.name}); give that model with --teacher"
        )
    model = load_model(
        name,
        revision=None if copied else identity.revision,
        quantization=identity.quantization,
        dtype=identity.dtype,
    )
    refuse_narrow_head(model, cache.vocab_size, name)
    return TeacherForward(model, vocab_size=cache.vocab_size, pad_id=cache.plan.tokenizer.pad_id)


@torch.inference_mode()
def _score(
    plan: Plan,
    forward: TeacherForward,
    picked: list[tuple[int, CachedSequence]],
    batch_tokens: int,
    advance: Callable[[int], None],
) -> list[_Scored]:
    rows = [TokenRow(i, s.token_ids, s.targets) for i, (_, s) in enumerate(picked)]
    scored: dict[int, _Scored] = {}
    for batch in length_buckets([len(r.ids) for r in rows], batch_tokens):
        hidden_PD, labels_P = forward.hidden([rows[i] for i in batch])
        start = 0
        for i in batch:
            number, sequence = picked[i]
            span = slice(start, start + len(sequence.rows))
            start = span.stop
            chosen, numbers, thin = chance_of(plan, number)
            own = forward.rows_of([rows[i]], hidden_PD[span], labels_P[span], chosen, uniforms=numbers, thin=thin)[0]
            scored[i] = _of_cached_entries(forward, hidden_PD[span], sequence.rows, own)
        advance(len(batch))
    return [scored[i] for i in range(len(rows))]


def _of_cached_entries(
    forward: TeacherForward, hidden_PD: torch.Tensor, stored: SparseRows, own: SparseRows
) -> _Scored:
    """The teacher's numbers for the entries that the cache holds, in float64."""
    heads, tails = [np.zeros(0)], [np.zeros(0)]
    rests = [np.zeros((0, len(stored.design.temperatures)))]
    chunk = max(1, LOGIT_BYTES // (16 * forward.head.width))
    for start in range(0, len(stored), chunk):
        part = stored.slice(start, min(start + chunk, len(stored)))
        logits_CV = forward.head.logits(hidden_PD[start : start + chunk]).double()
        logits_CV -= logits_CV.amax(dim=1, keepdim=True)
        row_H, id_H = _places(part.head, part.head_ids, logits_CV.device)
        head_H = logits_CV[row_H, id_H]
        heads.append(head_H.cpu().numpy())
        tails.append(logits_CV[_places(part.tail, part.tail_ids, logits_CV.device)].cpu().numpy())
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
    return _Scored(own.label_log_prob.astype(np.float64), np.concatenate(heads), tail, rest.ravel(), own)


def _places(
    counts: NDArray[np.int64], ids: NDArray[np.uint32], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and vocabulary ids of entries."""
    rows = np.repeat(np.arange(len(counts)), counts)
    return torch.from_numpy(rows).to(device), torch.from_numpy(ids.astype(np.int64)).to(device)


def _measures(plan: Plan, stored: list[CachedSequence], batched: list[_Scored], alone: list[_Scored]) -> list[Measure]:
    quantised = plan.selection.values == "quantised"
    head_step = layout.HEAD_STEP if quantised else None
    tail_step = layout.TAIL_STEP if quantised and plan.selection.tail_logits else None
    kinds: dict[str, tuple[Callable[[SparseRows], NDArray[np.float32]], Callable[[Numbers], Numbers]]] = {
        "label": (lambda rows: rows.label_log_prob, _rounding(None)),
        "head": (lambda rows: rows.head_logits, _rounding(head_step)),
        "tail": (lambda rows: rows.tail_logits, _rounding(tail_step)),
        "rest": (lambda rows: rows.rest[rows.kept].ravel(), lambda x: np.full_like(x, layout.REST_STEP / 2)),
    }
    titles = {"label": "label log-prob", "head": "head logits", "tail": "tail logits", "rest": "rest log-odds"}
    measures = []
    for kind, (of_rows, bound) in kinds.items():
        held = _joined(of_rows(s.rows) for s in stored)
        first, second = (_joined(getattr(s, kind) for s in run) for run in (batched, alone))
        floor = _lowest(kind, head_step if kind == "head" else tail_step)
        first, second = np.maximum(first, floor), np.maximum(second, floor)
        off = np.abs(held - first)
        beyond = np.maximum(off - bound(first), 0.0)
        control = Disagreement.of(np.abs(first - second))
        measures.append(Measure(titles[kind], Disagreement.of(off), Disagreement.of(beyond), control))
    return measures


def _rounding(step: float | None) -> Callable[[Numbers], Numbers]:
    """What the format may be off by (``cache_format.md``, section 4): half a step, or half precision's rounding."""
    if step is not None:
        return lambda x: np.full_like(x, step / 2)
    return lambda x: np.maximum(np.abs(x) * _HALF[0], _HALF[1])


def _lowest(kind: str, step: float | None) -> float:
    """What everything below is stored as."""
    if kind == "rest":
        return -layout.REST_LIMIT
    return -layout.HALF_LIMIT if kind == "label" or step is None else -layout.LEVEL_LIMIT * step


def _joined(parts: Iterable[NDArray[Any]]) -> Numbers:
    return np.concatenate([p.astype(np.float64) for p in parts])


def _members(
    plan: Plan, stored: list[CachedSequence], batched: list[_Scored], alone: list[_Scored]
) -> list[Membership]:
    """Who is in the head, who was drawn, and which rows are left empty."""
    kinds = {"other heads": ("head", "head_ids")}
    # A cache made from others was drawn under its parents' plans.
    if plan.design(0).sampled and plan.derived is None:
        kinds["other draws"] = ("tail", "tail_ids")
    members = []
    for title, (counts, ids) in kinds.items():
        total = held_alone = twice_alone = 0
        for sequence, first, second in zip(stored, batched, alone, strict=True):
            rows = sequence.rows
            held, own, again = (
                set(zip(_owners(getattr(r, counts)), getattr(r, ids).tolist(), strict=True))
                for r in (rows, first.own, second.own)
            )
            total += len(held)
            held_alone += len(held ^ own)
            twice_alone += len(own ^ again)
        members.append(Membership(title, total, held_alone / max(1, 2 * total), twice_alone / max(1, 2 * total)))
    return members


def _owners(counts: NDArray[np.int64]) -> list[int]:
    owners: list[int] = np.repeat(np.arange(len(counts)), counts).tolist()
    return owners
