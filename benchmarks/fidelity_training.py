"""Students trained on selections at equal bytes, on dense logits held on disk; `fidelity.py` runs it and shows the tables."""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdcache.cache.codec import CachedSequence, decode, encode
from kdcache.cache.numbers import Values
from kdcache.cache.rows import SparseRows, concatenate
from kdcache.cache.shard import pack
from kdcache.data.tokens import TokenRow
from kdcache.models import attach_lora, head_of, load_model
from kdcache.progress import Silent
from kdcache.recipe import parse_recipe
from kdcache.student.collate import IGNORED, Collator
from kdcache.student.forward import loss_sums
from kdcache.teacher.capture import load_teacher
from kdcache.teacher.draws import uniforms
from kdcache.teacher.planning import plan_cache
from kdcache.teacher.sample import shard_content
from kdcache.teacher.select import Selection, select

BUDGETS = (24, 42, 64, 96, 192, 384)
TEMPERATURES = (1.0, 2.0)
SPLITS = ("train", "validation")
DIGEST = "00" * 32
SHARD_SEQUENCES = 400
BATCH, EPOCHS, LEARNING_RATE, CLIP = 16, 1, 2e-3, 0.5
PLAIN = "sampling, no control variate"
# A rival that draws at one temperature, drawn at each: what serves both from one cache, as the default does.
BOTH = "RS-KD, both T"


@dataclass(frozen=True)
class Part:
    """What the students of one part have in common.

    Attributes:
        ce_weight: of the labels; the teacher has the rest.
        lora: adapters alone are trained, not every weight.
        copy: the student is the teacher's own 4-bit copy.
        every, tuned_on: trained on every so manieth sequence, its selections tuned on every so manieth of these.
    """

    ce_weight: float
    lora: bool
    copy: bool = False
    learning_rate: float = LEARNING_RATE
    every: int = 1
    tuned_on: int = 37


PARTS = {
    "training": Part(ce_weight=0.0, lora=False),
    "labels": Part(ce_weight=0.5, lora=False),
    # At the reference's learning rate, and few: this student is six times as large.
    "copy": Part(ce_weight=0.0, lora=True, copy=True, learning_rate=2e-4, every=6, tuned_on=7),
    "seeds": Part(ce_weight=0.5, lora=True),
}


# What is trained at every budget.
KINDS = {
    "training": ("sampling", PLAIN, "sampling, one T", "threshold", "top-k", "RS-KD", BOTH),
    "labels": ("sampling", "top-k", "RS-KD", BOTH),
}


