"""What a cache of ten billion tokens would cost: rates measured here, and the arithmetic of docs/scale.md on top.

    python benchmarks/scale.py [--tokens 1e10] [--gpus 64] [--teacher-rate 10000] [--positions-per-shard 524288]

One core, V = 151,936, synthetic logits; processor time, best of several rounds. Every line says whether it was measured,
is arithmetic, or rests on an assumption given on the command line. No GPU and no object store is measured.
"""

from __future__ import annotations

import argparse
import hashlib
import tracemalloc
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from synthetic import VOCABULARY, synthetic_logits
from throughput import best, renumbered

from kdcache.cache import layout
from kdcache.cache.codec import ShardContent, decode, encode
from kdcache.cache.manifest import ShardEntry, ShardPlan
from kdcache.cache.rows import SparseRows, concatenate
from kdcache.cache.shard import pack, unpack
from kdcache.cache.strict_json import readable
from kdcache.data.examples import load_examples
from kdcache.data.tokens import TokenRow, tokenise
from kdcache.student.collate import sparse_teacher
from kdcache.student.record import hardware
from kdcache.student.sampler import EpochOrder
from kdcache.teacher.select import Selection, select
from kdcache.token_maps import load_tokenizer

# Of these synthetic logits they keep about 64, 96 and 24 bytes a position; a real run finds its own.
FLOORS = {64: 0.022, 96: 0.0135, 24: 0.085}
LENGTH, SAMPLE, SHARD_SAMPLE = 512, 256, 65_536
REQUESTS_BESIDE_SHARDS = 4  # plan, vocabulary, card, manifest


