"""The reference paper's Tables 1-3 and Figures 1-3 in miniature: one cache, fifteen students, and which of its claims hold.

    python benchmarks/paper_mini.py --data ../shared/data/alpaca/train.jsonl.gz \\
        --teacher ../shared/models/alpaca-teacher --student ../shared/models/alpaca-student

Everything goes through ``kdcache teacher-cache`` and ``kdcache sweep`` of paper-mini/alpaca.yaml. Stopped at any time, the same
command goes on; finished rows are kept under ``--output``. Writes ``--page`` and, beside it, three figures. ``--quick`` trains
every row for two steps on 32 sequences: it shows that all of this works, and nothing else.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

RECIPE = HERE / "paper-mini" / "alpaca.yaml"
# As in any recipe, relative to the working directory.
SHARED = Path("../shared")
DEFAULTS = {
    "data": SHARED / "data" / "alpaca" / "train.jsonl.gz",
    "teacher": SHARED / "models" / "alpaca-teacher",
    "student": SHARED / "models" / "alpaca-student",
}
QUICK = (
    "data.train.split=train[:32]", "data.validation.split=train[32:48]", "training.max_steps=2", "training.batch_size=4",
    "cache.positions_per_shard=512", "sweep.rows.A6={training.max_length: 64}",
)  # fmt: skip
# Scored once more at the cache's full length, to stand beside the others.
SHORT = "A6"


def main(arguments: list[str] | None = None) -> None:
    """Make the cache, train the rows, write the page."""
    args = _arguments(arguments)
    warnings.simplefilter("ignore")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    overrides = [
        f"data.train.path={args.data}",
        f"data.validation.path={args.data}",
        f"teacher.model={args.teacher}",
        f"student.model={args.student}",
        f"cache.directory={args.output}/cache",
        f"output={args.output}/sweep",
        *(QUICK if args.quick else ()),
    ]
    clock = Clock(args.output / "paper-mini.json")
    with clock.of("teacher cache"):
        kdcache("teacher-cache", str(RECIPE), *overrides, "--if-incomplete")
    with clock.of("sweep"):
        done = kdcache("sweep", str(RECIPE), *overrides, "--jobs", str(args.jobs), check=False)
    # 1: a row failed, and is a row of the page. Anything else: what lies there, if anything, is another sweep.
    if done not in (0, 1):
        sys.exit(done)
    from paper_mini_page import load_results, page
    from paper_mini_plots import figures

    with clock.of("scoring"):
        full = at_full_length(args.output / "sweep" / SHORT, args.output / "full-length.json")
    results = load_results(args.output, full)
    if not results.of("A1"):
        sys.exit("row A1 is not finished: nothing to compare with; run the same command again")
    stem = args.page.with_suffix("")
    drawn = figures(results, stem)
    args.page.write_text(
        page(results, [p.name for p in drawn], seconds=clock.seconds, load=clock.load, jobs=args.jobs, quick=args.quick)
    )
    print(args.page.read_text())
    print("written: " + ", ".join(str(p) for p in (args.page, *drawn)))


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="Alpaca train file (.jsonl.gz)")
    parser.add_argument("--teacher", type=Path, help="teacher folder")
    parser.add_argument("--student", type=Path, help="student folder")
    parser.add_argument("--output", type=Path, default=Path("runs/paper-mini"), help="where cache and rows go")
    parser.add_argument("--page", type=Path, default=HERE / "paper-mini.md", help="the page; figures go beside it")
    parser.add_argument("--jobs", type=int, default=2, help="rows trained at the same time")
    parser.add_argument("--quick", action="store_true", help="two steps a row: a test of the machinery")
    args = parser.parse_args(arguments)
    lacking = []
    for name, default in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
        if not getattr(args, name).exists():
            lacking.append(f"--{name} (found nothing at {getattr(args, name)})")
    if lacking:
        parser.error(f"give {', '.join(lacking)}: Alpaca as .jsonl.gz, and two folders with causal language models")
    return args


def kdcache(*arguments: str, check: bool = True) -> int:
    """Run a command of kdcache; where it fails, so does this."""
    done = subprocess.run(
        [sys.executable, "-m", "kdcache", *arguments],
        # One thread a process: rows are what runs side by side.
        env={"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": _path()},
        check=False,
    )
    if check and done.returncode:
        sys.exit(done.returncode)
    return done.returncode


def _path() -> str:
    return os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))


class Clock:
    """Seconds of each part, over all sittings, and how busy the machine was in the longest of them."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._kept = json.loads(path.read_text()) if path.exists() else {"seconds": {}, "longest": 0.0, "load": None}
        self._part, self._started = "", 0.0

    @property
    def seconds(self) -> dict[str, float]:
        """Of each part."""
        found: dict[str, float] = self._kept["seconds"]
        return found

    @property
    def load(self) -> float:
        """Load average of the last fifteen minutes at the end of the longest part."""
        found: float = self._kept["load"]
        return found

    def of(self, part: str) -> Clock:
        """Count what follows as this part."""
        self._part = part
        return self

    def __enter__(self) -> None:
        self._started = time.monotonic()

    def __exit__(self, *exception: object) -> None:
        took = time.monotonic() - self._started
        self.seconds[self._part] = self.seconds.get(self._part, 0.0) + took
        if took > self._kept["longest"]:
            self._kept |= {"longest": took, "load": os.getloadavg()[2]}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps(self._kept))


def at_full_length(run: Path, kept: Path) -> dict[str, Any] | None:
    """A finished run's student on whole validation sequences, whatever length it was trained at; measured once."""
    from kdcache.cache.reader import open_cache
    from kdcache.evaluate.perplexity import student_score
    from kdcache.evaluate.saved_run import trained_recipe
    from kdcache.models import load_adapter
    from kdcache.run_record import load_record, record_digest
    from kdcache.student.assembly import load_student

    if not (run / "run.json").exists():
        return None
    digest = record_digest(run)
    known = json.loads(kept.read_text()) if kept.exists() else {}
    # Of this training, and not of an earlier one in the same place.
    if known.get("run_sha256") == digest:
        found: dict[str, Any] = known["score"]
        return found
    recipe, student = trained_recipe(load_record(run))
    model = load_adapter(load_student(student), str(run / "model"), quantized=True)
    validation = open_cache(recipe.cache.directory).split("validation")
    score = student_score(model, validation, batch_size=recipe.training.batch_size, precision=recipe.training.precision)
    kept.write_text(json.dumps({"run_sha256": digest, "score": score.as_record()}))
    return score.as_record()


if __name__ == "__main__":
    main()
