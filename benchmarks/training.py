"""The figures of the student's training, in one run and with their baselines beside them; no network, no GPU.

    python benchmarks/training.py --data DIR/alpaca/train.jsonl.gz --teacher DIR --student DIR --output training.md
    python benchmarks/training.py --only resume order mixing        # parts that need no models

Parts: steps (time and memory of cached KD beside SFT and live KD), wait (for data), resume (shard reads), order (the same
batches under any cut), mixing (of windows of shards), mixing-training (what it does to a student), padding.
Caches and models that are made on the way are kept in ``--work`` for the next call. One thread.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

# What is made here is made by one thread, as what is measured.
os.environ.setdefault("OMP_NUM_THREADS", "1")

PARTS = ("steps", "wait", "padding", "resume", "order", "mixing", "mixing-training")
OF_MODELS = ("steps", "wait", "padding")


def head() -> Iterator[str]:
    """Machine and versions."""
    from gpu_workers import machine

    found = machine()
    device = found["device"]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    load = ", ".join(f"{average:.1f}" for average in os.getloadavg())
    yield (
        f"{device['name']} {device.get('capability', '')}, {found['cpus']} cores (load averages at the start: {load}), one "
        f"thread; Python {found['python']}, {versions}."
    )


def parts(args: argparse.Namespace) -> dict[str, Callable[[], Iterator[str]]]:
    """What makes each part's lines."""
    from training_mixing import mixing_part, mixing_training_part
    from training_order import order_part
    from training_resume import resume_part
    from training_steps import WIDE, Subject, alpaca, of_scale, padding_part, steps_part, wait_part

    def subjects() -> Iterator[Subject]:
        if "alpaca" in args.subjects:
            yield alpaca(args.data, args.teacher, args.student, args.work, args.steps)
        if "wide" in args.subjects:
            made = of_scale("Qwen2.5-0.5B shape, V = 151,936, teacher of 1.5B shape", WIDE, args.work / "wide")
            yield replace(made, steps=args.wide_steps)

    def steps() -> Iterator[str]:
        for subject in subjects():
            yield from steps_part(subject)

    return {
        "steps": steps,
        "wait": lambda: wait_part(list(subjects())),
        "padding": lambda: padding_part(next(subjects())),
        "resume": resume_part,
        "order": lambda: order_part(args.cuts),
        "mixing": mixing_part,
        "mixing-training": lambda: mixing_training_part(args.embedded),
    }


def main(arguments: list[str] | None = None) -> None:
    """Print the tables as they come."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--subjects", nargs="+", choices=("alpaca", "wide"), default=("alpaca", "wide"))
    parser.add_argument("--data", help="Alpaca train file (.jsonl.gz)")
    parser.add_argument("--teacher", help="Alpaca teacher folder")
    parser.add_argument("--student", help="Alpaca student folder")
    parser.add_argument("--embedded", default="runs/embedded/models", help="embedded models, made if need be")
    parser.add_argument("--steps", type=int, default=40, help="steps of the Alpaca student")
    parser.add_argument("--wide-steps", type=int, default=6, help="steps of the student with the wide vocabulary")
    parser.add_argument("--cuts", type=int, default=50, help="cut points of the order")
    parser.add_argument("--work", type=Path, default=Path("runs/training"), help="models and caches stay here")
    parser.add_argument("--output", type=Path, help="Markdown file for the tables")
    args = parser.parse_args(arguments)
    if (
        set(args.only) & set(OF_MODELS)
        and "alpaca" in args.subjects
        and not (args.data and args.teacher and args.student)
    ):
        parser.error(f"{', '.join(OF_MODELS)} need --data, --teacher and --student (or --subjects wide)")
    warnings.simplefilter("ignore")
    from kdcache.models import quiet_libraries

    quiet_libraries()
    # Contenders stand in process groups of their own; ended from outside, they should not be left behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    written: list[str] = []

    def write(line: str) -> None:
        print(line, flush=True)
        written.append(line)
        if args.output:  # at once: a time limit may end this at any moment
            args.output.write_text("\n".join(written) + "\n")

    for line in head():
        write(line)
    made = parts(args)
    for part in args.only:
        for line in made[part]():
            write(line)


if __name__ == "__main__":
    main()
