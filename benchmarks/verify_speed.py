"""How fast `kdcache verify` is beside the two things it cannot do without: SHA-256 and zstd of the same files.

    python benchmarks/verify_speed.py                       # a cache of 128 MiB made for it, in a temporary directory
    python benchmarks/verify_speed.py --cache DIRECTORY     # a cache that is there

Rows are what threshold sampling keeps of synthetic logits over 152,000 tokens at about 55 bytes a position; every copy of
them has other ids and values, so that zstd finds no repetition that a real cache would not have. Every variant reads the
files itself (from the page cache), takes its turn in each round, and the best round counts. One thread of SHA-256 and zstd.

"Hashes and zstd" is what any verification of this format does before it looks at a single number: SHA-256 of the file, zstd, SHA-256
of what was in it, shards spread over all threads. How far above that `verify` is shows what looking at the numbers costs.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import zstandard
from synthetic import VOCABULARY, synthetic_logits

from kdcache.cache import layout
from kdcache.cache.codec import ShardContent
from kdcache.cache.manifest import DataPlan, Plan, ShardPlan, SplitPlan, TeacherIdentity, TokenizerIdentity
from kdcache.cache.reader import open_cache, shard_path
from kdcache.cache.rows import SparseRows, concatenate
from kdcache.cache.selection import SelectionPlan
from kdcache.cache.strict_json import canonical_sha256
from kdcache.cache.verify import examine
from kdcache.cache.writer import CacheWriter
from kdcache.teacher.select import Selection, select

FLOOR, LENGTH, SHARD_POSITIONS, BASE_POSITIONS = 0.02, 256, 65_536, 2_048
# Ids are mixed within blocks of so many.
BLOCK = 256
WIDTH = -(-VOCABULARY // BLOCK) * BLOCK
DIFFERENT = 4


@dataclass(frozen=True)
class Speed:
    """One variant over files of so many bytes, which hold so many when unpacked: seconds of its best round.

    ``processor`` is the least processor time of a round, over all threads: what a busy machine does not change much.
    """

    what: str
    seconds: float
    processor: float
    stored: int
    raw: int

    @property
    def stored_rate(self) -> float:
        """MB of files a second."""
        return self.stored / self.seconds / 1e6

    @property
    def raw_rate(self) -> float:
        """MB of unpacked tensors a second."""
        return self.raw / self.seconds / 1e6


def measure(directory: Path, *, rounds: int = 5) -> list[Speed]:
    """SHA-256 alone, zstd alone, both with all hashes, `verify` with one thread and with one per processor, on a whole cache."""
    manifest = open_cache(directory).manifest
    paths = [shard_path(directory, i) for i in range(len(manifest.shards))]
    stored, raw = (sum(getattr(s, field) for s in manifest.shards) for field in ("bytes", "raw_bytes"))
    threads = len(os.sched_getaffinity(0))
    variants: dict[str, Callable[[], object]] = {
        "SHA-256 alone": lambda: [hashlib.sha256(p.read_bytes()).digest() for p in paths],
        "zstd alone": lambda: [len(zstandard.ZstdDecompressor().decompress(p.read_bytes())) for p in paths],
        f"hashes and zstd, {threads} threads": lambda: _hashed(paths, threads),
        "verify, 1 thread": lambda: _whole(directory, 1),
        f"verify, {threads} threads": lambda: _whole(directory, threads),
    }
    best = dict.fromkeys(variants, (float("inf"), float("inf")))
    for _ in range(rounds):
        for what, run in variants.items():
            started, before = time.perf_counter(), time.process_time()
            run()
            seconds, processor = time.perf_counter() - started, time.process_time() - before
            best[what] = min(best[what][0], seconds), min(best[what][1], processor)
    return [Speed(what, *least, stored, raw) for what, least in best.items()]


def share_of_slower(speeds: list[Speed]) -> float:
    """Throughput of `verify` with all threads over that of the slower of SHA-256 and zstd."""
    return speeds[-1].stored_rate / min(s.stored_rate for s in speeds[:2])


def table(speeds: list[Speed]) -> str:
    """Markdown."""
    slower = min(s.stored_rate for s in speeds[:2])
    lines = [
        "| | MB/s of files | MB/s unpacked | of the slower alone | processor seconds per GB unpacked |",
        "|---|---:|---:|---:|---:|",
    ]
    for s in speeds:
        cells = [s.what, f"{s.stored_rate:,.0f}", f"{s.raw_rate:,.0f}", f"{s.stored_rate / slower:.0%}"]
        lines.append("| " + " | ".join([*cells, f"{s.processor / s.raw * 1e9:.2f}"]) + " |")
    return "\n".join(lines)


def make_cache(directory: Path, *, megabytes: int, seed: int = 0) -> Path:
    """A cache of about so many MiB, every shard with content that looks like a teacher's."""
    selection = Selection("threshold_sampling", (1.0, 2.0), floors=(FLOOR, FLOOR))
    parts = []
    for block in range(BASE_POSITIONS // 256):
        logits = synthetic_logits(256, seed=seed + block)
        labels = torch.distributions.Categorical(logits=logits).sample()
        parts.append(select(logits, labels, selection, np.random.default_rng(block).random((256, 1))).rows)
    base = replace(concatenate(parts), design=replace(parts[0].design, vocab_size=WIDTH))
    contents = [_content(base, np.random.default_rng(seed + n)) for n in range(DIFFERENT)]
    shards = max(2, round(megabytes * 2**20 / (56 * SHARD_POSITIONS)))
    tokens: list[str | None] = [f"t{i}" for i in range(WIDTH)]
    writer = CacheWriter(directory, _plan(contents, shards, tokens), tokens)
    for index in range(shards):
        writer.commit(index, contents[index % DIFFERENT])
    writer.finalise()
    return directory


def _whole(directory: Path, threads: int) -> None:
    if not examine(directory, threads=threads).whole:
        raise SystemExit(f"{directory} is not whole")


def _hashed(paths: list[Path], threads: int) -> None:
    def one(path: Path) -> None:
        data = path.read_bytes()
        hashlib.sha256(data).digest()
        hashlib.sha256(zstandard.ZstdDecompressor().decompress(data)).digest()

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(one, paths))