def main() -> None:
    """Print rates and arithmetic as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=float, default=1e10, help="positions with a teacher distribution")
    parser.add_argument("--gpus", type=int, default=64)
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument("--teacher-rate", type=float, default=10_000, help="ASSUMED positions/s of one GPU")
    parser.add_argument("--student-rate", type=float, default=20_000, help="ASSUMED positions/s of one GPU in training")
    parser.add_argument("--network", type=float, default=1.0, help="ASSUMED GB/s of one node to the object store")
    parser.add_argument("--models", default="runs/embedded/models", help="of the embedded recipe: tokenizer and text")
    parser.add_argument("--positions-per-shard", type=int, default=524_288)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{hardware()}; one thread; V = {VOCABULARY:,}")
    logits = synthetic_logits(SAMPLE)
    measured = {budget: _rates(logits, floor) for budget, floor in FLOORS.items()}
    _table("measured, one core", ["", *(f"{budget} bytes" for budget in measured)], _measured_lines(measured))
    _table("arithmetic", ["", *(f"{budget} bytes" for budget in measured)], _cost_lines(arguments, measured))
    _table("planning: every worker tokenises all of the text, measured", ["", ""], _planning_lines(arguments))
    _table("lists and limits", ["shards", *_LISTS], _list_lines())
    _table(
        "order of an epoch, measured",
        ["shards", "sequences", "first batch, ms", "one window, ms"],
        _order_lines(arguments),
    )


def _rates(logits: torch.Tensor, floor: float) -> dict[str, float]:
    """Positions a second of every stage at a floor, and bytes a position."""
    selection = Selection("threshold_sampling", (1.0, 2.0), floors=(floor, floor))
    uniforms = np.random.default_rng(0).random((len(logits), 1))
    labels = torch.distributions.Categorical(logits=logits).sample()
    run = partial(select, logits, labels, selection, uniforms)
    rates = {"selection": len(logits) / best(run, 3)}
    base: SparseRows = run().rows
    rows = concatenate([renumbered(base, seed) for seed in range(SHARD_SAMPLE // len(base))])
    sequences = len(rows) // LENGTH
    tokens = np.minimum(VOCABULARY ** np.random.default_rng(1).random(sequences * (LENGTH + 1)), VOCABULARY - 1)
    targets = np.tile(np.arange(LENGTH + 1) > 0, sequences)
    content = ShardContent(np.full(sequences, LENGTH + 1), tokens.astype(np.uint32), targets, rows)

    def write() -> bytes:
        return pack(encode(content, values="quantised"), plan_digest="0" * 64, index=0)

    data = write()
    counts = {"sequences": sequences, "tokens": len(tokens), "positions": len(rows), "design": rows.design}
    read = partial(unpack, data, **counts, entries_limit=rows.entries)
    arrays = read()[0]
    rates["shard write"] = len(rows) / best(write, 3)
    rates["verify: SHA-256 of the file"] = len(rows) / best(lambda: hashlib.sha256(data).digest(), 3)
    rates["decode"] = len(rows) / best(lambda: decode(read()[0], design=rows.design, values="quantised"), 3)
    rates["collate"] = (
        len(rows) / best(lambda: sparse_teacher(rows.slice(0, 16 * LENGTH), 2.0), 3) / (len(rows) / (16 * LENGTH))
    )
    rates["bytes"] = len(data) / len(rows)
    rates["raw bytes"] = sum(a.nbytes for a in arrays.values()) / len(rows)
    return rates


def _measured_lines(measured: dict[int, dict[str, float]]) -> Iterator[list[str]]:
    for name in next(iter(measured.values())):
        unit = "{:,.1f}" if "bytes" in name else "{:,.0f}"
        label = f"{name} per position" if "bytes" in name else f"{name}, positions/s"
        yield [label, *(unit.format(rates[name]) for rates in measured.values())]


def _cost_lines(arguments: argparse.Namespace, measured: dict[int, dict[str, float]]) -> Iterator[list[str]]:
    """The cache of ``tokens`` positions, by the recipe's bytes a position and the rates measured for them."""
    tokens, gpus = arguments.tokens, arguments.gpus
    nodes = -(-gpus // arguments.gpus_per_node)
    shards = -(-int(tokens) // arguments.positions_per_shard)
    per_gpu = tokens / gpus

    def line(label: str, value: str) -> list[str]:
        return [label, *(value for _ in measured)]

    def each(label: str, cell: object) -> list[str]:
        return [label, *(cell(budget, rates) for budget, rates in measured.items())]  # type: ignore[operator]

    yield each("whole cache, GB", lambda b, r: f"{tokens * b / 1e9:,.0f}")
    yield line(f"shards of {arguments.positions_per_shard:,} (at most {layout.SHARDS_LIMIT:,})", f"{shards:,}")
    yield each("a shard, MB", lambda b, r: f"{arguments.positions_per_shard * b / 1e6:,.0f}")
    yield each(
        f"a shard unpacked, MB (at most {layout.SHARD_LIMIT / 1e6:,.0f})",
        lambda b, r: f"{arguments.positions_per_shard * b * r['raw bytes'] / r['bytes'] / 1e6:,.0f}",
    )
    yield line(
        f"smallest positions_per_shard for {layout.SHARDS_LIMIT:,}", f"{-(-int(tokens) // layout.SHARDS_LIMIT):,}"
    )
    yield each(
        "largest positions_per_shard a recipe may name",
        lambda b, r: f"{layout.SHARD_LIMIT // 2 // (3 * b):,}",
    )
    yield line(
        f"teacher, hours at {arguments.teacher_rate:,.0f} positions/s (assumed)",
        f"{per_gpu / arguments.teacher_rate / 3600:,.1f}",
    )
    yield each(
        "CPU of the capture beside one GPU, cores (write alone)",
        lambda b, r: f"{arguments.teacher_rate / r['shard write']:.2f}",
    )
    yield each("finalise: read every shard, core-hours", lambda b, r: f"{tokens / r['decode'] / 3600:,.1f}")
    yield line("push: PUT requests", f"{shards + REQUESTS_BESIDE_SHARDS:,}")
    yield each(
        f"pull to each of {nodes} nodes: GB, GET requests of all",
        lambda b, r: f"{nodes * tokens * b / 1e9:,.0f}, {nodes * (shards + REQUESTS_BESIDE_SHARDS):,}",
    )
    yield each(
        f"pull: hours at {arguments.network:g} GB/s (assumed)",
        lambda b, r: f"{tokens * b / arguments.network / 1e9 / 3600:.2f}",
    )
    yield each(
        "an epoch: decoding of one process, core-hours (first epoch, SHA-256 too)",
        lambda b, r: (
            f"{tokens / r['decode'] / 3600:.1f} ({tokens * (1 / r['decode'] + 1 / r['verify: SHA-256 of the file']) / 3600:.1f})"
        ),
    )
    yield line(
        f"an epoch: hours at {arguments.student_rate:,.0f} positions/s a GPU (assumed)",
        f"{per_gpu / arguments.student_rate / 3600:.1f}",
    )
    yield each(
        "an epoch: cores a process needs to decode as fast as it trains",
        lambda b, r: f"{gpus * arguments.student_rate / r['decode']:.2f}",
    )
    yield each(
        "an epoch: read from each node's disk, GB/s",
        lambda b, r: f"{arguments.gpus_per_node * b * gpus * arguments.student_rate / 1e9:.2f}",
    )
    yield each("collate of one process, share of a core", lambda b, r: f"{arguments.student_rate / r['collate']:.3f}")


def _planning_lines(arguments: argparse.Namespace) -> Iterator[list[str]]:
    """Tokenising, and what the token rows take in memory until the last shard is made."""
    tokenizer = load_tokenizer(f"{arguments.models}/teacher")
    examples = list(load_examples(f"{arguments.models}/train.jsonl", split="train"))[:1000]
    tokens = sum(len(row.ids) for row in tokenise(examples, tokenizer, max_length=LENGTH).rows)
    rate = tokens / best(lambda: tokenise(examples, tokenizer, max_length=LENGTH), 3)
    tracemalloc.start()
    rows = [TokenRow(i, np.zeros(LENGTH, np.uint32), np.zeros(LENGTH, bool)) for i in range(2000)]
    each = tracemalloc.get_traced_memory()[0] / len(rows) / LENGTH
    tracemalloc.stop()
    yield ["tokens/s, one core", f"{rate:,.0f}"]
    yield ["hours for all tokens, were all of them learnt", f"{arguments.tokens / rate / 3600:,.1f}"]
    yield [f"bytes a token, {LENGTH} to a row", f"{each:.1f}"]
    yield ["GB in every worker", f"{arguments.tokens * each / 1e9:,.0f}"]


_LISTS = [
    "plan.json, MiB",
    "manifest.json, MiB",
    "values in one",
    f"of {layout.JSON_LIMIT >> 20} MiB",
    f"of {layout.JSON_VALUES:,} values",
]


def _list_lines() -> Iterator[list[str]]:
    """Real records with numbers as long as they get, in the form files are written in."""
    plan = ShardPlan(split=0, start=19_531_250, sequences=1_024, tokens=1_048_576, positions=524_288).model_dump(
        mode="json"
    )
    digest = "0" * 64
    entry = ShardEntry(
        sha256=digest, content_sha256=digest, bytes=33_554_432, raw_bytes=70_000_000, entries=12_345_678
    ).model_dump(mode="json")
    for shards in (10_000, 19_074, layout.SHARDS_LIMIT, 60_000):
        files = [readable({"shards": [record] * shards}) for record in (plan, entry)]
        values = max(f.count(b",") + f.count(b"[") + f.count(b"{") for f in files)
        yield [
            f"{shards:,}",
            *(f"{len(f) / 2**20:.1f}" for f in files),
            f"{values:,}",
            f"{max(map(len, files)) / layout.JSON_LIMIT:.0%}",
            f"{values / layout.JSON_VALUES:.0%}",
        ]


def _order_lines(arguments: argparse.Namespace) -> Iterator[list[str]]:
    """The sampler's own order at the place where a run would go on, far into an epoch."""
    for shards in (-(-int(arguments.tokens) // arguments.positions_per_shard), layout.SHARDS_LIMIT):
        sizes = [int(arguments.tokens) // LENGTH // shards] * shards
        middle = sum(sizes) * 99 // 100

        def first_batch(sizes: list[int] = sizes, middle: int = middle) -> EpochOrder:
            order = EpochOrder(sizes, cache_id="0" * 64, seed=0, epoch=0)
            order.between(middle, middle + 512)
            return order

        order = first_batch()
        start = iter(range(middle, 0, -2 * sizes[0]))
        window = best(lambda order=order, start=start: order.between(at := next(start), at + 512), 5)  # type: ignore[misc]
        yield [f"{shards:,}", f"{sum(sizes):,}", f"{best(first_batch, 3) * 1e3:.1f}", f"{window * 1e3:.2f}"]


def _table(title: str, head: list[str], lines: Iterator[list[str]]) -> None:
    print(f"\n**{title}**\n\n| " + " | ".join(head) + " |\n|---|" + "---:|" * (len(head) - 1))
    for cells in lines:
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
