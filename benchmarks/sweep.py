"""Six students from one cache against six trainings with a live teacher, what a sweep costs beside its rows, and its scores.

    python benchmarks/sweep.py                                    # the embedded models, made if need be
    python benchmarks/sweep.py --data alpaca/train.jsonl.gz --teacher alpaca-teacher --student alpaca-student
    python benchmarks/sweep.py --proportions --skip-alone         # random weights, layers of the reference's shapes

``kdcache teacher-cache`` and ``kdcache sweep`` of six rows (T x learning rate), the same rows by ``kdcache train-student``, and by
a trainer with the 4-bit teacher in the loop, each a command of its own that loads its models, scores the student before and
after and saves it. Same steps, batches and length; one thread each, one after another. Wall clock, and processor time beside it,
which minds others on the machine less.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

TEMPERATURES = (1.0, 2.0)
RATES = (0.5, 1.0, 2.0)  # x the recipe's
# Layers of Qwen2.5-3B and 0.5B in their true shapes, a sixth of each model's. The vocabulary is the embedded one.
PROPORTIONS = {
    "teacher": {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 6, "num_attention_heads": 16},
    "student": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 4, "num_attention_heads": 14},
}
# As the reference trains: three epochs, activations recomputed, a validation split of a fifth of the train split. Few
# sequences, since only their time is of interest.
AS_REFERENCE = [
    "training.epochs=3", "training.gradient_checkpointing=true", "data.train.split=train[:64]",
    "data.validation.split=train[:13]",
]  # fmt: skip
SCORES = ("loss", "perplexity", "kl_to_teacher")


@dataclass(frozen=True)
class Took:
    """Seconds by the clock, and of processors."""

    wall: float
    processor: float

    def __add__(self, other: Took) -> Took:
        return Took(self.wall + other.wall, self.processor + other.processor)


def main(arguments: list[str] | None = None) -> None:
    """Run everything and print the tables."""
    if sys.argv[1:2] == ["live"] and arguments is None:
        return live(json.loads(sys.argv[2]))
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", help="Alpaca train file (.jsonl.gz)")
    parser.add_argument("--teacher", help="Alpaca teacher folder")
    parser.add_argument("--student", help="Alpaca student folder")
    parser.add_argument("--steps", type=int, default=-1, help="steps of every row; one epoch unless given")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/sweep-benchmark"), help="where everything goes, made anew"
    )
    parser.add_argument(
        "--proportions",
        action="store_true",
        help="embedded data, and a sixth of the layers of Qwen2.5-3B and 0.5B with random weights: for their time alone",
    )
    parser.add_argument("--skip-alone", action="store_true", help="leave out the same rows as commands of their own")
    parser.add_argument("overrides", nargs="*", metavar="KEY.PATH=VALUE", help="further recipe keys")
    args = parser.parse_args(arguments)
    if args.proportions and args.data:
        parser.error("--proportions makes its own models: leave out --data, --teacher and --student")
    if any((args.data, args.teacher, args.student)) and not all((args.data, args.teacher, args.student)):
        parser.error("give all of --data, --teacher and --student, or none for the embedded models")
    if args.work.exists():
        parser.error(f"{args.work} is there; remove it or give another --work: what is there would not be made again")
    for line in tables(args):
        print(line, flush=True)


def recipe_of(args: argparse.Namespace) -> tuple[Path, list[str]]:
    """The recipe file and what is changed of it; Alpaca with the default selection, embedded otherwise."""
    common = [f"cache.directory={args.work}/cache", "training.epochs=1", f"training.max_steps={args.steps}"]
    if args.proportions:
        common += [*AS_REFERENCE, *(f"{name}.model={args.work}/models/{name}" for name in PROPORTIONS)]
    common += args.overrides
    if args.data is None:
        return HERE.parent / "recipes" / "embedded.yaml", common
    return HERE / "alpaca.yaml", [
        f"data.train.path={args.data}", f"data.validation.path={args.data}", f"teacher.model={args.teacher}",
        f"student.model={args.student}", "selection={method: threshold_sampling}", "cache.positions_per_shard=16384",
        "training.learning_rate=2e-3", *common,
    ]  # fmt: skip


def tables(args: argparse.Namespace) -> Iterator[str]:
    """Everything that is printed, as it is measured."""
    from gpu_workers import machine

    from kdcache.recipe import load_recipe

    warnings.simplefilter("ignore")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    file, common = recipe_of(args)
    recipe = load_recipe(file, common)
    rates = [recipe.training.learning_rate * factor for factor in RATES]
    grid = {"loss.temperature": list(TEMPERATURES), "training.learning_rate": rates}
    if recipe.embedded is not None:
        kdcache("embedded", str(file), *common)
    if args.proportions:
        make_models(args.work / "models", Path(recipe.embedded.directory))
    found = machine()
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    load = ", ".join(f"{average:.1f}" for average in os.getloadavg())
    yield (
        f"{found['device']['name']} {found['device'].get('capability', '')}, {found['cpus']} cores (load averages at the start: {load}); "
        f"Python {found['python']}, {versions}."
    )
    teacher = kdcache("teacher-cache", str(file), *common)
    sweep = kdcache(
        "sweep", str(file), *common, f"output={args.work}/sweep", f"sweep.grid={json.dumps(grid)}", "--jobs", "1"
    )
    swept = json.loads((args.work / "sweep" / "sweep.json").read_text())
    rows = [Row(args.work / "sweep" / row["directory"], row) for row in swept["rows"]]
    broken = [row.values["name"] for row in rows if row.values["state"] != "finished"]
    if broken:
        sys.exit(f"rows that did not finish: {', '.join(broken)}")
    alone, live_runs = Took(0, 0), Took(0, 0)
    equal = 0
    # In turns, so that what else the machine does meets both.
    for number, row in enumerate(rows):
        keys = [f"{key}={value}" for key, value in row.values["changes"].items()]
        if not args.skip_alone:
            output = args.work / "alone" / str(number)
            alone += kdcache("train-student", str(file), *common, *keys, f"output={output}")
            equal += same_student(output, row.path)
        values = load_recipe(file, [*common, *keys, f"output={args.work}/live"]).model_dump(mode="json")
        live_runs += took([sys.executable, str(Path(__file__).resolve()), "live", json.dumps(values)])
    steps = json.loads((rows[0].path / "run.json").read_text())["steps"]
    yield from times(len(rows), steps, teacher, sweep, alone, live_runs)
    yield from overhead(rows, swept, sweep, alone, equal)
    yield from scores(rows)


def make_models(folder: Path, tokenizers: Path) -> None:
    """Models of `PROPORTIONS` with random weights, and the embedded tokenizer."""
    import transformers

    for name, shape in PROPORTIONS.items():
        tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizers / name)
        transformers.set_seed(0)
        config = transformers.Qwen2Config(
            vocab_size=len(tokenizer), num_key_value_heads=2, tie_word_embeddings=True, pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id, bos_token_id=None, max_position_embeddings=512, dtype="bfloat16", **shape,
        )  # fmt: skip
        transformers.Qwen2ForCausalLM(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


@dataclass(frozen=True)
class Row:
    """A row of the sweep: its run directory, and what sweep.json says of it."""

    path: Path
    values: dict[str, Any]


def times(count: int, steps: int, teacher: Took, sweep: Took, alone: Took, live_runs: Took) -> Iterator[str]:
    """One cache and a sweep against as many live teachers."""
    yield f"\n{count} students of {steps} steps\n\n| | wall s | processor s | x live |\n|---|---:|---:|---:|"
    lines = {
        "the teacher's pass that makes the cache": teacher,
        f"kdcache sweep of {count} rows, one at a time": sweep,
        "**both: one cache and its students**": teacher + sweep,
        f"{count} x kdcache train-student from that cache": alone,
        f"{count} trainings with a live 4-bit teacher": live_runs,
    }
    lines = {name: own for name, own in lines.items() if own.wall}
    for name, own in lines.items():
        yield f"| {name} | {own.wall:,.0f} | {own.processor:,.0f} | {own.wall / live_runs.wall:.2f} |"
    ratio, busy = (teacher + sweep).wall / live_runs.wall, (teacher + sweep).processor / live_runs.processor
    yield f"\nTotal time against live: {ratio:.2f} (processor time {busy:.2f}); target 0.5: {_met(ratio <= 0.5)}."


def overhead(rows: list[Row], swept: dict[str, Any], sweep: Took, alone: Took, equal: int) -> Iterator[str]:
    """What the sweep takes beside its rows."""
    inside = sum(row.values["seconds"] for row in rows)
    beside = swept["seconds"] / inside - 1
    yield f"\nSweep: {swept['seconds']:.1f} s, its rows {inside:.1f} s: {beside:+.1%} beside them (its start, mostly)."
    if alone.wall:
        saved, busy = sweep.wall / alone.wall - 1, sweep.processor / alone.processor - 1
        yield (
            f"\nAgainst the same rows as commands of their own: {saved:+.1%} (processor time {busy:+.1%}); target +3 %: "
            f"{_met(saved <= 0.03)}. Students equal byte for byte to those trained alone: {equal} of {len(rows)}."
        )


def scores(rows: list[Row]) -> Iterator[str]:
    """The sweep's scores against a fresh `kdcache evaluate`."""
    kdcache("evaluate", *(str(row.path) for row in rows))
    largest = 0.0
    for row in rows:
        before = json.loads((row.path / "run.json").read_text())["scores"]
        after = json.loads((row.path / "evaluation.json").read_text())["scores"]
        largest = max(largest, *(abs(before[m][k] - after[m][k]) for m in before for k in SCORES))
    yield (
        f"\nScores of {len(rows)} rows and a fresh `kdcache evaluate`: at most {largest:.1e} apart; target 1e-6: {_met(largest <= 1e-6)}."
    )


