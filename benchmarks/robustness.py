"""Everything that is done to a cache to break it, in one table: what was found, beside what it has to be.

    python benchmarks/robustness.py             # a few minutes
    python benchmarks/robustness.py --soak      # a million changed files and more: a quarter of an hour

Exits with 1 where a figure misses its target. Reader: ``robustness_reader.py``; writer: ``robustness_writer.py``; verify's
speed: ``verify_speed.py``; transfers over a bad network: ``tests/cache/transfer_trials.py``.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import pydantic
import safetensors
import zstandard
from robustness_reader import (
    Figure,
    fuzz,
    fuzz_figures,
    hostile_figures,
    hostile_files,
    kinds_table,
    reader_memory,
)


@dataclass(frozen=True)
class Size:
    """How much of everything is done."""

    random_bytes: int
    structural: int
    kills: int
    transfers: int
    megabytes: int


RANDOM_TARGET, STRUCTURAL_TARGET, KILL_TARGET, TRANSFER_TARGET = 1_000_000, 100_000, 1000, 100
VERIFY_TARGET = 0.8
SHORT = Size(random_bytes=50_000, structural=10_000, kills=40, transfers=10, megabytes=48)
SOAK = Size(random_bytes=1_050_000, structural=110_000, kills=KILL_TARGET, transfers=TRANSFER_TARGET, megabytes=128)


def reader_part(size: Size, details: list[str]) -> list[Figure]:
    """Changed bytes, forged caches, hostile files, memory."""
    figures = []
    for name, attack, cases, target in (
        ("random changes of covered bytes", "random_bytes", size.random_bytes, RANDOM_TARGET),
        ("forged caches, hashes made right", "structural", size.structural, STRUCTURAL_TARGET),
    ):
        tally = fuzz(attack, cases)
        figures += fuzz_figures(name, target, tally)
        details += [f"\n{name}\n\n{kinds_table(tally)}", *(f"\nFAILED {failure}" for failure in tally.failures[:20])]
    costs = hostile_files()
    details.append("\n| hostile file | read / verify | MiB | seconds |\n|---|---|---:|---:|")
    details += [f"| {name} | {c.outcome} | {c.mebibytes:.0f} | {c.seconds:.2f} |" for name, c in costs.items()]
    return [*figures, *hostile_figures(costs), *reader_memory()]


def writer_part(size: Size, details: list[str]) -> list[Figure]:
    """Kills and injected faults."""
    from robustness_writer import fault_rows, kill_rows

    from tests.crash.reference import make_reference

    with tempfile.TemporaryDirectory() as folder:
        reference = make_reference(Path(folder) / "reference")
        kills = kill_rows(reference, Path(folder), kills=size.kills, workers=3)
        faults = fault_rows(reference, Path(folder))
    details.append("\n| attack on the writer | times | compared | bad | seconds |\n|---|---:|---:|---:|---:|")
    details += [str(row) for row in kills + faults]
    figures = []
    for what, rows, target in (
        ("writer: kills", kills, f"{KILL_TARGET:,} in a soak, 0 bad"),
        ("writer: faults", faults, "0 bad"),
    ):
        count, bad = sum(r.count for r in rows), sum(r.bad for r in rows)
        figures.append(Figure(what, target, f"{count:,}, {bad} bad", count > 0 and bad == 0))
    return figures


def verify_part(size: Size, details: list[str]) -> list[Figure]:
    """Speed of verify beside its two unavoidable parts."""
    from verify_speed import make_cache, measure, share_of_slower, table

    with tempfile.TemporaryDirectory() as folder:
        speeds = measure(make_cache(Path(folder) / "cache", megabytes=size.megabytes), rounds=3)
    details.append("\n" + table(speeds))
    share = share_of_slower(speeds)
    return [
        Figure(
            "verify, all threads, against the slower of SHA-256 and zstd", f"{VERIFY_TARGET:.0%}", f"{share:.0%}",
            share >= VERIFY_TARGET,
        )
    ]  # fmt: skip


def transfer_part(size: Size, details: list[str]) -> list[Figure]:
    """Push and pull through a proxy that breaks what passes it."""
    from tests.cache.servers import KEYS, s3_server
    from tests.cache.transfer_trials import run_trials

    os.environ.update(KEYS)
    with s3_server() as server:
        outcomes, faults = run_trials(size.transfers, server=server)
    details.append("\nfaults dealt out: " + ", ".join(f"{getattr(f, 'name', f)} {n:,}" for f, n in faults.items()))
    count, share = sum(outcomes.values()), outcomes["ok"] / max(1, sum(outcomes.values()))
    return [
        Figure(
            "round trips over a bad network", f"{TRANSFER_TARGET:,} in a soak, 0 wrong",
            f"{count:,}: {share:.1%} whole, {outcomes['typed']} an error of ours, {outcomes['wrong']} wrong",
            outcomes["wrong"] == 0,
        )
    ]  # fmt: skip


PARTS: dict[str, Callable[[Size, list[str]], list[Figure]]] = {
    "reader": reader_part, "writer": writer_part, "verify": verify_part, "transfer": transfer_part,
}  # fmt: skip


def main() -> None:
    """Print the table, then the details."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--soak", action="store_true", help="the full numbers")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    given = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    details: list[str] = []
    bad, started = 0, time.perf_counter()
    print(
        f"{platform.processor() or platform.machine()}, {len(os.sched_getaffinity(0))} processors, "
        f"{platform.system()} {platform.release()}, Python {platform.python_version()}, numpy {np.__version__}, "
        f"zstandard {zstandard.__version__}, safetensors {safetensors.__version__}, pydantic {pydantic.VERSION}"
    )
    print("\n| figure | target | found | met |\n|---|---|---|---|")
    for name in given.parts:
        try:
            figures = PARTS[name](SOAK if given.soak else SHORT, details)
        except ImportError as exc:
            figures = [Figure(name, "", f"not available: {exc}", good=False)]
        for figure in figures:
            print(figure, flush=True)
            bad += not figure.good
    print("\n".join(details))
    print(f"\n{time.perf_counter() - started:,.0f} s; {bad or 'none'} of the figures misses its target")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
