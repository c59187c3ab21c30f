"""How a transfer goes on, is counted, and ends: waits between tries, bytes as they move, a bound on what arrives."""

from __future__ import annotations

import random
import threading
from dataclasses import dataclass

from fsspec.callbacks import Callback

from kdcache.errors import DamagedObjectError, TransferError
from kdcache.progress import Progress, Silent


@dataclass(frozen=True)
class Retry:
    """How often an object is tried, and how long is waited in between (seconds).

    The wait doubles from ``first`` up to ``ceiling``; half of it is random, so that many readers that failed
    together do not come back together.
    """

    attempts: int = 5
    first: float = 0.5
    ceiling: float = 20.0

    def pause(self, failures: int) -> float:
        """Seconds to wait after so many failures."""
        return min(self.ceiling, self.first * 2.0 ** (failures - 1)) * random.uniform(0.5, 1.0)


class StoppedError(TransferError):
    """Another object of the same transfer has failed, or the user has had enough."""


class Meter:
    """Bytes moved, shown as they move; many threads report to it."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress: Progress = progress or Silent()
        self._lock = threading.Lock()
        self._running = False

    def begin(self, task: str, total: int) -> None:
        """So many bytes are to be moved; until now nothing has been counted."""
        self._running = True
        self._progress.begin(task, total, "B")

    def add(self, amount: int) -> None:
        """So many more are; fewer after an attempt that has to be made again."""
        with self._lock:
            if self._running:
                self._progress.advance(amount)

    def end(self) -> None:
        """Done or not."""
        self._running = False
        self._progress.end()

    def message(self, text: str) -> None:
        """One line."""
        with self._lock:
            self._progress.message(text)


class Guard(Callback):  # type: ignore[misc]
    """Hears of every chunk: counts it, and ends a download that is too long or no longer wanted."""

    def __init__(self, what: str, limit: int, meter: Meter, stop: threading.Event) -> None:
        super().__init__()
        self.received = 0
        self._what, self._limit, self._meter, self._stop = what, limit, meter, stop

    def set_size(self, size: int | None) -> None:
        """The size that the other side states."""
        if isinstance(size, int):
            self._hold(size)

    def relative_update(self, inc: int = 1) -> None:
        """So many bytes have come."""
        self.received += inc
        self._meter.add(inc)
        self._hold(self.received)
        if self._stop.is_set():
            raise StoppedError(f"{self._what} was not moved: the transfer has stopped")

    def _hold(self, size: int) -> None:
        if size > self._limit:
            raise DamagedObjectError(f"{self._what} is damaged: expected at most {self._limit} bytes, found {size}")
