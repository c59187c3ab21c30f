"""What the valid golden caches hold: distributions by an integer formula, nothing left to a generator of random numbers.

The logits of row p over V ids are ``-step * ((37 v + 11 p) mod modulus)``. Draws follow the document's section on them, so
that a golden also fixes which entries a plan digest and a sequence digest draw.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace

import numpy as np

from kdcache.cache import layout
from kdcache.cache.codec import CachedSequence, ShardContent, sequence_digest
from kdcache.cache.manifest import DataPlan, Derivation, Plan, ShardPlan, SplitPlan, TeacherIdentity, TokenizerIdentity
from kdcache.cache.rows import SparseRows, concatenate
from kdcache.cache.selection import SelectionPlan
from kdcache.cache.strict_json import canonical

TOKENS = ["<s>", "</s>", "a", "é", '"', "\U0001f600", *(f"t{i}" for i in range(6, 15)), None]
WIDE = TOKENS + [None] * (70_000 - 17) + ["last"]
# Token ids and target flags. The middle of the second is a prompt: it is read and not learnt.
A = ([0, 5, 9], [0, 1, 1])
B = ([0, 3, 7, 2, 1], [0, 0, 1, 1, 1])
WIDE_A = ([0, 65_535, 65_536], [0, 1, 1])
WIDE_B = ([0, 3, 69_999, 2, 1], [0, 0, 1, 1, 1])


@dataclass(frozen=True)
class Golden:
    """One valid cache: ``shards`` as (split, sequences), and what its selection changes."""

    method: str
    shards: list[tuple[int, list[tuple[list[int], list[int]]]]]
    selection: dict[str, object] = field(default_factory=dict)
    tokens: list[str | None] = field(default_factory=lambda: TOKENS)
    system: str | None = None
    derived: Derivation | None = None


BOTH = {"temperatures": (1.0, 2.0)}
FLOORS = {**BOTH, "floors": (0.25, 0.125)}
GOLDENS = {
    "top_k": Golden("top_k", [(0, [A]), (1, [B])], {**BOTH, "k": 4}),
    "threshold": Golden("threshold", [(0, [A, B])], {**FLOORS, "k": 3}),
    "threshold_sampling": Golden("threshold_sampling", [(0, [A]), (0, [B])], FLOORS),
    "random_sampling": Golden("random_sampling", [(0, [A, B])], {"draws": 8}),
    "ids_alone": Golden("threshold_sampling", [(0, [A, B])], {"floors": (0.125,), "tail_logits": False}),
    "half": Golden("threshold_sampling", [(0, [A, B])], {**FLOORS, "values": "half"}),
    "selected": Golden("threshold_sampling", [(0, [B]), (1, [A])], {**FLOORS, "positions": "loss", "quantile": 0.4}),
    # Also every kind of number and character that canonical JSON writes in its own way.
    "derived": Golden(
        "top_k",
        [(0, [A, B])],
        {"k": 2, "temperatures": (1e-05, 0.1, 1.0, 64.0), "bytes_per_position": 1e16, "quantile": 0.0001},
        system='"\\/\b\t\n\f\r\x01~\x7fé\u20ac\U0001f600',
        derived=Derivation(operation="subset", parents=("a" * 64,), settings={"k": "2", "Z": "é"}),
    ),
    "wide_ids": Golden("threshold_sampling", [(0, [WIDE_A]), (1, [WIDE_B])], {"floors": (1e-2,)}, WIDE),
}


def plan_of(golden: Golden) -> Plan:
    """The plan of a golden cache."""
    names = ["train", "validation"][: 1 + max(split for split, _ in golden.shards)]
    splits = []
    for number, name in enumerate(names):
        own = [sequence for split, shard in golden.shards if split == number for sequence in shard]
        digests = b"".join(sequence_digest(np.array(ids, "<u4"), np.array(flags, bool)) for ids, flags in own)
        splits.append(
            SplitPlan(
                name=name, source="golden", revision=None, selected=name, examples=len(own), dropped_empty=0,
                dropped_no_target=0, truncated=0, sequences=len(own), tokens=sum(len(ids) for ids, _ in own),
                positions=sum(sum(flags) for _, flags in own), fingerprint=hashlib.sha256(digests).hexdigest(),
            )
        )  # fmt: skip
    shards, reached = [], [0] * len(names)
    for split, own in golden.shards:
        tokens, positions = sum(len(ids) for ids, _ in own), sum(sum(flags) for _, flags in own)
        shards.append(
            ShardPlan(split=split, start=reached[split], sequences=len(own), tokens=tokens, positions=positions)
        )
        reached[split] += len(own)
    selection = {
        "method": golden.method, "k": 64, "floors": (), "draws": 16, "temperatures": (1.0,), "bytes_per_position": None,
        "tail_logits": True, "values": "quantised", "positions": "all", "quantile": 0.0,
    }  # fmt: skip
    return Plan(
        format=layout.FORMAT,
        version=layout.VERSION,
        teacher=TeacherIdentity(
            name="golden", revision=None, fingerprint="0" * 64, architecture="Formula", quantization="none",
            dtype="float64", batch_tokens=64,
        ),
        tokenizer=TokenizerIdentity(
            name="golden", fingerprint=hashlib.sha256(canonical(golden.tokens)).hexdigest(),
            vocab_size=len(golden.tokens), eos_id=1, pad_id=1,
        ),
        data=DataPlan(
            shape="text", columns={}, prompt="plain", system=golden.system, date="2024-07-26", template_sha256=None,
            max_length=16, splits=tuple(splits),
        ),
        selection=SelectionPlan(**{**selection, **golden.selection}),
        shards=tuple(shards),
        derived=golden.derived,
    )  # fmt: skip


def content_of(golden: Golden, plan: Plan, shard: int) -> ShardContent:
    """The content of one shard, as a teacher that computes the formula would have selected it."""
    split, sequences = golden.shards[shard]
    made = [_sequence(ids, flags, plan, split) for ids, flags in sequences]
    return ShardContent(
        lengths=np.array([len(s.token_ids) for s in made], dtype=np.int64),
        token_ids=np.concatenate([s.token_ids for s in made]),
        targets=np.concatenate([s.targets for s in made]),
        rows=concatenate([s.rows for s in made]),
    )


def logits_of(row: int, vocabulary: int) -> np.ndarray:
    """float64 ``[V]``, the largest 0."""
    step, modulus = (0.3, 29) if vocabulary <= 1 << 16 else (1 / 64, 69_997)
    steps = (37 * np.arange(vocabulary) + 11 * row) % modulus
    return -step * (steps - steps.min())


def uniforms_of(plan: Plan, ids: np.ndarray, flags: np.ndarray, per_row: int) -> np.ndarray:
    """float64 ``[P, per_row]`` as the document derives them from the digests."""
    seed = bytes.fromhex(plan.digest) + sequence_digest(ids, flags)
    words = np.frombuffer(hashlib.shake_256(seed).digest(8 * int(flags.sum()) * per_row), dtype="<u8")
    return ((words >> np.uint64(11)).astype(np.float64) * 2.0**-53).reshape(-1, per_row)


def _sequence(ids: list[int], flags: list[int], plan: Plan, split: int) -> CachedSequence:
    tokens, targets = np.array(ids, dtype=np.uint32), np.array(flags, dtype=bool)
    design = plan.design(split)
    uniforms = uniforms_of(plan, tokens, targets, max(1, design.draws))
    heads, tails, head_counts, tail_counts, rest, labels = [], [], [], [], [], []
    logits = [logits_of(row, design.vocab_size) for row in range(len(uniforms))]
    for y, u, label in zip(logits, uniforms, tokens[targets], strict=True):
        shares = [np.exp(y / t) / np.exp(y / t).sum() for t in design.temperatures]
        head, tail, times = _selected(shares, plan.selection, u)
        heads.append(head)
        tails.append(tail)
        head_counts.append(times[head])
        tail_counts.append(times[tail])
        inside = np.isin(np.arange(len(y)), head)
        rest.append([np.log(max(p[~inside].sum() / p[inside].sum(), np.exp(-layout.REST_LIMIT))) for p in shares])
        labels.append(y[label] - np.log(np.exp(y).sum()))
    tail_logits = [y[tail] for y, tail in zip(logits, tails, strict=True)]
    if not design.tail_logits:
        tail_logits = [np.full(len(t), t.mean() if len(t) else 0.0) for t in tail_logits]
    rows = SparseRows(
        head=np.array([len(h) for h in heads]),
        tail=np.array([len(t) for t in tails]),
        head_ids=np.concatenate(heads).astype(np.uint32),
        head_logits=np.concatenate([y[h] for y, h in zip(logits, heads, strict=True)]).astype(np.float32),
        tail_ids=np.concatenate(tails).astype(np.uint32),
        tail_logits=np.concatenate(tail_logits).astype(np.float32),
        rest=np.array(rest, dtype=np.float32),
        label_log_prob=np.array(labels, dtype=np.float32),
        design=replace(design, some_empty=False),
        head_counts=np.concatenate(head_counts).astype(np.uint8) if design.draws else None,
        tail_counts=np.concatenate(tail_counts).astype(np.uint8) if design.draws else None,
    )
    if design.some_empty:
        lowest_losses = np.argsort(-rows.label_log_prob, kind="stable")
        dropped = lowest_losses[: int(plan.selection.quantile * len(rows))]
        rows = rows.emptied(~np.isin(np.arange(len(rows)), dropped))
    return CachedSequence(tokens, targets, replace(rows, design=design))


def _selected(
    shares: list[np.ndarray], selection: SelectionPlan, u: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Head ids and tail ids of one row, rising, and how often each id of the vocabulary was drawn."""
    order = np.argsort(-shares[0], kind="stable")
    times = np.zeros(len(order), dtype=np.int64)
    nothing = order[:0]
    if selection.method == "top_k":
        return np.sort(order[: selection.k]), nothing, times
    if selection.method == "random_sampling":
        drawn = np.searchsorted(np.cumsum(shares[0]), u * shares[0].sum(), side="right")
        times = np.bincount(drawn, minlength=len(order))
        return order[:1], np.setdiff1d(drawn, order[:1]), times
    inclusion = np.max([p / floor for p, floor in zip(shares, selection.floors, strict=True)], axis=0)
    if selection.method == "threshold":
        reach = order[: max(1, int((inclusion >= 1.0).sum()))]
        return np.sort(reach[: selection.k]), nothing, times
    certain = np.union1d(order[:1], np.nonzero(inclusion >= 1.0 - 2.0**-10)[0])
    inclusion[certain] = 0.0
    reached = np.cumsum(inclusion)
    points = np.arange(1, int(reached[-1] + u[0]) + 1) - u[0]
    return certain, np.unique(np.searchsorted(reached, points, side="right")), times
