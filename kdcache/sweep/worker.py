"""A process that trains rows one after the other, and the handle by which the sweep talks to it.

It is started by spawn, not forked, keeps what `kdcache.student.kept` keeps, and ends with its parent, however that ends.
Nothing heavy is imported by the parent's side.

A worker takes ``(CHECK or TRAIN, recipe, overwrite)`` until its pipe is closed, and sends ``(kind, *content)``:
of a row at work ``begin``, ``advance``, ``end``, ``message``, ``warning`` as `kdcache.progress.Progress` has them; and
at last ``checked`` or ``trained`` with the scores of run.json or None, ``refused`` with the name of an error class and its message, or
``failed`` with one line and a traceback.
"""

from __future__ import annotations

import gc
import importlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

from kdcache.errors import KdcacheError
from kdcache.recipe import Recipe

CHECK, TRAIN = "check", "train"
# What a worker says last of a row that it was to train.
ENDS = ("trained", "refused", "failed")
_ADVANCE_EVERY_SECONDS = 0.1
_STOP_SECONDS = 5.0


class Worker:
    """A worker process, seen from the sweep.

    Args:
        number: from 0; chooses the GPU.
        workers: how many there are, to share out CPU cores.
    """

    def __init__(self, number: int, workers: int) -> None:
        self.number = number
        self.row: str | None = None
        # What the process has been made into by its rows; see `kind_of`.
        self.kind: tuple[bool, ...] | None = None
        self.base: dict[str, Any] | None = None
        self.spoilt = False
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self._process = context.Process(
            target=serve,
            args=(theirs, number, workers, multiprocessing.get_start_method()),
            name=f"kdcache-sweep-{number}",
        )
        # Ctrl-C reaches every process of a terminal; what becomes of the rows is for the parent to say.
        with _interrupts_ignored():
            self._process.start()
        theirs.close()

    @property
    def pid(self) -> int | None:
        """Of the process."""
        return self._process.pid

    def give(self, task: str, name: str, recipe: Recipe, *, overwrite: bool = False) -> None:
        """Start a row; one at a time. A process that is gone is noticed by `death`."""
        self.row = name
        try:
            self.connection.send((task, recipe, overwrite))
        except OSError:
            self._process.join(_STOP_SECONDS)

    def news(self) -> Iterator[tuple[Any, ...]]:
        """What it has sent since."""
        try:
            while self.connection.poll():
                yield self.connection.recv()
        except (EOFError, OSError):
            # `death` says how it ended; its pipe may break some moments before.
            self._process.join(_STOP_SECONDS)

    def death(self) -> str | None:
        """How the process ended, None while it lives."""
        code = self._process.exitcode
        if code is None:
            return None
        if code >= 0:
            return f"its process ended with exit code {code}"
        name = signal.Signals(-code).name
        memory = ": out of memory, as a rule" if -code == signal.SIGKILL else ""
        return f"its process was ended by {name}{memory}"

    def stop(self) -> None:
        """End the process, whatever it is doing: one that is idle leaves by itself when its pipe closes."""
        if self.row is None:
            self.connection.close()
            self._process.join(_STOP_SECONDS)
        if self._process.exitcode is None:
            self._process.terminate()
            self._process.join(_STOP_SECONDS)
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join()
        self.connection.close()
        self._process.close()


def kind_of(recipe: Recipe) -> tuple[bool, ...]:
    """Settings that a row leaves behind in its process; rows that differ in them get a fresh one."""
    return recipe.training.tf32, recipe.training.compile


def serve(connection: Connection, number: int, workers: int, start_method: str) -> None:
    """The life of a worker process; ``start_method`` is how it starts the readers of a training's batches in its turn."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Leaves through every finally on the way, so that locks and half-written files are put away.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    # What was spawned would spawn as well, and every reader import everything anew.
    multiprocessing.set_start_method(start_method, force=True)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    warnings.simplefilter("ignore")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    _take_share(number, workers)
    code = 1
    try:
        # Long imports, while the parent looks at the rows.
        importlib.import_module("kdcache.student.distill")
        # They stay: looked through at every collection, they would take longer than all the rest.
        gc.collect()
        gc.freeze()
        work(connection)
        code = 0
    except Exception:  # not of a row: what is installed is broken
        traceback.print_exc()
    finally:
        for reader in multiprocessing.active_children():
            reader.terminate()
        sys.stdout.flush()
        sys.stderr.flush()
        # To take torch down piece by piece takes seconds, and nothing is left that would want it.
        os._exit(code)


def work(connection: Connection) -> None:
    """Do what comes through the pipe until it is closed."""
    from kdcache.student.distill import check_student, distill
    from kdcache.student.kept import Kept

    kept, report = Kept(), _Piped(connection)
    while True:
        try:
            task, recipe, overwrite = connection.recv()
        except (EOFError, OSError):
            return
        try:
            if task == CHECK:
                record = check_student(recipe, kept, overwrite=overwrite)
                answer: tuple[Any, ...] = ("checked", None if record is None else record.scores)
            else:
                record = distill(recipe, resume=True, progress=report, kept=kept)
                kept.release()
                answer = ("trained", record.scores)
        except KdcacheError as exc:
            answer = ("refused", type(exc).__name__, str(exc))
        except Exception as exc:  # whatever it is, it is this row's failure and no other's
            line = " ".join(str(exc).split())[:400]
            answer = ("failed", f"{type(exc).__name__}: {line}", traceback.format_exc())
        report.send(*answer)


def _take_share(number: int, workers: int) -> None:
    """One GPU for each worker, in turn; without any, a share of the cores, unless the environment says how many."""
    import torch

    gpus = torch.cuda.device_count()
    if gpus > 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
        # torch counts without starting CUDA, which reads this once, when it starts.
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[number % gpus].strip()
    elif gpus == 0 and workers > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """A process that is started now ignores SIGINT from its first moment on."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class _Piped:
    """A `Progress` that goes through the pipe, ten times a second at most."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._amount, self._note, self._sent = 0, "", 0.0

    def send(self, *content: Any) -> None:
        """Through the pipe; where nobody listens any more, the process ends."""
        try:
            self._connection.send(content)
        except OSError:
            sys.exit(1)

    def message(self, text: str) -> None:
        """Pass on."""
        self.send("message", text)

    def warning(self, text: str) -> None:
        """Pass on."""
        self.send("warning", text)

    def begin(self, task: str, total: int, unit: str) -> None:
        """Pass on."""
        self._flush()
        self.send("begin", task, total, unit)

    def advance(self, amount: int, note: str = "") -> None:
        """Pass on, or add up until it is time."""
        self._amount, self._note = self._amount + amount, note
        if time.monotonic() - self._sent >= _ADVANCE_EVERY_SECONDS:
            self._flush()

    def end(self) -> None:
        """Pass on."""
        self._flush()
        self.send("end")

    def _flush(self) -> None:
        if self._amount or self._note:
            self.send("advance", self._amount, self._note)
        self._amount, self._note, self._sent = 0, "", time.monotonic()
