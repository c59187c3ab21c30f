"""Ctrl-C, or SIGTERM, as a request: the step in flight is ended, a checkpoint written, and the training stops there."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import transformers

from kdcache.progress import Progress


class Stop(transformers.TrainerCallback):
    """Saves and stops a Trainer where that was asked for."""

    asked = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Have the checkpoint written."""
        if self.asked:
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave as it stands. Told to stop, the Trainer would say so in the checkpoint, which would then be taken for a finished
        training's, and end its training in order, which may delete that very checkpoint.

        Raises:
            KeyboardInterrupt: it was asked for.
        """
        if self.asked:
            raise KeyboardInterrupt


@contextmanager
def stop_on_request(progress: Progress) -> Iterator[Stop]:
    """While this lasts the first SIGINT or SIGTERM is a request; a second one interrupts at once. Only signals that would
    interrupt are: who ignores them, or has handlers of its own, keeps these.

    Raises:
        KeyboardInterrupt: it came to a stop, or the second one came, or the training ended before it could be stopped.
    """
    stop, process = Stop(), os.getpid()

    def ask(number: int, frame: Any) -> None:
        if os.getpid() != process:  # a loader's worker, which the step in flight still needs
            return
        if stop.asked:
            raise KeyboardInterrupt
        stop.asked = True
        progress.message("stopping after this step, with a checkpoint (once more: at once)")

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    # Other threads get no signals.
    ours = threading.current_thread() is threading.main_thread()
    caught = [n for n, handler in before.items() if ours and handler is signal.default_int_handler]
    try:
        for number in caught:
            signal.signal(number, ask)
        yield stop
    finally:
        for number in caught:
            signal.signal(number, before[number])
    if stop.asked:
        raise KeyboardInterrupt
