"""Ctrl-C, or SIGTERM, as a request: the step in flight is ended, a checkpoint written, and the training stops there."""

from __future__ import annotations

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
        """Only now: a checkpoint that says stop would be taken for that of a finished training."""
        if self.asked:
            control.should_training_stop = True


@contextmanager
def stop_on_request(progress: Progress) -> Iterator[Stop]:
    """While this lasts the first SIGINT or SIGTERM is a request; a second one interrupts at once.

    Raises:
        KeyboardInterrupt: the second one came.
    """
    stop = Stop()

    def ask(number: int, frame: Any) -> None:
        if stop.asked:
            raise KeyboardInterrupt
        stop.asked = True
        progress.message("stopping after this step, with a checkpoint (once more: at once)")

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    # A shell that starts a command in the background has it ignore SIGINT, and so do we; other threads get no signals.
    ours = threading.current_thread() is threading.main_thread()
    caught = [n for n, handler in before.items() if ours and handler not in (signal.SIG_IGN, None)]
    try:
        for number in caught:
            signal.signal(number, ask)
        yield stop
    finally:
        for number in caught:
            signal.signal(number, before[number])
