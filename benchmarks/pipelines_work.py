"""What the parts of pipelines.py share: where they run, the commands that they run, and what they find."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RECIPES = HERE / "pipelines"
SEEDS = (0, 1, 2)
BEFORE, AFTER, TEACHER = "student before", "student after", "teacher"


@dataclass(frozen=True)
class Found:
    """What a part found: tables of text, whether the published effect shows, and why it says so."""

    shows: str
    because: str
    columns: list[str]
    rows: list[list[str]]
    more: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Part:
    """A pipeline: what was published, the recipe at published size, and what runs its miniature."""

    name: str
    title: str
    published: str
    recipe: str
    run: Callable[[Work], Found]


class Work:
    """Where the parts run, and the commands that they run."""

    def __init__(self, folder: Path, shared: Path | None) -> None:
        self.folder, self.shared = folder, shared
        folder.mkdir(parents=True, exist_ok=True)

    def kdcache(self, *arguments: str | Path, quiet: bool = False) -> str:
        """Run a command, shown as it works unless ``quiet``; where it fails, so does this. Returns what it printed."""
        command = [str(a) for a in arguments]
        print(f"$ kdcache {' '.join(command)}", flush=True)
        path = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))
        environment = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", **os.environ, "PYTHONPATH": path}
        process = subprocess.Popen(
            [sys.executable, "-m", "kdcache", *command],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        said = []
        assert process.stdout is not None
        for line in process.stdout:
            said.append(line)
            if not quiet:
                print(line, end="", flush=True)
        if process.wait():
            sys.exit(f"kdcache {' '.join(command[:3])} ended with {process.returncode}:\n{''.join(said[-20:])}")
        return "".join(said)

    def embedded(self) -> None:
        """The embedded data and models, made where they are not there."""
        self.kdcache("embedded", RECIPES / "base.yaml", quiet=True)

    def cache(self, recipe: Path, *overrides: str) -> None:
        """The recipe's cache, made where it is not complete."""
        self.kdcache("teacher-cache", recipe, *overrides, "--if-incomplete")

    def train(self, recipe: Path, output: Path, *overrides: str) -> dict[str, Any]:
        """A student, or the one that is there; returns its run.json."""
        self.kdcache("train-student", recipe, *overrides, f"output={output}", "--resume")
        return record(output)

    def evaluate(self, runs: Iterable[Path], *options: str) -> list[dict[str, Any]]:
        """Judge runs; returns their evaluation.json."""
        found = list(runs)
        self.kdcache("evaluate", *found, *options)
        return [json.loads((run / "evaluation.json").read_text()) for run in found]


def record(run: Path) -> dict[str, Any]:
    """run.json of a run directory."""
    values: dict[str, Any] = json.loads((run / "run.json").read_text())
    return values


def over_seeds(values: list[float], form: str = ".3f") -> str:
    """Mean, and in brackets least and most."""
    mean = sum(values) / len(values)
    if len(values) == 1:
        return format(mean, form)
    return f"{mean:{form}} ({min(values):{form}} to {max(values):{form}})"


def verdict(better: list[float], worse: list[float]) -> str:
    """Whether one is below the other at every seed, above at every seed, or neither."""
    apart = [a - b for a, b in zip(better, worse, strict=True)]
    if all(d < 0 for d in apart):
        return "shows"
    return "does not show" if all(d > 0 for d in apart) else "undecided"
