"""A disk of which one call fails, and a small run on it for every call in turn."""

from __future__ import annotations

import errno
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdcache.cache.layout import TEMPORARY_PREFIX
from kdcache.errors import StorageError
from tests.crash.small_run import CALLS, Source, bad_files, files, run

CODES = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO, "EDQUOT": errno.EDQUOT}


class FaultyDisk:
    """Counts calls of ``names`` in ``os``; number ``point`` fails: undone, or done and reported as failed."""

    def __init__(self, point: int, code: int, *, done: bool = False, names: Sequence[str] = CALLS) -> None:
        self.point, self.code, self.done = point, code, done
        self.calls: list[str] = []
        self._real = {name: getattr(os, name) for name in names}

    def __enter__(self) -> FaultyDisk:
        for name, real in self._real.items():
            setattr(os, name, self._guarded(name, real))
        return self

    def __exit__(self, *exc: object) -> None:
        for name, real in self._real.items():
            setattr(os, name, real)

    def _guarded(self, name: str, real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append(name)
            failing = len(self.calls) - 1 == self.point
            # A descriptor is gone after close, whatever it says.
            result = real(*args, **kwargs) if not failing or self.done or name == "close" else None
            if failing:
                if self.done and name == "open":
                    self._real["close"](result)
                raise OSError(self.code, os.strerror(self.code))
            return result

        return call

    @property
    def failed(self) -> str | None:
        """Name of the call that failed; None where the run made fewer."""
        return self.calls[self.point] if self.point < len(self.calls) else None

    @property
    def after(self) -> set[str]:
        """Names of the calls made after it."""
        return set(self.calls[self.point + 1 :])


@dataclass
class FaultTally:
    """What a series of faults came to; ``wrong`` is to be empty."""

    faults: Counter[str] = field(default_factory=Counter)
    refused: int = 0
    wrong: list[str] = field(default_factory=list)
    seconds: float = 0.0


def fail_each_call(source: Source, directory: Path, code: int, *, done: bool = False) -> FaultTally:
    """Let each call of a run fail once in turn, go on without faults, and compare."""
    tally, started, point = FaultTally(), time.monotonic(), 0
    while True:
        place, refused = directory / str(point), None
        with FaultyDisk(point, code, done=done) as disk:
            try:
                run(source, place)
            except StorageError as exc:
                refused = str(exc)
        if disk.failed is None:
            break
        tally.faults[disk.failed] += 1
        tally.refused += refused is not None
        wrong = _wrong(disk, refused)
        if place.exists():
            wrong += [f"bad {name}" for name in bad_files(source, place)]
            left = [name for name in files(place) if TEMPORARY_PREFIX in name]
            # What could not be removed, or was made by a call that said it was not, is left to the next run.
            if left and disk.failed != "unlink" and not (done and disk.failed == "open"):
                wrong.append("a temporary file is left")
        run(source, place)
        if files(place) != source.files:
            wrong.append("the run that goes on ends in other bytes")
        tally.wrong += [f"call {point}, {disk.failed}: {what}" for what in wrong]
        point += 1
    tally.seconds = time.monotonic() - started
    return tally


def _wrong(disk: FaultyDisk, refused: str | None) -> list[str]:
    if refused is None:
        # Only tidying up may fail without a word, and making what is there.
        harmless = disk.failed == "unlink" or (disk.done and disk.failed == "mkdir")
        return [] if harmless else ["the failure went unnoticed"]
    wrong = []
    if os.strerror(disk.code) not in refused or "\n" in refused:
        wrong.append(f"the error does not say what failed: {refused}")
    # Nothing is tried again after a failure, flushes least of all.
    if not disk.after <= {"close", "unlink"}:
        wrong.append(f"the run goes on with {sorted(disk.after)}")
    return wrong
