"""Many attacks in worker processes, watched from outside: a crash or a hang is seen, counted, and the rest goes on."""

from __future__ import annotations

import multiprocessing
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from tests.hostile.victims import load_victims, make_victims, write_files

HANG_SECONDS = 5.0
_STARTING_SECONDS = 120.0  # imports, on a busy machine
_BATCH = 50


@dataclass
class Tally:
    """What became of the attacks: counts by kind and outcome, and each failure with what repeats it."""

    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    crashes: int = 0
    hangs: int = 0
    slowest: float = 0.0
    seconds: float = 0.0

    @property
    def cases(self) -> int:
        """Attacks made."""
        return self.outcomes.total()

    def count(self, outcome: str) -> int:
        """Attacks with this outcome, of every kind."""
        return sum(n for (_, o), n in self.outcomes.items() if o == outcome)


def run(attack: str, cases: int, *, first: int = 0, workers: int = 2) -> Tally:
    """Attacks ``first`` to ``first + cases`` of the module ``attack`` in this package.

    A worker reports after every batch; one that dies or takes more than 5 s over a case is replaced and goes on behind it.
    """
    tally, started = Tally(), time.perf_counter()
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(dir=_memory_folder()) as folder:
        make_victims(Path(folder) / "victims")
        share = -(-cases // workers)
        spans = [(first + w * share, min(first + cases, first + (w + 1) * share)) for w in range(workers)]
        running = [
            _Worker(context, attack, Path(folder), n, *span) for n, span in enumerate(spans) if span[0] < span[1]
        ]
        while running:
            wait([w.pipe for w in running] + [w.process.sentinel for w in running], timeout=0.5)
            running = [w for w in running if w.collect(tally)]
    tally.seconds = time.perf_counter() - started
    return tally


class _Worker:
    def __init__(self, context: Any, attack: str, folder: Path, number: int, start: int, stop: int) -> None:
        self._context, self._arguments, self.stop = context, (attack, folder, number), stop
        self._failed: set[int] = set()
        self._start(start)

    def _start(self, start: int) -> None:
        # The case in hand and when it began, in memory that outlives the process.
        self.case, self.since = self._context.Value("q", start, lock=False), self._context.Value("d", 0.0, lock=False)
        self.reached, self._born = start, time.monotonic()
        self.pipe, theirs = self._context.Pipe(duplex=False)
        arguments = (*self._arguments, start, self.stop, self._failed, self.case, self.since, theirs)
        self.process = self._context.Process(target=_work, args=arguments, daemon=True)
        self.process.start()
        theirs.close()

    def collect(self, tally: Tally) -> bool:
        """Take in what has come; returns whether there is more to wait for."""
        try:
            while self.pipe.poll():
                self.reached, outcomes, failures, slowest = self.pipe.recv()
                tally.outcomes.update(outcomes)
                tally.failures += failures
                tally.slowest = max(tally.slowest, slowest)
        except EOFError:
            self.process.join()
        name, begun = self._arguments[0], self.since.value
        if not self.process.is_alive():
            self.process.join()
            if self.reached >= self.stop:
                return False
            self._go_on(tally, "crash", f"{name} {self.case.value}: the process ended with {self.process.exitcode}")
        elif time.monotonic() - (begun or self._born + _STARTING_SECONDS) > HANG_SECONDS:
            self.process.kill()
            self.process.join()
            self._go_on(tally, "hang", f"{name} {self.case.value}: more than {HANG_SECONDS:g} s")
        return True

    def _go_on(self, tally: Tally, what: str, failure: str) -> None:
        if not self.since.value:
            raise RuntimeError(f"a worker ended before its first attack: {failure}")
        tally.outcomes[what, what] += 1
        tally.failures.append(failure)
        tally.crashes += what == "crash"
        tally.hangs += what == "hang"
        self._failed.add(self.case.value)
        self._start(self.reached)  # what has not been reported is done again


def _work(
    attack: str,
    folder: Path,
    number: int,
    start: int,
    stop: int,
    failed: set[int],
    case: Any,
    since: Any,
    pipe: Any,
) -> None:
    warnings.simplefilter("error")
    module = import_module(f"tests.hostile.{attack}")
    make: Callable[..., tuple[str, str]] = module.attack
    getattr(module, "prepare", lambda: None)()  # imports are no part of the first case
    victims = load_victims(folder / "victims")
    directories = {v.name: folder / f"worker-{number}" / v.name for v in victims}
    for victim in victims:
        write_files(directories[victim.name], victim.files)
    outcomes: Counter[tuple[str, str]] = Counter()
    failures, slowest = [], 0.0
    for index in range(start, stop):
        if index in failed:
            continue
        case.value, since.value = index, time.monotonic()
        try:
            kind, outcome = make(victims, directories, index)
        except BaseException as exc:
            kind, outcome = f"{type(exc).__name__}", "FOREIGN ERROR"
            where = traceback.extract_tb(exc.__traceback__)[-1]
            failures.append(
                f"{attack} {index}: {type(exc).__name__}: {str(exc)[:200]} ({Path(where.filename).name}:{where.lineno})"
            )
        else:
            if outcome.isupper():
                failures.append(f"{attack} {index}: {kind}: {outcome}")
        slowest = max(slowest, time.monotonic() - since.value)
        outcomes[kind, outcome] += 1
        if outcomes.total() == _BATCH:
            pipe.send((index + 1, outcomes, failures, slowest))
            outcomes.clear()
            failures.clear()
    pipe.send((stop, outcomes, failures, slowest))
    since.value = time.monotonic() + 3600.0  # leaving takes as long as it takes


def _memory_folder() -> str | None:
    """Where files cost no disk, if there is such a place."""
    shared = Path("/dev/shm")
    return str(shared) if shared.is_dir() else None
