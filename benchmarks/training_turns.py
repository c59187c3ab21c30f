"""Contenders of `training.py` as processes that take their training steps in turn."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
# Steps of every contender that do not count.
WARMUP = 2


class ContenderError(Exception):
    """A contender's process ended early."""


class Contender:
    """A training in a process group of its own, which goes step by step and stands still in between.

    Its group is stopped between its turns, so that its data loader works in no one else's time.

    Args:
        request: as `training_workers.train` takes it.
    """

    def __init__(self, request: dict[str, Any]) -> None:
        path = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))
        quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the process
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "training_workers.py"), json.dumps(request)],
            env={**os.environ, **quiet, "PYTHONPATH": path},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True, start_new_session=True,
        )  # fmt: skip
        try:
            self.loaded = float(self.answer()["loaded"])
        except ContenderError:
            self.close()
            raise

    def __enter__(self) -> Contender:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End it, wherever it stands."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for file in (self._process.stdin, self._process.stdout, self._errors):
            assert file is not None
            file.close()

    def go(self, turns: int = 1) -> None:
        """Allow so many further steps."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n" * turns)
        self._process.stdin.flush()

    def answer(self) -> dict[str, float]:
        """What the step took; waits for its end.

        Raises:
            ContenderError: the process ended instead.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            raise ContenderError(f"a contender ended with {self._process.wait()}:\n{self._errors.read()[-4000:]}")
        found: dict[str, float] = json.loads(line)
        return found

    def stand(self) -> None:
        """Stop the whole group."""
        os.killpg(self._process.pid, signal.SIGSTOP)

    def move(self) -> None:
        """Let it run again."""
        os.killpg(self._process.pid, signal.SIGCONT)


@dataclass(frozen=True)
class Measured:
    """Every step of one contender after the warm-up, and MiB: of the loaded process, at its peak, and of its workers."""

    seconds: list[float]
    waited: list[float]
    targets: list[int]
    loaded: float
    peak: float
    workers: float


def in_turns(requests: dict[str, dict[str, Any]], steps: int) -> dict[str, Measured]:
    """Step by step in rotating order, each standing still while another moves; one alone is never stopped."""
    answers: dict[str, list[dict[str, float]]] = {name: [] for name in requests}
    with ExitStack() as stack:
        running: dict[str, Contender] = {}
        for name, request in requests.items():
            running[name] = stack.enter_context(Contender({**request, "steps": steps + WARMUP}))
            if len(requests) > 1:
                running[name].stand()
        if len(requests) == 1:
            [(name, contender)] = running.items()
            contender.go(steps + WARMUP)
            answers[name] = [contender.answer() for _ in range(steps + WARMUP)]
        else:
            names = list(running)
            for step in range(steps + WARMUP):
                turn = step % len(names)
                for name in names[turn:] + names[:turn]:
                    running[name].move()
                    running[name].go()
                    answers[name].append(running[name].answer())
                    running[name].stand()
        loaded = {name: contender.loaded for name, contender in running.items()}
    return {
        name: Measured(
            [a["seconds"] for a in own[WARMUP:]], [a["waited"] for a in own[WARMUP:]], [int(a["targets"]) for a in own],
            loaded[name], own[-1]["peak"], own[-1]["workers"],
        )
        for name, own in answers.items()
    }  # fmt: skip
