"""Fidelity per byte: what a position's bytes buy, measured on logits and on trained students.

    python benchmarks/fidelity.py --data DIR/alpaca/train.jsonl.gz --teacher DIR --student DIR [--jobs 2] [--only bytes]

Five tables and three plots, into --output; figures that are there already are kept, so a stopped run goes on.

- bytes: selections and codecs, bytes per position by part and one-step gradient error, on the teacher's own logits and on
  synthetic ones over 151,936 tokens; the naive layout (half-precision logits and 32-bit ids) beside them, raw and zstd-3.
- training: held-out KL to the full teacher after training every weight with KD alone, at equal bytes, against live
  full-vocabulary KD (the teacher's whole distributions in half precision, relative to the largest logit).
- labels: the same with the reference loss, half of it the labels'.
- copy: the teacher's own 4-bit copy taught by its cache, a student that is nearly its teacher.
- seeds: perplexity with the reference loss (1/2 and 1/2) and LoRA, several seeds, beside full-vocabulary KD and CE alone.
"""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard
from fidelity_training import (
    BOTH,
    BUDGETS,
    EPOCHS,
    LEARNING_RATE,
    PLAIN,
    SPLITS,
    TEMPERATURES,
    Dense,
    read_back,
    read_dense,
    run_all,
    tuned,
    write_dense,
)
from synthetic import VOCABULARY, synthetic_logits

from kdcache.cache.rows import concatenate
from kdcache.data.tokens import TokenRow
from kdcache.evaluate.fidelity import FidelityMeter
from kdcache.head import Head
from kdcache.models import head_of, load_model
from kdcache.student.record import hardware
from kdcache.teacher.select import Selection

# How each row of the training tables is called: kind -> a mark in the plots.
MARKS = {
    "sampling": "o",
    PLAIN: ".",
    "sampling, one T": "s",
    "threshold": "^",
    "top-k": "v",
    "RS-KD": "x",
    BOTH: "+",
    "top-k, renormalised": "D",
}


def bytes_tables(args: argparse.Namespace) -> None:
    """Bytes and one-step errors, on real and on synthetic logits."""
    sample = read_dense(args.output, "train").every(40)
    student = load_model(args.student, quantization="none", dtype="float32", device="cpu")
    with torch.inference_mode():
        hidden = torch.cat([
            student.get_decoder()(input_ids=torch.from_numpy(r.ids.astype(np.int64))[None])
            .last_hidden_state[0, :-1][torch.from_numpy(r.targets[1:])]
            for r in sample.rows
        ])  # fmt: skip
    bytes_table("Alpaca teacher, V 8,192", sample, Head(*head_of(student)), hidden)
    count, length = 16, 64
    generator = np.random.default_rng(0)
    ids = np.minimum(VOCABULARY ** generator.random((count, length + 1)), VOCABULARY - 1).astype(np.uint32)
    rows = [TokenRow(i, ids[i], np.arange(length + 1) > 0) for i in range(count)]
    logits = torch.cat([synthetic_logits(length, seed=s) for s in range(count)])
    logits -= logits.amax(dim=1, keepdim=True)
    bytes_table("synthetic, V 151,936", Dense(rows, logits.half().numpy()), None, None)