def _content(base: SparseRows, generator: np.random.Generator) -> ShardContent:
    copies = [_varied(base, generator) for _ in range(SHARD_POSITIONS // len(base))]
    rows = concatenate(copies)
    sequences = SHARD_POSITIONS // LENGTH
    ids = np.minimum(WIDTH ** generator.random(sequences * (LENGTH + 1)), WIDTH - 1).astype(np.uint32)
    return ShardContent(
        lengths=np.full(sequences, LENGTH + 1),
        token_ids=ids,
        targets=np.tile(np.r_[False, np.ones(LENGTH, dtype=bool)], sequences),
        rows=rows,
    )


def _varied(rows: SparseRows, generator: np.random.Generator) -> SparseRows:
    """The rows with ids mixed within their blocks, one mix per row, and noise of about a step on what is stored."""
    mix = generator.integers(0, BLOCK, len(rows)).astype(np.uint32)

    def mixed(ids: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        other = ids ^ np.repeat(mix, counts)
        order = np.lexsort((other, np.repeat(np.arange(len(rows)), counts)))
        return other[order], order

    head_ids, head_order = mixed(rows.head_ids, rows.head)
    tail_ids, tail_order = mixed(rows.tail_ids, rows.tail)
    head = rows.head_logits[head_order]
    noise = generator.uniform(-0.1, 0.0, len(head)).astype(np.float32)
    tail = rows.tail_logits[tail_order] - generator.uniform(0.0, 0.5, len(tail_ids)).astype(np.float32)
    return replace(
        rows,
        head_ids=head_ids,
        head_logits=np.where(head < 0, head + noise, head),
        tail_ids=tail_ids,
        tail_logits=tail,
        rest=rows.rest + generator.normal(0.0, 0.01, rows.rest.shape).astype(np.float32),
        label_log_prob=rows.label_log_prob * generator.uniform(0.99, 1.01, len(rows)).astype(np.float32),
    )


def _plan(contents: list[ShardContent], shards: int, tokens: list[str | None]) -> Plan:
    content = contents[0]
    digests = [c.digests.tobytes() for c in contents]
    joined = b"".join(digests[i % DIFFERENT] for i in range(shards))
    each = {"sequences": len(content), "tokens": len(content.token_ids), "positions": len(content.rows)}
    split = SplitPlan(
        name="train", source="synthetic", revision=None, selected="train", examples=shards * each["sequences"],
        dropped_empty=0, dropped_no_target=0, truncated=0, fingerprint=hashlib.sha256(joined).hexdigest(),
        **{name: shards * count for name, count in each.items()},
    )  # fmt: skip
    return Plan(
        format=layout.FORMAT,
        version=layout.VERSION,
        teacher=TeacherIdentity(
            name="synthetic", revision=None, fingerprint="0" * 64, architecture="none", quantization="none",
            dtype="float32", batch_tokens=1,
        ),
        tokenizer=TokenizerIdentity(
            name="synthetic", fingerprint=canonical_sha256(tokens), vocab_size=WIDTH, eos_id=1, pad_id=0
        ),
        data=DataPlan(
            shape="text", columns={}, prompt="plain", system=None, date="2024-07-26", template_sha256=None,
            max_length=LENGTH + 1, splits=(split,),
        ),
        selection=SelectionPlan(
            method="threshold_sampling", k=64, floors=(FLOOR, FLOOR), draws=16, temperatures=(1.0, 2.0),
            bytes_per_position=None, tail_logits=True, values="quantised", positions="all", quantile=0.0,
        ),
        shards=tuple(ShardPlan(split=0, start=n * each["sequences"], **each) for n in range(shards)),
        derived=None,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, help="a cache that is there")
    parser.add_argument("--megabytes", type=int, default=128, help="size of the cache that is made")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        directory = arguments.cache or make_cache(Path(folder) / "cache", megabytes=arguments.megabytes)
        speeds = measure(directory, rounds=arguments.rounds)
    print(
        f"{platform.processor() or platform.machine()}, {len(os.sched_getaffinity(0))} processors, numpy {np.__version__}"
    )
    print(f"{speeds[0].stored / 2**20:,.0f} MiB of files, {speeds[0].raw / 2**20:,.0f} MiB unpacked")
    print(table(speeds))


if __name__ == "__main__":
    main()