@dataclass(frozen=True)
class Dense:
    """One split: token rows, and the teacher's logits below the largest, float16 ``[positions, V]`` on disk."""

    rows: list[TokenRow]
    logits: np.ndarray[Any, np.dtype[np.float16]]

    def part(self, start: int, stop: int) -> torch.Tensor:
        """float32 logits of some positions."""
        return torch.from_numpy(self.logits[start:stop].astype(np.float32))

    def every(self, step: int) -> Dense:
        """Every so manieth sequence."""
        starts, rows = self.starts, self.rows[::step]
        parts = [self.logits[starts[r.index] : starts[r.index + 1]] for r in rows]
        return Dense([replace(r, index=i) for i, r in enumerate(rows)], np.concatenate(parts))

    @cached_property
    def starts(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """First position of each sequence."""
        return np.concatenate(([0], np.cumsum([r.positions for r in self.rows])))


def write_dense(args: argparse.Namespace) -> None:
    """Run the teacher once over both splits."""
    recipe = parse_recipe({
        "output": "none",
        "cache": {"directory": "none"},
        "data": {
            "train": {"path": args.data, "split": "train[:2600]"},
            "validation": {"path": args.data, "split": "train[2600:3120]"},
            "max_length": 160,
        },
        "teacher": {"model": args.teacher, "quantization": "none"},
        "selection": {"method": "top_k", "k": 1},
    })  # fmt: skip
    planned = plan_cache(recipe, Silent())
    teacher = load_teacher(recipe, planned)
    for name, rows in zip(SPLITS, planned.rows, strict=True):
        path = args.output / f"{name}.npy"
        count = sum(r.positions for r in rows)
        out = np.lib.format.open_memmap(path.with_suffix(".part"), "w+", np.float16, (count, len(planned.tokens)))
        place = 0
        for start in range(0, len(rows), BATCH):
            hidden, _ = teacher.hidden(rows[start : start + BATCH])
            with torch.inference_mode():
                logits = teacher.head.logits(hidden)
                logits -= logits.amax(dim=1, keepdim=True)
            out[place : place + len(logits)] = logits.half().numpy()
            place += len(logits)
        out.flush()
        np.savez(
            args.output / f"{name}.npz",
            lengths=[len(r.ids) for r in rows],
            ids=np.concatenate([r.ids for r in rows]),
            targets=np.concatenate([r.targets for r in rows]),
        )
        path.with_suffix(".part").rename(path)


def read_dense(folder: Path, name: str) -> Dense:
    """One split as `write_dense` left it."""
    tokens = np.load(folder / f"{name}.npz")
    bounds = np.concatenate(([0], np.cumsum(tokens["lengths"])))
    rows = [
        TokenRow(i, tokens["ids"][a:b].astype(np.uint32), tokens["targets"][a:b])
        for i, (a, b) in enumerate(pairwise(bounds))
    ]
    return Dense(rows, np.load(folder / f"{name}.npy", mmap_mode="r"))


# Selections ------------------------------------------------------------------------------------------------------------


# A size to tune -> a selection; thresholds are one over the size.
SETTINGS: dict[str, Callable[[float, float], Selection]] = {
    "sampling": lambda t, n: Selection("threshold_sampling", TEMPERATURES, floors=(1 / n, 1 / n)),
    PLAIN: lambda t, n: SETTINGS["sampling"](t, n),
    "sampling, one T": lambda t, n: Selection("threshold_sampling", (t,), floors=(1 / n,), tail_logits=False),
    "threshold": lambda t, n: Selection("threshold", TEMPERATURES, k=4096, floors=(1 / n, 1 / n)),
    "top-k": lambda t, n: Selection("top_k", TEMPERATURES, k=max(1, int(n))),
    "RS-KD": lambda t, n: Selection("random_sampling", (t,), draws=max(1, int(n)), tail_logits=False),
    BOTH: lambda t, n: SETTINGS["RS-KD"](t, n),
}


def read_back(data: Dense, selection: Selection, values: Values = "quantised") -> tuple[list[SparseRows], float]:
    """Rows of every sequence as they come back from a cache, and bytes per position on disk."""
    starts, parts, size = data.starts, [], 0
    for first in range(0, len(data.rows), SHARD_SEQUENCES):
        members = data.rows[first : first + SHARD_SEQUENCES]
        done = []
        for i, row in enumerate(members, start=first):
            labels = torch.from_numpy(row.ids[row.targets].astype(np.int64))
            numbers = uniforms(DIGEST, row, selection.uniforms) if selection.uniforms else None
            done.append(select(data.part(int(starts[i]), int(starts[i + 1])), labels, selection, numbers).rows)
        content = shard_content(members, concatenate(done))
        arrays = encode(content, values=values)
        size += len(pack(arrays, plan_digest=DIGEST, index=0))
        back = decode(arrays, design=content.rows.design, values=values)
        parts += [back[i].rows for i in range(len(members))]
    return parts, size / int(starts[-1])


def others_bytes(kind: str, selection: Selection, data: Dense) -> float:
    """Bytes per position of what a cache holds beside a selection: as many draws at the other temperatures, where a kind serves
    them. What the text and every row take whatever is drawn (all that one draw takes) counts once."""
    if kind != BOTH:
        return 0.0
    others = [replace(selection, temperatures=(t,)) for t in TEMPERATURES if (t,) != selection.temperatures]
    return sum(read_back(data, s)[1] - read_back(data, replace(s, draws=1))[1] for s in others)


def tuned(kind: str, temperature: float, budget: float, data: Dense) -> Selection:
    """The selection of a kind that comes to the budget on ``data``."""
    make, low, high = SETTINGS[kind], 1.1, 255.0 if kind.startswith("RS-KD") else 2000.0
    for _ in range(10):
        n = math.sqrt(low * high)
        selection = make(temperature, n)
        within = read_back(data, selection)[1] + others_bytes(kind, selection, data) < budget
        low, high = (n, high) if within else (low, n)
    return make(temperature, low)


# Training --------------------------------------------------------------------------------------------------------------


def dense_loss(
    hidden: torch.Tensor, head: torch.Tensor, labels: torch.Tensor, logits: torch.Tensor, t: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy and full KL(teacher_T || student_T), summed over positions; differentiable."""
    x = hidden @ head.T
    log_p, log_q = torch.log_softmax(logits / t, dim=1), torch.log_softmax(x / t, dim=1)
    return torch.nn.functional.cross_entropy(x, labels, reduction="sum"), (log_p.exp() * (log_p - log_q)).sum()


def batches(count: int, seed: int, epoch: int) -> Iterator[list[int]]:
    """Sequences in an order of their own each epoch."""
    order = np.random.default_rng((seed, epoch)).permutation(count).tolist()
    return (order[i : i + BATCH] for i in range(0, count, BATCH))


def train(spec: dict[str, Any]) -> dict[str, Any]:
    """One student: AdamW, linear decay; scored on the validation split in full."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(spec["seed"])
    folder, t = Path(spec["folder"]), float(spec["temperature"])
    part = PARTS[spec["part"]]
    data, held_out = (read_dense(folder, name) for name in SPLITS)
    if part.every > 1:
        data, held_out = data.every(part.every), held_out.every(part.every)
    starts, size, rows = data.starts, 0.0, None
    kind, ce_weight = spec["kind"], spec["ce_weight"]
    if kind not in ("full", "CE alone", "untrained"):
        selection = (
            Selection("top_k", TEMPERATURES, k=spec["k"])
            if "k" in spec
            else tuned(kind, t, spec["budget"], data.every(part.tuned_on))
        )
        rows, size = read_back(data, selection)
        size += others_bytes(kind, selection, data)
    model = load_model(spec["student"], quantization="nf4" if part.copy else "none", dtype="float32", device="cpu")
    if part.lora:
        model = attach_lora(model, r=16, alpha=32, dropout=0.05, targets="all-linear", quantized=part.copy)
    else:
        model.requires_grad_(True)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=part.learning_rate, weight_decay=0.0)
    steps = EPOCHS * math.ceil(len(data.rows) / BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    collate = Collator(0, t, "renormalised" if "renormalised" in kind else "auto")
    empty = _no_rows(data.logits.shape[1])

    def batch(split: Dense, chosen: list[int], with_rows: bool) -> dict[str, torch.Tensor]:
        def sequence(i: int) -> CachedSequence:
            row = split.rows[i]
            sparse = rows[i] if with_rows and rows is not None else empty.slice(0, 0)
            return CachedSequence(row.ids, row.targets, sparse)

        return collate([(i, sequence(i)) for i in chosen])

    def dense_sums(split: Dense, chosen: list[int], at: float) -> tuple[torch.Tensor, torch.Tensor, int]:
        inputs = batch(split, chosen, False)
        last: list[torch.Tensor] = []
        hook = model.get_decoder().register_forward_hook(lambda m, a, out: last.append(out.last_hidden_state))
        try:
            model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], logits_to_keep=1)
        finally:
            hook.remove()
        following = inputs["labels"][:, 1:]
        hidden, labels = last[0][:, :-1][following != IGNORED], following[following != IGNORED]
        offsets = split.starts
        logits = torch.from_numpy(
            np.concatenate([split.logits[offsets[i] : offsets[i + 1]] for i in chosen]).astype(np.float32)
        )
        ce, kl = dense_loss(hidden, head_of(model)[0], labels, logits, at)
        return ce, kl, len(labels)

    model.train()
    for epoch in range(EPOCHS if kind != "untrained" else 0):
        for chosen in batches(len(data.rows), spec["seed"], epoch):
            if rows is None:
                ce, kl, count = dense_sums(data, chosen, t)
                loss = ce_weight * ce + ((1 - ce_weight) * t * t * kl if ce_weight < 1 else 0.0)
            else:
                sums = loss_sums(
                    model, model, batch(data, chosen, True), vocab_size=data.logits.shape[1], temperature=t,
                    ce_weight=ce_weight, kd_weight=1 - ce_weight, control_variate=kind == "sampling",
                )  # fmt: skip
                loss, count = sums.total, len(sums.ce_N)
            (loss / count).backward()
            torch.nn.utils.clip_grad_norm_(weights, CLIP)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    model.eval()
    totals = np.zeros(4)
    with torch.no_grad():
        for first in range(0, len(held_out.rows), BATCH):
            chosen = list(range(first, min(first + BATCH, len(held_out.rows))))
            ce, kl_1, count = dense_sums(held_out, chosen, 1.0)
            totals += (float(ce), float(kl_1), float(dense_sums(held_out, chosen, t)[1]), count)
    entries = 0.0 if rows is None else sum(r.entries for r in rows) / int(starts[-1])
    ce_mean, kl_1_mean, kl_t_mean = (totals[:3] / totals[3]).tolist()
    return {
        **{k: v for k, v in spec.items() if k not in ("folder", "student")},
        "bytes": size, "entries": entries, "perplexity": math.exp(ce_mean), "kl_1": kl_1_mean, "kl_t": kl_t_mean,
    }  # fmt: skip