@torch.inference_mode()
def bytes_table(title: str, data: Dense, head: Head | None, hidden: torch.Tensor | None) -> None:
    """One Markdown table."""
    positions = int(data.starts[-1])
    print(f"\n### {title}: {positions:,} positions\n")
    print(
        "| setting | bytes | entries | T | kept mass | KL | TV | gradient error |\n|---|---:|---:|---:|---:|---:|---:|---:|"
    )
    for k in (16, 32, 64, 128):
        top = torch.topk(data.part(0, positions), k, dim=1)
        raw = top.values.half().numpy().tobytes() + top.indices.to(torch.int32).numpy().tobytes()
        packed = len(zstandard.ZstdCompressor(level=3).compress(raw)) / positions
        print(f"| naive top-{k}, half + int32: {len(raw) / positions:.0f} raw, zstd-3 | {packed:.1f} | {k} | | | | | |")
    tuning = data.every(3)
    chosen: dict[str, tuple[Selection, Any]] = {}
    for budget in BUDGETS:
        for kind in ("sampling", "threshold", "top-k"):
            chosen[f"{kind}, {budget} B"] = (tuned(kind, 1.0, budget, tuning), "quantised")
        for t in TEMPERATURES:
            for kind in ("sampling, one T", "RS-KD"):
                chosen[f"{kind} = {t:g}, {budget} B"] = (tuned(kind, t, budget, tuning), "quantised")
    for values in ("quantised", "half"):
        chosen[f"top-k 64, {values}"] = (Selection("top_k", TEMPERATURES, k=64), values)
    meter, stored, sizes = FidelityMeter(TEMPERATURES, head), {}, {}
    for name, (selection, values) in chosen.items():
        parts, sizes[name] = read_back(data, selection, values)
        stored[name] = concatenate(parts)
    chunk = max(1, (64 << 20) // (4 * data.logits.shape[1]))
    for start in range(0, positions, chunk):
        stop = min(start + chunk, positions)
        settings = {name: rows.slice(start, stop) for name, rows in stored.items()}
        meter.add(data.part(start, stop), settings, None if hidden is None else hidden[start:stop])
    for name, rows in stored.items():
        for f in meter.results(name):
            error = "" if f.gradient_error is None else f"{f.gradient_error:.3f}"
            print(
                f"| {name} | {sizes[name]:.1f} | {rows.entries / positions:.1f} | {f.temperature:g} | {f.kept_mass:.3f} "
                f"| {f.kl:.3f} | {f.total_variation:.3f} | {error} |"
            )


def training_table(results: list[dict[str, Any]]) -> None:
    """Held-out KL at the training temperature, and how much more that is than full-vocabulary KD gives."""
    full = {r["temperature"]: r["kl_t"] for r in results if r["kind"] == "full"}
    print(
        "\n| T | target | "
        + " | ".join(f"{b} B" for b in BUDGETS[:-1])
        + " | other |\n|---:|---|"
        + "---:|" * len(BUDGETS)
    )
    for t in TEMPERATURES:
        print(f"| {t:g} | full vocabulary |" + " |" * len(BUDGETS[:-1]) + f" {full[t]:.4f} |")
        for kind in MARKS:
            cells, other = [], ""
            own = [r for r in results if r["temperature"] == t and r["kind"] == kind]
            if not own:
                continue
            for budget in BUDGETS[:-1]:
                found = [r for r in own if r.get("budget") == budget]
                cells.append(f"{found[0]['kl_t']:.4f} ({found[0]['kl_t'] / full[t] - 1:+.1%})" if found else "")
            for r in own:
                if "k" in r:
                    other = f"k {r['k']}, {r['bytes']:.0f} B: {r['kl_t']:.4f} ({r['kl_t'] / full[t] - 1:+.1%})"
            print(f"| {t:g} | {kind} | {' | '.join(cells)} | {other} |")


def copy_table(results: list[dict[str, Any]]) -> None:
    """Held-out KL of the 4-bit copy, and how much more of it is left than full-vocabulary KD leaves."""
    print("\n| T | target | bytes | held-out KL | against full |\n|---:|---|---:|---:|---:|")
    for t in TEMPERATURES:
        own = [r for r in results if r["temperature"] == t]
        full = next(r["kl_t"] for r in own if r["kind"] == "full")
        for r in sorted(own, key=lambda r: -r["kl_t"]):
            size = f"{r['bytes']:.0f}" if r["bytes"] else ""
            print(f"| {t:g} | {r['kind']} | {size} | {r['kl_t']:.6f} | {r['kl_t'] / full - 1:+.1%} |")


def seeds_table(results: list[dict[str, Any]]) -> None:
    """Perplexity over seeds, each against full-vocabulary KD with the same seed."""
    full = {(r["temperature"], r["seed"]): r["perplexity"] for r in results if r["kind"] == "full"}
    print("\n| T | target | bytes | perplexity, mean (range) | against full, mean (range) |\n|---:|---|---:|---:|---:|")
    groups = sorted({(r["temperature"], r["kind"]) for r in results})
    for t, kind in groups:
        own = [r for r in results if (r["temperature"], r["kind"]) == (t, kind)]
        found = [r["perplexity"] for r in own]
        gaps = [r["perplexity"] / full[t, r["seed"]] - 1 for r in own]
        print(
            f"| {t:g} | {kind} | {own[0]['bytes']:.0f} | {np.mean(found):.3f} ({min(found):.3f} to {max(found):.3f}) "
            f"| {np.mean(gaps):+.2%} ({min(gaps):+.2%} to {max(gaps):+.2%}) |"
        )


def plot(results: list[dict[str, Any]], path: Path, key: str, label: str) -> None:
    """Bytes against the gap to full-vocabulary KD, a panel per temperature."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 5), layout="constrained")
    for axis, t in zip(axes, TEMPERATURES, strict=True):
        full = {r["seed"]: r[key] for r in results if r["kind"] == "full" and r["temperature"] == t}
        for kind, mark in MARKS.items():
            own = sorted(
                (r["bytes"], 100 * (r[key] / full[r["seed"]] - 1))
                for r in results
                if r["kind"] == kind and r["temperature"] == t
            )
            if own:
                axis.plot(
                    *zip(*own, strict=True),
                    marker=mark,
                    label=kind,
                    linestyle="-" if len({round(b) for b, _ in own}) > 1 else "",
                )
        axis.axhline(0, color="black", linewidth=1)
        axis.set_yscale("symlog", linthresh=0.1)
        axis.margins(y=0.15)
        axis.set(xscale="log", title=f"T = {t:g}", xlabel="bytes per position")
        axis.set_xticks(list(BUDGETS), [str(b) for b in BUDGETS])
        axis.minorticks_off()
        axis.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel(label)
    figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main() -> None:
    """Print the tables, draw the plots."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="Alpaca train file (.jsonl.gz)")
    parser.add_argument("--teacher", required=True, help="teacher folder")
    parser.add_argument("--student", required=True, help="student folder")
    parser.add_argument("--output", type=Path, default=Path("runs/fidelity-benchmark"))
    parser.add_argument("--only", choices=("bytes", "training", "labels", "copy", "seeds"), help="one part")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="students trained at the same time, one thread each")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    args.output.mkdir(parents=True, exist_ok=True)
    if not all((args.output / f"{name}.npy").exists() for name in SPLITS):
        write_dense(args)
    print(
        f"{hardware()['device']}, torch {torch.__version__}; {EPOCHS} epoch, AdamW, lr {LEARNING_RATE:g}, linear decay"
    )
    if args.only in (None, "bytes"):
        bytes_tables(args)
    for part in ("training", "labels"):
        if args.only in (None, part):
            results = run_all(args, part)
            training_table(results)
            plot(results, args.output / f"{part}.png", "kl_t", "held-out KL against full-vocabulary KD, %")
    if args.only in (None, "copy"):
        copy_table(run_all(args, "copy"))
    if args.only in (None, "seeds"):
        results = run_all(args, "seeds")
        seeds_table(results)
        plot(results, args.output / "seeds.png", "perplexity", "perplexity against full-vocabulary KD, %")
    (args.output / "machine.json").write_text(json.dumps(hardware()))


if __name__ == "__main__":
    main()
