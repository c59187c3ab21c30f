"""Sequences with their rows <-> named arrays of a shard; each inverse beside its forward."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from kdcache.cache import layout
from kdcache.cache.invariants import check_rows
from kdcache.cache.layout import DIGEST_BYTES, id_bytes, tensor_names
from kdcache.cache.numbers import (
    Values,
    decode_half,
    decode_rest,
    decode_values,
    encode_half,
    encode_rest,
    encode_values,
    from_planes,
    id_steps,
    ids_of_steps,
    to_planes,
)
from kdcache.cache.rows import RowDesign, SparseRows
from kdcache.errors import CorruptCacheError

Arrays = dict[str, NDArray[np.generic]]


@dataclass(frozen=True)
class CachedSequence:
    """One training sequence: uint32 ``token_ids [L]``, bool ``targets [L]`` and one row per target.

    ``targets[i]`` says that token ``i`` is learnt; its row is the teacher's distribution at ``i - 1``.
    """

    token_ids: NDArray[np.uint32]
    targets: NDArray[np.bool_]
    rows: SparseRows

    def cut(self, max_length: int | None) -> CachedSequence:
        """Its first ``max_length`` tokens with their rows, as views; itself where it is no longer than that.

        What is left may have no target; a sequence tokenised at that length would then have been dropped.
        """
        if max_length is None or len(self.token_ids) <= max_length:
            return self
        targets = self.targets[:max_length]
        return CachedSequence(self.token_ids[:max_length], targets, self.rows.slice(0, int(targets.sum())))


@dataclass(frozen=True)
class ShardContent:
    """Sequences laid end to end: ``lengths [S]``, ``token_ids [N]``, ``targets [N]``, ``rows`` (P)."""

    lengths: NDArray[np.int64]
    token_ids: NDArray[np.uint32]
    targets: NDArray[np.bool_]
    rows: SparseRows

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def token_offsets(self) -> NDArray[np.int64]:
        """int64 ``[S + 1]``: tokens of sequence ``s`` lie in ``token_offsets[s]:token_offsets[s + 1]``."""
        return np.concatenate(([0], np.cumsum(self.lengths)))

    @cached_property
    def row_offsets(self) -> NDArray[np.int64]:
        """int64 ``[S + 1]``: rows of sequence ``s`` lie in ``row_offsets[s]:row_offsets[s + 1]``."""
        before = np.concatenate(([0], np.cumsum(self.targets)))
        return before[self.token_offsets]

    @cached_property
    def digests(self) -> NDArray[np.uint8]:
        """uint8 ``[S, 16]``: `sequence_digest` of every sequence."""
        flags, ids = self.targets.astype("|u1").tobytes(), self.token_ids.astype("<u4").tobytes()
        joined = b"".join(
            hashlib.sha256(ids[4 * a : 4 * b] + flags[a:b]).digest()[:DIGEST_BYTES]
            for a, b in pairwise(self.token_offsets.tolist())
        )
        return np.frombuffer(joined, dtype="|u1").reshape(len(self), DIGEST_BYTES)

    def __getitem__(self, index: int) -> CachedSequence:
        tokens, rows = self.token_offsets, self.row_offsets
        span = slice(int(tokens[index]), int(tokens[index + 1]))
        return CachedSequence(
            token_ids=self.token_ids[span],
            targets=self.targets[span],
            rows=self.rows.slice(int(rows[index]), int(rows[index + 1])),
        )


def sequence_digest(token_ids: NDArray[np.uint32], targets: NDArray[np.bool_]) -> bytes:
    """First 16 bytes of SHA-256 over the token ids (``<u4``) followed by the target flags (``|u1``)."""
    h = hashlib.sha256(token_ids.astype("<u4").tobytes())
    h.update(targets.astype("|u1").tobytes())
    return h.digest()[:DIGEST_BYTES]


def encode(content: ShardContent, *, values: Values) -> Arrays:
    """Arrays of one shard, in the dtypes and shapes of ``layout.TENSORS``.

    Lossless but for the logits (``values`` quantised: to steps of 1/16 for exact and 1/2 for drawn entries; half: to half
    precision), the rest's log-odds (steps of 2^-10, within 32) and the label's log-probability (half precision).
    """
    rows, width = content.rows, id_bytes(content.rows.design.vocab_size)
    arrays: Arrays = {
        "sequence.length": content.lengths.astype("<u4"),
        "sequence.digest": content.digests,
        "token.id": to_planes(content.token_ids, width),
        "token.target": content.targets.astype("|u1"),
        "row.head": to_planes(rows.head, 2),
        "row.tail": to_planes(rows.tail, 2),
        "row.rest": encode_rest(rows.rest),
        "row.label": encode_half(rows.label_log_prob),
        "head.id": to_planes(id_steps(rows.head_ids, rows.head_offsets), width),
        "head.value": encode_values(rows.head_logits, layout.HEAD_STEP, values),
        "tail.id": to_planes(id_steps(rows.tail_ids, rows.tail_offsets), width),
    }
    if rows.design.tail_logits:
        arrays["tail.value"] = encode_values(rows.tail_logits, layout.TAIL_STEP, values)
    else:
        first = np.zeros(len(rows), dtype=np.float32)
        first[rows.tail > 0] = rows.tail_logits[rows.tail_offsets[:-1][rows.tail > 0]]
        arrays["row.tail_value"] = encode_half(first)
    if rows.head_counts is not None and rows.tail_counts is not None:
        arrays |= {"head.count": rows.head_counts.astype("|u1"), "tail.count": rows.tail_counts.astype("|u1")}
    return arrays


def decode(arrays: Arrays, *, design: RowDesign, values: Values, verified: bool = False) -> ShardContent:
    """Inverse of `encode`, holding the invariants of ``cache_format.md``.

    ``verified`` leaves out those that cost a pass over the entries, for arrays that have passed them before.

    Raises:
        CorruptCacheError: an invariant is broken.
    """
    lengths = arrays["sequence.length"].astype(np.int64)
    token_ids = from_planes(arrays["token.id"])
    flags = arrays["token.target"]
    if int(lengths.sum()) != len(token_ids):
        raise CorruptCacheError(
            f"invariant 1 (lengths add up to the tokens): {int(lengths.sum())} against {len(token_ids)}"
        )
    if len(lengths) and int(lengths.min()) < 2:
        raise CorruptCacheError("invariant 1 (a sequence has at least two tokens)")
    if np.any(flags.astype(np.uint8, copy=False) > 1):
        raise CorruptCacheError("invariant 2 (target flags are 0 or 1)")
    head, tail = (from_planes(arrays[f"row.{name}"]).astype(np.int64) for name in ("head", "tail"))
    head_ids, tail_ids = (arrays[f"{name}.id"] for name in ("head", "tail"))
    for name, counts, ids in (("head", head, head_ids), ("tail", tail, tail_ids)):
        # Held here already: offsets cut the ids.
        if int(counts.sum()) != ids.shape[1]:
            raise CorruptCacheError(
                f"invariant 4 (row counts add up to the entries): {name}, {int(counts.sum())} against {ids.shape[1]}"
            )
    if design.tail_logits:
        tail_logits = decode_values(arrays["tail.value"], layout.TAIL_STEP, values)
    else:
        tail_logits = np.repeat(decode_half(arrays["row.tail_value"]), tail)
    content = ShardContent(
        lengths=lengths,
        token_ids=token_ids,
        targets=flags.astype(np.bool_),
        rows=SparseRows(
            head=head,
            tail=tail,
            head_ids=ids_of_steps(from_planes(head_ids), head),
            head_logits=decode_values(arrays["head.value"], layout.HEAD_STEP, values),
            tail_ids=ids_of_steps(from_planes(tail_ids), tail),
            tail_logits=tail_logits,
            rest=decode_rest(arrays["row.rest"]),
            label_log_prob=decode_half(arrays["row.label"]),
            design=design,
            head_counts=_counts(arrays.get("head.count")),
            tail_counts=_counts(arrays.get("tail.count")),
        ),
    )
    if np.any(content.targets[content.token_offsets[:-1]]):
        raise CorruptCacheError("invariant 2 (the first token of a sequence is never a target)")
    if int(content.targets.sum()) != len(content.rows):
        raise CorruptCacheError(
            f"invariant 2 (one row per target): {len(content.rows)} rows, {int(content.targets.sum())} targets"
        )
    if verified:
        return content
    if np.any(token_ids >= design.vocab_size):
        raise CorruptCacheError(f"invariant 3 (token ids lie below {design.vocab_size})")
    if not np.array_equal(arrays["sequence.digest"], content.digests):
        raise CorruptCacheError("invariant 13 (a sequence's digest is that of its tokens and targets)")
    check_rows(content.rows)
    return content


def expected_tensors(
    *, sequences: int, tokens: int, positions: int, head: int, tail: int, design: RowDesign
) -> dict[str, tuple[str, list[int]]]:
    """safetensors dtype and shape of every tensor of a shard with these counts."""
    size = {"S": sequences, "N": tokens, "P": positions, "H": head, "M": tail}
    size |= {"B": len(design.temperatures), "I": id_bytes(design.vocab_size)}
    table = {}
    for name in tensor_names(tail_logits=design.tail_logits, counted=design.draws > 0):
        dtype, shape = layout.TENSORS[name]
        axes = [size[axis] if axis in size else int(axis) for axis in shape.split(",")]
        table[name] = (layout.SAFETENSORS_DTYPES[dtype], axes)
    return table


def _counts(stored: NDArray[np.generic] | None) -> NDArray[np.uint8] | None:
    return None if stored is None else stored.astype(np.uint8, copy=False)
