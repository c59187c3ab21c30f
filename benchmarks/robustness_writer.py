"""What it takes to lose a byte of a cache that is being written: kills and faults, counted.

    python benchmarks/robustness_writer.py [--kills 1000] [--workers 3] [--directory DIR]

A small run makes four shards and everything around them again and again. It is killed before and after each of its
calls, at each of its system calls (with strace), and at random moments, alone and beside others; and each of its calls
fails once with a full disk, a broken one and a full quota. After each, what is there is compared, the run is gone on
with, and the directory is compared with an undisturbed one.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.crash.faults import CODES, fail_each_call
from tests.crash.reference import make_reference
from tests.crash.small_run import Source, Tally, killed


@dataclass(frozen=True)
class Row:
    """One line of the table: what was done how often, how many directories were compared, and how many differed."""

    attack: str
    count: int
    compared: int
    bad: int
    seconds: float

    def __str__(self) -> str:
        return f"| {self.attack} | {self.count:,} | {self.compared:,} | {self.bad} | {self.seconds:.0f} |"


def kill_rows(reference: Path, place: Path, *, kills: int, workers: int) -> list[Row]:
    """Kills at every point of a run, and ``kills`` at random moments, half of them with several processes at once."""

    def row(attack: str, tally: Tally) -> Row:
        return Row(attack, tally.kills, tally.completions, len(tally.differing), tally.seconds)

    rows = [row("killed before and after every call of the run", killed(reference, place / "calls"))]
    if shutil.which("strace"):
        rows.append(
            row("killed at every system call of the run", killed(reference, place / "system", "--system-calls", "1"))
        )
    alone, together = kills - kills // 2, kills // 2
    rows.append(row("killed at random", killed(reference, place / "random", "--random", str(alone))))
    rows.append(
        row(
            f"killed at random, up to {workers} workers at once",
            killed(reference, place / "together", "--random", str(together), "--workers", str(workers), "--seed", "1"),
        )
    )
    return rows


def fault_rows(reference: Path, place: Path) -> list[Row]:
    """Each call of a run fails once, undone or done and reported as failed."""
    source, rows = Source.of(reference), []
    for name, code in CODES.items():
        for done in (False, True):
            tally = fail_each_call(source, place / f"{name}-{done}", code, done=done)
            faults = sum(tally.faults.values())
            how = "though done" if done else "and does nothing"
            rows.append(
                Row(f"every call fails once with {name} {how}", faults, faults, len(tally.wrong), tally.seconds)
            )
    return rows


def main() -> None:
    """Print the table; exit 1 where anything was bad."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=1000, help="kills at random moments")
    parser.add_argument("--workers", type=int, default=3, help="most processes at once")
    parser.add_argument("--directory", type=Path, help="where to write: on the file system to be tried")
    given = parser.parse_args()
    place = Path(tempfile.mkdtemp(dir=given.directory))
    try:
        reference = make_reference(place / "reference")
        rows = kill_rows(reference, place, kills=given.kills, workers=given.workers) + fault_rows(reference, place)
    finally:
        shutil.rmtree(place)
    print("| attack | times | directories compared | bad | seconds |\n|---|---:|---:|---:|---:|")
    print("\n".join(map(str, rows)))
    sys.exit(1 if any(row.bad for row in rows) else 0)


if __name__ == "__main__":
    main()
