"""What a reader survives: changed bytes, forged caches, hostile files; and that its memory stays where it is.

Part of ``robustness.py``. The attacks are those of ``tests/hostile``, in larger numbers. To repeat one that failed:

    python benchmarks/robustness_reader.py structural 204
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np

from kdcache.cache.codec import ShardContent
from kdcache.cache.reader import Split, open_cache
from kdcache.cache.writer import CacheWriter
from kdcache.student.sampler import EpochOrder
from tests.hostile.files import ATTACKS
from tests.hostile.pool import HANG_SECONDS, Tally, run
from tests.hostile.probe import LIMIT_MEBIBYTES, LIMIT_SECONDS, Cost, memory, probe
from tests.hostile.victims import load_victims, make_victims

EPOCHS = 10
SHARD_COUNTS = (1, 8, 64)
KEEP = 8
# Sequences of each shard, so that eight decoded ones show beside the process.
_SEQUENCES = 3000
FLAT_MEBIBYTES = 16.0


@dataclass(frozen=True)
class Figure:
    """One line of the table: what was measured, what it should be, what it was, and whether that is good."""

    what: str
    target: str
    found: str
    good: bool

    def __str__(self) -> str:
        return f"| {self.what} | {self.target} | {self.found} | {'yes' if self.good else '**NO**'} |"


def fuzz(attack: str, cases: int, *, first: int = 0, workers: int = 2) -> Tally:
    """Attacks of ``random_bytes`` or ``structural``, from number ``first`` on."""
    return run(attack, cases, first=first, workers=workers)


def fuzz_figures(name: str, target: int, tally: Tally) -> list[Figure]:
    """What a tally has to show. ``target`` is the number that a soak has to reach."""
    silent = sum(n for (_, outcome), n in tally.outcomes.items() if outcome.isupper() and outcome != "FOREIGN ERROR")
    counts = ", ".join(
        f"{tally.count(outcome):,} {outcome}"
        for outcome in ("refused", "no difference", "another legal cache")
        if tally.count(outcome)
    )
    rate = tally.cases / tally.seconds
    return [
        Figure(name, f"{target:,} in a soak", f"{tally.cases:,} ({counts}; {rate:,.0f}/s)", tally.cases > 0),
        Figure(f"{name}: crashes", "0", str(tally.crashes), tally.crashes == 0),
        Figure(
            f"{name}: longer than {HANG_SECONDS:g} s", "0", f"{tally.hangs}; slowest {tally.slowest:.1f} s", tally.hangs == 0
        ),
        Figure(f"{name}: silent differences", "0", str(silent), silent == 0),
        Figure(
            f"{name}: errors that are not ours, warnings", "0", str(tally.count("FOREIGN ERROR")),
            tally.count("FOREIGN ERROR") == 0,
        ),
    ]  # fmt: skip


def kinds_table(tally: Tally) -> str:
    """Markdown: each kind of attack by what became of it."""
    lines = ["| attack | refused | no difference | another legal cache | bad |", "|---|---:|---:|---:|---:|"]
    harmless = ("refused", "no difference", "another legal cache")
    for kind in sorted({kind for kind, _ in tally.outcomes}):
        own = {outcome: n for (k, outcome), n in tally.outcomes.items() if k == kind}
        cells = [own.pop(outcome, 0) for outcome in harmless]
        lines.append(f"| {kind} | {' | '.join(f'{n:,}' for n in cells)} | {sum(own.values())} |")
    return "\n".join(lines)


def hostile_files() -> dict[str, Cost]:
    """Every attack of ``tests/hostile/files.py``, opened and verified in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        make_victims(Path(folder) / "victims")
        victim, directories = load_victims(Path(folder) / "victims")[0], []
        for number, make in enumerate(ATTACKS.values()):
            directories.append(Path(folder) / str(number))
            directories[-1].mkdir()
            make(directories[-1], victim)
        return dict(zip(ATTACKS, probe(directories), strict=True))


def hostile_figures(costs: dict[str, Cost]) -> list[Figure]:
    """The worst of the hostile files."""
    heaviest, slowest = max(costs, key=lambda a: costs[a].mebibytes), max(costs, key=lambda a: costs[a].seconds)
    foreign = [a for a, c in costs.items() if not all(e.endswith("Error") for e in c.outcome.split("/"))]
    most, longest = costs[heaviest].mebibytes, costs[slowest].seconds
    return [
        Figure(f"hostile files: of {len(costs)}, not refused with an error of ours", "0", ", ".join(foreign) or "0", not foreign),
        Figure(
            "hostile files: most memory above the process's own", f"{LIMIT_MEBIBYTES:g} MiB",
            f"{most:.0f} MiB ({heaviest})", most <= LIMIT_MEBIBYTES,
        ),
        Figure(
            "hostile files: longest", f"{LIMIT_SECONDS:g} s", f"{longest:.1f} s ({slowest})", longest <= LIMIT_SECONDS
        ),
    ]  # fmt: skip


