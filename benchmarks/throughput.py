"""Speed of every stage between logits and ready tensors, one core, V = 151,936, each beside its limit.

    python benchmarks/throughput.py [--rows 512] [--teacher DIR --data FILE]

Processor time, best of several rounds. With a teacher and data: the whole teacher pass against a bare forward pass whose
head is applied at the same positions.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import torch
import zstandard
from synthetic import VOCABULARY, synthetic_logits

from kdcache.cache.codec import ShardContent, decode, encode
from kdcache.cache.invariants import check_rows
from kdcache.cache.rows import SparseRows, concatenate
from kdcache.cache.shard import compress, content_hash, decompress, pack, unpack
from kdcache.student.collate import sparse_teacher
from kdcache.student.record import hardware
from kdcache.teacher.select import Selection, select

FLOORS = (0.02, 0.03)
POSITIONS = 60_000
ROUNDS = 5


def best(function: Callable[[], object], rounds: int = ROUNDS) -> float:
    """Least processor seconds of several calls."""
    times = []
    for _ in range(rounds):
        started = time.process_time()
        function()
        times.append(time.process_time() - started)
    return min(times)


def table(title: str, rows: list[tuple[str, float, str]]) -> None:
    """A Markdown table of rates."""
    print(f"\n| {title} | positions/s | |\n|---|---:|---|")
    for name, rate, note in rows:
        print(f"| {name} | {rate:,.0f} | {note} |")


def selection_table(rows: int) -> SparseRows:
    """Selection against torch.topk; returns the default's rows."""
    logits = torch.cat([synthetic_logits(64, seed=s) for s in range(rows // 64)])
    labels = logits.argmax(dim=1)
    uniforms = np.random.default_rng(0).random((len(logits), 1))
    default = Selection("threshold_sampling", (1.0, 2.0), floors=FLOORS)
    one = Selection("threshold_sampling", (1.0,), floors=FLOORS[:1])
    timings = {
        "torch.topk(128), the baseline": lambda: torch.topk(logits, 128, dim=1),
        "one logsumexp": lambda: torch.logsumexp(logits, dim=1),
        "memcpy": lambda: logits.clone(),
        "threshold_sampling, T 1 and 2": lambda: select(logits, labels, default, uniforms),
        "threshold_sampling, T 1": lambda: select(logits, labels, one, uniforms),
        "threshold": lambda: select(logits, labels, Selection("threshold", (1.0, 2.0), 128, FLOORS)),
        "top_k 64": lambda: select(logits, labels, Selection("top_k", (1.0, 2.0), 64)),
        "random_sampling 16": lambda: select(
            logits, labels, Selection("random_sampling", (1.0,), draws=16), np.repeat(uniforms, 16, axis=1)
        ),
    }
    rates = {name: len(logits) / best(function, 3) for name, function in timings.items()}
    base = rates["torch.topk(128), the baseline"]
    table(f"selection, {rows} rows", [(n, r, f"{r / base:.2f} x topk") for n, r in rates.items()])
    return select(logits, labels, default, uniforms).rows


def renumbered(rows: SparseRows, seed: int) -> SparseRows:
    """The same rows under other ids: repeated as they are, zstd would find them again."""
    numbers = np.random.default_rng(seed).permutation(VOCABULARY).astype(np.uint32)

    def other(ids: np.ndarray, logits: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        ids = numbers[ids]
        order = np.lexsort((ids, np.repeat(np.arange(len(counts)), counts)))
        return ids[order], logits[order]

    head_ids, head_logits = other(rows.head_ids, rows.head_logits, rows.head)
    tail_ids, tail_logits = other(rows.tail_ids, rows.tail_logits, rows.tail)
    return replace(rows, head_ids=head_ids, head_logits=head_logits, tail_ids=tail_ids, tail_logits=tail_logits)


def codec_table(rows: SparseRows) -> None:
    """Encoding and decoding a shard of repeated rows."""
    rows = concatenate([renumbered(rows, seed) for seed in range(max(1, POSITIONS // len(rows)))])
    count, length = len(rows), 60
    sequences = count // length
    rows = rows.slice(0, sequences * length)
    count = len(rows)
    generator = np.random.default_rng(0)
    tokens = np.minimum(VOCABULARY ** generator.random(sequences * 2 * length), VOCABULARY - 1).astype(np.uint32)
    targets = np.tile(np.arange(2 * length) >= length, sequences)
    content = ShardContent(np.full(sequences, 2 * length), tokens, targets, rows)
    arrays = encode(content, values="quantised")
    data = pack(arrays, plan_digest="0" * 64, index=0)
    raw = decompress(data, limit=1 << 30)
    counts = {"sequences": sequences, "tokens": len(tokens), "positions": count, "design": rows.design}
    read = partial(unpack, data, **counts, entries_limit=rows.entries)

    def ready() -> object:
        return sparse_teacher(decode(read()[0], design=rows.design, values="quantised").rows, 2.0)

    print(
        f"\n{count:,} positions, {rows.entries / count:.1f} entries each, {len(data) / count:.1f} bytes compressed, "
        f"{len(raw) / count:.1f} raw"
    )
    stages: dict[str, Callable[[], object]] = {
        "encode: rows to arrays": lambda: encode(content, values="quantised"),
        "encode: arrays to a shard (hash, zstd)": lambda: pack(arrays, plan_digest="0" * 64, index=0),
        "**encode, whole**": lambda: pack(encode(content, values="quantised"), plan_digest="0" * 64, index=0),
        "zstd alone": lambda: compress(raw),
        "decode: zstd alone": lambda: zstandard.ZstdDecompressor().decompress(data),
        "decode: content hash alone": lambda: content_hash(arrays),
        "decode: memcpy of the raw bytes": lambda: bytearray(raw),
        "decode: shard to arrays (zstd, header, hash)": read,
        "decode: arrays to checked rows": lambda: decode(arrays, design=rows.design, values="quantised"),
        "decode: the checks of that": partial(check_rows, rows),
        "decode: rows to padded tensors": lambda: sparse_teacher(rows, 2.0),
        "**decode, whole**": ready,
    }
    table("codec", [(name, count / best(stage), "") for name, stage in stages.items()])


def teacher_table(teacher: str, data: str) -> None:
    """The teacher pass beside a bare forward pass, and where the difference goes."""
    from kdcache.progress import Silent
    from kdcache.recipe import parse_recipe
    from kdcache.teacher.capture import load_teacher
    from kdcache.teacher.draws import chance_of
    from kdcache.teacher.forward import LOGIT_BYTES, length_buckets
    from kdcache.teacher.planning import plan_cache
    from kdcache.teacher.sample import shard_content

    recipe = parse_recipe({
        "output": "runs/none",
        "cache": {"directory": "runs/none"},
        "data": {"train": {"path": data, "split": "train[:400]"}, "validation": {"path": data, "split": "train[400:410]"}},
        "teacher": {"model": teacher},
        "selection": {"floors": [0.0282, 0.0513]},
    })  # fmt: skip
    planned = plan_cache(recipe, Silent())
    forward, rows = load_teacher(recipe, planned), planned.rows[0]
    chosen, numbers, thin = chance_of(planned.plan, 0)
    positions = sum(r.positions for r in rows)

    @torch.inference_mode()
    def bare(with_head: bool = True) -> None:
        chunk = max(1, LOGIT_BYTES // (4 * forward.head.width))
        for batch in length_buckets([len(r.ids) for r in rows], 8192):
            hidden, _ = forward.hidden([rows[i] for i in batch])
            for start in range(0, len(hidden) if with_head else 0, chunk):
                forward.head.logits(hidden[start : start + chunk])

    def whole() -> SparseRows:
        return forward(rows, chosen, batch_tokens=8192, uniforms=numbers, thin=thin)

    bare()
    sparse = whole()
    content = shard_content(rows, sparse)
    decoder, both, passed = best(lambda: bare(False), 3), best(bare, 3), best(whole, 3)
    written = best(lambda: pack(encode(content, values="quantised"), plan_digest="0" * 64, index=0), 3)
    table(f"teacher pass, {positions:,} positions of {teacher.rpartition('/')[2]}", [
        ("decoder alone", positions / decoder, f"{decoder / both:.3f} x"),
        ("bare forward: decoder and head", positions / both, "1 x"),
        ("teacher pass: with selection", positions / passed, f"{passed / both:.3f} x"),
        ("and encoding (in a second thread)", positions / (passed + written), f"{(passed + written) / both:.3f} x"),
    ])  # fmt: skip


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=512, help="synthetic rows")
    parser.add_argument("--teacher", help="teacher folder")
    parser.add_argument("--data", help="instruction data file")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(f"{hardware()['device']}, one thread, torch {torch.__version__}, V {VOCABULARY:,}")
    codec_table(selection_table(args.rows))
    if args.teacher and args.data:
        teacher_table(args.teacher, args.data)


if __name__ == "__main__":
    main()
