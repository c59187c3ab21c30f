"""The figures that need a GPU, in one run and with their baselines beside them; no network, no download.

    python benchmarks/gpu.py --output gpu.md                 # everything: about a quarter of an hour, 8 GiB of disk
    python benchmarks/gpu.py --only teacher steps            # some parts: teacher, steps, capacity, loss
    python benchmarks/gpu.py --tiny --device cpu             # the same code at toy size; the figures mean nothing

Models of the shapes of Qwen2.5-3B-Instruct (teacher, NF4) and Qwen2.5-0.5B-Instruct (student, QLoRA) with random weights:
speed and memory are real, quality is not looked at. Every measurement is a process of its own (`gpu_workers.py`); rounds
go through the contenders in turn. Models and cache are kept in ``--work`` for the next call.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PARTS = ("teacher", "steps", "capacity", "loss")
# Nobody trains with more at this length; the search stops here.
LARGEST_BATCH = 256


class WorkerError(Exception):
    """A measurement failed."""


class Workers:
    """Asks for measurements.

    Args:
        work: directory of models and cache.
        device: cuda or cpu.
        tiny: toy shapes.
    """

    def __init__(self, work: Path, device: str, *, tiny: bool) -> None:
        self.tiny = tiny
        self._bench = {"work": str(work), "device": device, "tiny": tiny}

    def __call__(self, measure: str, **arguments: Any) -> Any:
        """What `gpu_workers.measure` returns."""
        bench = {} if measure in ("machine", "loss") else self._bench
        return in_own_process({"measure": measure, **bench, **arguments})


def in_own_process(request: dict[str, Any]) -> Any:
    """One measurement, with a device that nothing else has touched; kdcache is this checkout's."""
    path = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))
    ran = subprocess.run(
        [sys.executable, str(HERE / "gpu_workers.py"), json.dumps(request)],
        env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if ran.returncode:
        raise WorkerError(f"{request} ended with {ran.returncode}:\n{ran.stderr[-4000:]}")
    return json.loads(ran.stdout.splitlines()[-1])


def scale_of(workers: Workers) -> Any:
    """The shapes that are measured."""
    from gpu_workers import FULL, TINY

    return TINY if workers.tiny else FULL


def head(workers: Workers) -> Iterator[str]:
    """Machine and versions."""
    found = workers("machine")
    device = found["device"]
    memory = f", {device['memory_bytes'] / 2**30:.0f} GiB" if "memory_bytes" in device else ""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    yield f"{device['name']}{memory}, {found['cpus']} cores; Python {found['python']}, CUDA {found['cuda']}, {versions}."
    if workers.tiny:
        yield "\n**Toy shapes, to see that the script runs: these figures mean nothing.**"


def teacher_table(workers: Workers, args: argparse.Namespace) -> Iterator[str]:
    """The teacher pass beside a bare forward pass."""
    made, rates = workers("prepare"), workers("teacher", rounds=args.rounds + 2)
    yield f"\n### Teacher pass, NF4, bfloat16, length {scale_of(workers).length}, {rates['positions']:,} positions\n"
    yield "| | positions/s | x bare |\n|---|---:|---:|"
    lines = {
        "decoder alone": rates["decoder"],
        "bare forward: decoder and head": rates["bare"],
        "teacher pass: with selection": rates["pass"],
        "encoding alone, one thread of the CPU": rates["encode"],
        "`teacher-cache`: pass, encoding and writing side by side": made["positions"] / made["seconds"],
    }
    for name, rate in lines.items():
        yield f"| {name} | {rate:,.0f} | {rate / rates['bare']:.3f} |"
    yield f"\n{made['bytes']:.1f} bytes per position on disk."


def steps_table(workers: Workers, args: argparse.Namespace) -> Iterator[str]:
    """Step time and peak memory of the contenders, each in every round."""
    from gpu_workers import CONTENDERS, SFT

    workers("prepare")
    scale = scale_of(workers)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
    for _ in range(args.rounds):
        for name in CONTENDERS:
            runs[name].append(workers("steps", contender=name))
    yield f"\n### QLoRA step, micro-batch {scale.batch}, length {scale.length}, gradient checkpointing, paged 8-bit AdamW\n"
    yield f"Median of {scale.steps} steps from end to end, data loading included; {args.rounds} rounds in turn.\n"
    yield "| step | ms | x SFT, round by round | peak GiB | x SFT |\n|---|---:|---:|---:|---:|"
    for name in CONTENDERS:
        if any("out_of_memory" in run for run in runs[name]):
            yield f"| {name} | out of memory | | | |"
            continue
        seconds, peak = [r["seconds"] for r in runs[name]], max(r["peak"] for r in runs[name])
        ratios = ["", ""]
        if all("seconds" in base for base in runs[SFT]):
            paired = [s / base["seconds"] for s, base in zip(seconds, runs[SFT], strict=True)]
            ratios = [f"{statistics.median(paired):.3f}", f"{peak / max(r['peak'] for r in runs[SFT]):.3f}"]
        yield f"| {name} | {1000 * statistics.median(seconds):.1f} | {ratios[0]} | {peak:.2f} | {ratios[1]} |"
    yield (
        "\nMemory is what torch allocates at the peak, weights included. SFT and the live teacher are transformers' own "
        "Trainer on full logits; cached KD never holds those at once."
    )


def capacity_table(workers: Workers, args: argparse.Namespace) -> Iterator[str]:
    """The largest micro-batch that fits into small cards."""
    from gpu_workers import CONTENDERS

    workers("prepare")
    limit = 4 if workers.tiny else LARGEST_BATCH
    yield f"\n### Largest micro-batch, length {scale_of(workers).length}, gradient checkpointing\n"
    yield "| | " + " | ".join(f"{cap:g} GiB" for cap in args.caps) + " |\n|---|" + "---:|" * len(args.caps)
    for name in CONTENDERS:
        cells = []
        for cap in args.caps:
            found = workers("capacity", contender=name, cap=cap, limit=limit)
            batch = found.get("batch")
            cells.append(
                "larger than this device" if batch is None else f"{batch} or more" if batch == limit else f"{batch}"
            )
        yield f"| {name} | " + " | ".join(cells) + " |"
    yield (
        "\nMemory is capped by `torch.cuda.set_per_process_memory_fraction`, the CUDA context taken off; 0: not even one "
        "sequence. Above 16 to within a sixteenth. Models were loaded before the cap held."
    )


def loss_table(workers: Workers, args: argparse.Namespace) -> Iterator[str]:
    """Head and loss alone, beside Liger's fused linear cross-entropy."""
    yield "\n### Head and loss alone, bfloat16, frozen head, V = 151,936, D = 896\n"
    yield workers("loss", rounds=args.rounds + 2)["text"]


TABLES: dict[str, Callable[[Workers, argparse.Namespace], Iterator[str]]] = {
    "teacher": teacher_table, "steps": steps_table, "capacity": capacity_table, "loss": loss_table,
}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Print the tables as they come; 1 where a measurement failed, 2 where there is nothing to measure on."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="toy shapes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--caps", nargs="+", type=float, default=[6.0, 8.0, 12.0, 16.0], metavar="GIB")
    parser.add_argument("--work", type=Path, default=HERE.parent / "runs" / "gpu", help="models and cache stay here")
    parser.add_argument("--output", type=Path, help="Markdown file for the tables")
    args = parser.parse_args(arguments)
    if args.device == "cpu" and not args.tiny:
        parser.error("models of true shape are for a GPU; on the CPU add --tiny")
    workers = Workers(args.work / ("tiny" if args.tiny else "full"), args.device, tiny=args.tiny)
    if args.device == "cuda" and "memory_bytes" not in workers("machine")["device"]:
        print("no CUDA device: nothing is measured; --tiny --device cpu tries the script itself", file=sys.stderr)
        return 2
    written: list[str] = []
    failures = 0

    def write(line: str) -> None:
        print(line, flush=True)
        written.append(line)
        if args.output:  # at once: a time limit may end this at any moment
            args.output.write_text("\n".join(written) + "\n")

    for line in head(workers):
        write(line)
    for part in args.only:
        try:
            for line in TABLES[part](workers, args):
                write(line)
        except WorkerError as exc:
            failures += 1
            write(f"\n{part}: not measured, see the error output")
            print(exc, file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