def reader_memory(epochs: int = EPOCHS) -> list[Figure]:
    """Memory of a reader over epochs in the sampler's order and in the file's, and against the cache's size."""
    figures, peaks = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for shards in SHARD_COUNTS:
            directory = Path(folder) / str(shards)
            size = _write_cache(directory, shards)
            for order in ("random", "sequential"):
                after, peak = _passes(directory, order, epochs)
                peaks[order, shards] = peak
                # The allocator settles during the first pass or two.
                growth = max(after[2:]) - after[1]
                figures.append(
                    Figure(
                        f"reader memory, {shards} shards, {order}: growth from epoch 2 to {epochs}",
                        f"{FLAT_MEBIBYTES:g} MiB", f"{growth:+.1f} MiB", growth <= FLAT_MEBIBYTES,
                    )
                )  # fmt: skip
    for order in ("random", "sequential"):
        one, eight, most = (peaks[order, n] for n in SHARD_COUNTS)
        allowed = max(eight, one + KEEP * size) + FLAT_MEBIBYTES
        figures.append(
            Figure(
                f"reader memory, {order}: most with 64 shards", f"{allowed:.0f} MiB: {KEEP} decoded shards of {size:.1f} MiB",
                f"{most:.0f} MiB (8 shards {eight:.0f}, 1 shard {one:.0f})", most <= allowed,
            )
        )  # fmt: skip
    return figures


def _write_cache(directory: Path, shards: int) -> float:
    """A cache of so many equal train shards and a small validation shard; MiB of one decoded shard."""
    from tests.cache.samples import TOKENS, sample_plan, sample_sequences

    content, last = sample_sequences(_SEQUENCES, seed=1), sample_sequences(1, seed=2)
    contents = [content] * shards + [last]
    writer = CacheWriter(directory, sample_plan(contents), TOKENS)
    for index, each in enumerate(contents):
        writer.commit(index, each)
    writer.finalise()
    return _decoded_mebibytes(open_cache(directory).shard(0))


def _decoded_mebibytes(content: ShardContent) -> float:
    arrays = [*vars(content).values(), *vars(content.rows).values()]
    return sum(a.nbytes for a in arrays if isinstance(a, np.ndarray)) / (1 << 20)


def _passes(directory: Path, order: str, epochs: int) -> tuple[list[float], float]:
    """Memory after each epoch of a process of its own, and its most, in MiB above what it had before."""
    command = [sys.executable, __file__, "--pass", str(directory), order, str(epochs)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    before, after, peak = json.loads(done.stdout)
    return [m - before for m in after], peak - before


def _read_epochs(directory: str, order: str, epochs: int) -> None:
    before, after = memory("VmRSS"), []
    cache = open_cache(directory, keep=KEEP)
    split = cache.split("train")
    sizes = [cache.plan.shards[i].sequences for i in split.shards]
    for epoch in range(epochs):
        _read(split, _order(sizes, cache.id, epoch) if order == "random" else None)
        after.append(memory("VmRSS"))
    print(json.dumps((before, after, memory("VmHWM"))))


def _order(sizes, cache_id, epoch):
    order = EpochOrder(sizes, cache_id=cache_id, seed=0, epoch=epoch)
    return order.between(0, len(order)).tolist()


def _read(split: Split, order: Sequence[int] | None) -> None:
    """One pass over every sequence."""
    for sequence in split if order is None else (split[i] for i in order):
        assert len(sequence.rows) == int(sequence.targets.sum())


def main() -> None:
    """Repeat one attack, or read a cache for `reader_memory`."""
    if sys.argv[1:2] == ["--pass"]:
        _read_epochs(sys.argv[2], sys.argv[3], int(sys.argv[4]))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("attack", choices=["random_bytes", "structural"])
    parser.add_argument("number", type=int, help="as a failure names it")
    given = parser.parse_args()
    started = time.perf_counter()
    tally = run(given.attack, 1, first=given.number, workers=1)
    print(*tally.failures or tally.outcomes, f"{time.perf_counter() - started:.1f} s", sep="\n")


if __name__ == "__main__":
    main()