def _no_rows(vocabulary: int) -> SparseRows:
    logits = torch.zeros(1, vocabulary)
    return select(logits, torch.zeros(1, dtype=torch.int64), Selection("top_k", TEMPERATURES, k=1)).rows


def specs(part: str, seeds: int) -> list[dict[str, Any]]:
    """Every run of a part."""
    found: list[dict[str, Any]] = []
    for seed in range(seeds if part == "seeds" else 1):
        for t in TEMPERATURES:
            base = {
                "part": part,
                "temperature": t,
                "seed": seed,
                "ce_weight": PARTS[part].ce_weight,
                "lora": PARTS[part].lora,
            }
            found.append({**base, "kind": "full"})
            if part == "copy":
                found.append({**base, "kind": "untrained"})
                found += [{**base, "kind": kind, "budget": b} for kind in ("sampling", PLAIN) for b in (24, 64)]
                continue
            found += [{**base, "kind": kind, "k": 64} for kind in ("top-k", "top-k, renormalised")]
            if part in KINDS:
                for kind in KINDS[part]:
                    found += [{**base, "kind": kind, "budget": budget} for budget in BUDGETS[:-1]]
            else:
                found += [{**base, "kind": kind, "budget": 64} for kind in ("sampling", PLAIN, "RS-KD")]
                if t == TEMPERATURES[0]:
                    found += [{**base, "kind": "CE alone", "ce_weight": 1.0}]
    return found


def run_all(args: argparse.Namespace, part: str) -> list[dict[str, Any]]:
    """Runs of a part that are not there yet, then all of them."""
    path = args.output / f"{part}.jsonl"
    done = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def same(spec: dict[str, Any], result: dict[str, Any]) -> bool:
        return all(result.get(k) == v for k, v in spec.items()) and ("k" in result) == ("k" in spec)

    todo = [s for s in specs(part, args.seeds) if not any(same(s, r) for r in done)]
    student = args.teacher if PARTS[part].copy else args.student
    todo = [{**s, "folder": str(args.output), "student": student} for s in todo]
    with ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        for number, result in enumerate(pool.map(train, todo), start=1):
            with path.open("a") as f:
                f.write(json.dumps(result) + "\n")
            done.append(result)
            print(f"  {part} {number}/{len(todo)}: {json.dumps(result)}", flush=True)
    return done
