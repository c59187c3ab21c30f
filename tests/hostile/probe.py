"""What opening directories costs: one process imports the reader, and forks for each so that none sees another's memory.

``python -m tests.hostile.probe DIRECTORY...`` prints a line of JSON for each.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

LIMIT_MEBIBYTES = 256.0
LIMIT_SECONDS = 5.0
_PATIENCE_SECONDS = 60
ROOT = Path(__file__).parent.parent.parent


@dataclass(frozen=True)
class Cost:
    """Errors met by reading and by verifying, most memory above what the process had before, seconds of the slower."""

    outcome: str
    mebibytes: float
    seconds: float

    @property
    def harmless(self) -> bool:
        """Errors of ours alone, within memory and time."""
        return (
            all(name.endswith("Error") or name == "none" for name in self.outcome.split("/"))
            and self.mebibytes <= LIMIT_MEBIBYTES
            and self.seconds <= LIMIT_SECONDS
        )


def probe(directories: Sequence[Path]) -> list[Cost]:
    """Open each directory in a process of its own; one that dies or never ends is an outcome too."""
    command = [sys.executable, "-W", "error", "-m", "tests.hostile.probe", *map(str, directories)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return [Cost(**json.loads(line)) for line in done.stdout.splitlines()]


def memory(field: str) -> float:
    """``VmHWM`` (most ever) or ``VmRSS`` (now) in MiB. Not getrusage: that remembers the process before it."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def _cost(directory: Path) -> dict[str, object]:
    from tests.hostile.files import USES, outcome

    before, names, slowest = memory("VmRSS"), [], 0.0
    for use in USES:
        started = time.perf_counter()
        names.append(outcome(use, directory))
        slowest = max(slowest, time.perf_counter() - started)
    return {"outcome": "/".join(names), "mebibytes": memory("VmHWM") - before, "seconds": slowest}


def main() -> None:
    """Open the directories of the command line."""
    import tests.hostile.files  # noqa: F401  loaded before anything is measured

    for directory in map(Path, sys.argv[1:]):
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            signal.alarm(_PATIENCE_SECONDS)
            print(json.dumps(_cost(directory)), flush=True)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status:
            what = "HANG" if status == -signal.SIGALRM else f"CRASH {status}"
            print(json.dumps({"outcome": what, "mebibytes": 0.0, "seconds": 0.0}), flush=True)


if __name__ == "__main__":
    main()