def same_student(one: Path, other: Path) -> bool:
    """Whether two runs saved the same adapter."""
    name = "model/adapter_model.safetensors"
    return (one / name).read_bytes() == (other / name).read_bytes()


def kdcache(*arguments: str) -> Took:
    """A command of kdcache, and what it took."""
    return took([sys.executable, "-m", "kdcache", *arguments])


def took(command: list[str]) -> Took:
    """Run a command, its output only shown where it fails."""
    path = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    busy, started = _children(), time.monotonic()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    wall = time.monotonic() - started
    if done.returncode:
        sys.exit(
            f"{' '.join(command[:5])} ... ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
        )
    return Took(wall, _children() - busy)


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _met(good: bool) -> str:
    return "met" if good else "**missed**"


def live(values: dict[str, Any]) -> None:
    """One command's worth of training with the teacher in the loop: load both, score, train, score, save."""
    import torch
    import transformers
    from training_workers import LIVE, trainer_class

    from kdcache.cache.reader import open_cache
    from kdcache.evaluate.perplexity import student_score
    from kdcache.models import quiet_libraries
    from kdcache.recipe import parse_recipe
    from kdcache.student.arguments import training_arguments
    from kdcache.student.assembly import load_student, with_adapter

    warnings.simplefilter("ignore")
    quiet_libraries()
    torch.set_num_threads(1)
    recipe = parse_recipe(values)
    training, student = recipe.training.model_copy(update={"workers": 0}), recipe.student
    assert student is not None
    transformers.set_seed(recipe.seed)
    # Its token ids alone are trained on; the validation split scores the student as everyone's is scored.
    cache = open_cache(recipe.cache.directory)
    made = trainer_class(LIVE, recipe, cache)
    model = with_adapter(load_student(student), student)

    def score() -> None:
        student_score(
            model, cache.split("validation"), batch_size=training.batch_size, max_length=training.max_length,
            precision=training.precision,
        )  # fmt: skip

    score()
    with tempfile.TemporaryDirectory() as folder:
        arguments = training_arguments(training, device=student.device, seed=recipe.seed, checkpoints=Path(folder))
        arguments.train_sampling_strategy = "sequential"
        trainer = made(model=model, args=arguments)
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    score()
    model.save_pretrained(recipe.output)


if __name__ == "__main__":
    main()
