"""Sequences with their rows <-> named arrays of a shard; each inverse beside its forward."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from kdcache.cache.layout import DIGEST_BYTES, SAFETENSORS_DTYPES, TENSORS, id_dtype
from kdcache.cache.rows import SparseRows
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


def encode(content: ShardContent) -> Arrays:
    """Arrays of one shard, in the dtypes and shapes of ``layout.TENSORS``."""
    rows, ids = content.rows, id_dtype(content.rows.vocab_size)
    return {
        "sequence.length": content.lengths.astype("<u4"),
        "sequence.digest": sequence_digests(content),
        "token.id": content.token_ids.astype(ids),
        "token.target": content.targets.astype("|u1"),
        "row.head": rows.head.astype("<u2"),
        "row.tail": rows.tail.astype("<u2"),
        "row.log_partition": rows.log_partition.astype("<f4"),
        "row.label_log_prob": rows.label_log_prob.astype("<f4"),
        "entry.id": rows.ids.astype(ids),
        "entry.logit": rows.logits.astype("<f2"),
    }


def decode(arrays: Arrays, *, temperatures: tuple[float, ...], vocab_size: int) -> ShardContent:
    """Inverse of `encode`, holding the invariants of ``cache_format.md``.

    Raises:
        CorruptCacheError: an invariant is broken.
    """
    lengths = arrays["sequence.length"].astype(np.int64)
    token_ids = arrays["token.id"].astype(np.uint32)
    flags = arrays["token.target"]
    if int(lengths.sum()) != len(token_ids):
        raise CorruptCacheError(
            f"invariant 1 (lengths add up to the tokens): {int(lengths.sum())} against {len(token_ids)}"
        )
    if len(lengths) and int(lengths.min()) < 2:
        raise CorruptCacheError("invariant 1 (a sequence has at least two tokens)")
    if np.any(flags.astype(np.uint8, copy=False) > 1):
        raise CorruptCacheError("invariant 2 (target flags are 0 or 1)")
    content = ShardContent(
        lengths=lengths,
        token_ids=token_ids,
        targets=flags.astype(np.bool_),
        rows=SparseRows(
            head=arrays["row.head"].astype(np.int64),
            tail=arrays["row.tail"].astype(np.int64),
            ids=arrays["entry.id"].astype(np.uint32),
            logits=arrays["entry.logit"].astype(np.float16, copy=False),
            log_partition=arrays["row.log_partition"].astype(np.float32, copy=False),
            label_log_prob=arrays["row.label_log_prob"].astype(np.float32, copy=False),
            temperatures=temperatures,
            vocab_size=vocab_size,
        ),
    )
    if np.any(content.targets[content.token_offsets[:-1]]):
        raise CorruptCacheError("invariant 2 (the first token of a sequence is never a target)")
    if int(content.targets.sum()) != len(content.rows):
        raise CorruptCacheError(
            f"invariant 2 (one row per target): {len(content.rows)} rows, {int(content.targets.sum())} targets"
        )
    if np.any(token_ids >= vocab_size):
        raise CorruptCacheError(f"invariant 3 (token ids lie below {vocab_size})")
    if not np.array_equal(arrays["sequence.digest"], sequence_digests(content)):
        raise CorruptCacheError("invariant 13 (a sequence's digest is that of its tokens and targets)")
    content.rows.check()
    return content


def expected_tensors(
    *, sequences: int, tokens: int, positions: int, entries: int, temperatures: int, vocab_size: int
) -> dict[str, tuple[str, list[int]]]:
    """safetensors dtype and shape of every tensor of a shard with these counts."""
    size = {"S": sequences, "N": tokens, "P": positions, "E": entries, "B": temperatures}
    table = {}
    for name, (dtype, shape) in TENSORS.items():
        stored = id_dtype(vocab_size) if dtype == "id" else dtype
        axes = [size[axis] if axis in size else int(axis) for axis in shape.split(",")]
        table[name] = (SAFETENSORS_DTYPES[stored], axes)
    return table


def sequence_digests(content: ShardContent) -> NDArray[np.uint8]:
    """uint8 ``[S, 16]``: `sequence_digest` of every sequence."""
    bounds = content.token_offsets
    joined = b"".join(sequence_digest(content.token_ids[a:b], content.targets[a:b]) for a, b in pairwise(bounds))
    return np.frombuffer(joined, dtype="|u1").reshape(len(content), DIGEST_BYTES)
