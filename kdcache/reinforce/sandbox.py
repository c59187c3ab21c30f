"""Unit tests of generated Python, run where it can do no harm, or as little as can be had without a virtual machine.

Each judgement takes an interpreter of its own (``python -I -S``: no site packages, no user site, none of this process's
environment) in a session of its own and an empty temporary directory, with limits of CPU time and memory, a wall clock over
all of it, and the kernel's filter of `cell_filter`; where kdcache runs as root, the cell becomes the user nobody first, if
nobody may read Python's own library.
`cell` says why generated code cannot pass by exiting early or by objects that equal everything.

What it stops: network (no socket of any kind can be made), processes and threads, signals, writing anywhere, endless loops,
memory, output. Also, therefore, honest code that needs threads, files, asyncio or packages beyond the standard library.

What it does not stop: *reading* files that the user may read (nothing read can leave but as one bit, passed or not); finding
out that it is being tested, from the arguments, and answering those alone; a hole in the kernel. The tests themselves come
from the data set and are confined in the same way, but their verdict is believed. Where the filter cannot be had (another
system than Linux, another processor than x86-64 or arm64, a container that forbids it) no generated code is run at all.
The numbers for arm64 were taken from the kernel's tables, and have not been run.
"""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from kdcache.errors import TrainingError
from kdcache.reinforce.cell import FRAME_LIMIT

_CELL = Path(__file__).with_name("cell.py")
_MOST_AT_ONCE = 8


@dataclass(frozen=True)
class Limits:
    """Of one judgement.

    Attributes:
        seconds: of wall clock, over everything; also, rounded up, of CPU time for each of the two processes.
        memory_bytes: address space of each process.
    """

    seconds: float = 5.0
    memory_bytes: int = 256 << 20


@dataclass(frozen=True)
class Verdict:
    """Whether all tests passed, and in words why not."""

    passed: bool
    reason: str = ""


def run_tests(code: str, tests: str, limits: Limits | None = None) -> Verdict:
    """Judge generated ``code`` by ``tests``: Python statements, mostly ``assert f(x) == y``, in which its functions are known.

    Raises:
        TrainingError: this machine cannot confine a process.
    """
    limits = limits or Limits()
    job = {
        "code": code,
        "cpu_seconds": max(1, -(-int(limits.seconds * 1000) // 1000)),
        "memory_bytes": limits.memory_bytes,
    }
    frames = [json.dumps(job).encode(), tests.encode(errors="surrogatepass")]
    if max(map(len, frames)) > FRAME_LIMIT:
        return Verdict(False, f"code or tests are longer than {FRAME_LIMIT:,} bytes")
    given = b"".join(struct.pack("<I", len(frame)) + frame for frame in frames)
    # Where the interpreter's own libraries lie, and nothing else of the environment.
    environment = {k: v for k, v in os.environ.items() if k == "LD_LIBRARY_PATH"}
    with tempfile.TemporaryDirectory(prefix="kdcache-cell-") as folder:
        Path(folder).chmod(0o755)
        process = subprocess.Popen(  # noqa: S603 (our own script)
            [sys.executable, "-I", "-S", "-B", str(_CELL)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=folder,
            env=environment,
            start_new_session=True,
        )
        try:
            said, complaint = process.communicate(given, timeout=limits.seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return Verdict(False, f"not done after {limits.seconds:g} s")
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
    return _verdict(said, complaint, process.returncode)


def judge_all(jobs: Sequence[tuple[str, str]], limits: Limits) -> list[Verdict]:
    """Verdicts on pairs of code and tests, in their order; as many at a time as there are processors, at most eight.

    Raises:
        TrainingError: this machine cannot confine a process.
    """
    with ThreadPoolExecutor(min(_MOST_AT_ONCE, os.cpu_count() or 1)) as pool:
        return list(pool.map(lambda job: run_tests(job[0], job[1], limits), jobs))


@cache
def refuse_without_walls() -> None:
    """Try the sandbox out: honest code should pass, and code that makes a socket should not.

    Raises:
        TrainingError: this machine cannot confine a process, or its interpreter does not start in there.
    """
    limits = Limits(seconds=30.0)
    honest = run_tests("import heapq\ndef f(x):\n    return heapq.nsmallest(1, x)", "assert f([3, 1]) == [1]", limits)
    leaky = run_tests("import socket\ndef f():\n    socket.socket()\n    return 1", "assert f() == 1", limits)
    if not honest.passed or leaky.passed:
        why = honest.reason or "a socket can be made in there"
        raise TrainingError(
            f"generated Python cannot be judged safely on this machine: {why}; use rewards.check numeric"
        )


def _verdict(said: bytes, complaint: bytes, code: int) -> Verdict:
    if not said:
        if b"cell_filter" in complaint and b"OSError" in complaint:
            last = complaint.decode(errors="replace").strip().splitlines()[-1]
            raise TrainingError(f"generated Python cannot be confined on this machine, so none is run: {last}")
        how = f"stopped by {signal.Signals(-code).name}" if code < 0 else "ended without a verdict"
        return Verdict(False, f"the tests were {how}")
    found = json.loads(said)
    return Verdict(found["passed"] is True, str(found["reason"]))
