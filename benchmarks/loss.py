"""What the loss costs and how exact it is, beside everything one would otherwise use; one run, one table each.

    python benchmarks/loss.py        # head and loss alone, V = 151,936, and gradient errors; training.py has whole steps

Time is the median over rounds in which every variant ran once, each in a process of its own, so that a machine that
slows down slows all of them; memory is the process's peak above what holds the inputs. One thread.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from kdcache.student.loss import SparseTeacher, distillation_loss

TEMPERATURE, KEPT, HIDDEN, VOCABULARY = 2.0, 32, 896, 151_936


def inputs(rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, SparseTeacher]:
    """Hidden states, frozen head, labels, and a teacher whose rows hold about 90 % of the mass."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, HIDDEN, generator=generator).requires_grad_(True)
    head = torch.empty(VOCABULARY, HIDDEN).normal_(generator=generator).mul_(HIDDEN**-0.5)
    labels = torch.randint(VOCABULARY, (rows,), generator=generator)
    ids = torch.stack([torch.randperm(4096, generator=generator)[:KEPT] * 37 for _ in range(rows)])
    log_p = torch.log_softmax(torch.randn(rows, KEPT, generator=generator) * 2, dim=1) + torch.tensor(0.9).log()
    return hidden, head, labels, SparseTeacher(ids, log_p, torch.full((rows,), 0.1).log())


def dense_target(teacher: SparseTeacher) -> torch.Tensor:
    """[N, V] teacher probabilities with the rest spread evenly, as a live teacher would give them."""
    rest = teacher.log_tail_N.exp() / (VOCABULARY - KEPT)
    target = rest[:, None].expand(-1, VOCABULARY).clone()
    return target.scatter_(1, teacher.ids_NK, teacher.log_probs_NK.exp())


def naive_ce(hidden, head, labels, teacher):
    F.cross_entropy(hidden @ head.T, labels, reduction="sum").backward()


def naive_kd(hidden, head, labels, teacher):
    target = dense_target(teacher)
    logits = hidden @ head.T
    ce = F.cross_entropy(logits, labels, reduction="sum")
    kl = F.kl_div(torch.log_softmax(logits / TEMPERATURE, dim=1), target, reduction="sum")
    (0.5 * ce + 0.5 * TEMPERATURE**2 * kl).backward()


class ChunkedCE(torch.autograd.Function):
    """Cross-entropy in chunks, the gradient in the memory of the logits: the leanest CE one can write in torch."""

    @staticmethod
    def forward(ctx, hidden, head, labels, rows):
        grad = torch.empty_like(hidden)
        total = hidden.new_zeros(())
        buffer = torch.empty(min(rows, len(labels)), head.shape[0])
        for start in range(0, len(labels), rows):
            span = slice(start, start + rows)
            logits = torch.mm(hidden[span], head.T, out=buffer[: len(labels[span])])
            picked = labels[span, None]
            label = logits.gather(1, picked)
            top = logits.amax(dim=1, keepdim=True)
            exponentials = logits.sub_(top).exp_()
            sums = exponentials.sum(dim=1, keepdim=True)
            total = total + (sums.log() + top - label).sum()
            exponentials.div_(sums).scatter_add_(1, picked, torch.full_like(sums, -1.0))
            torch.mm(exponentials, head, out=grad[span])
        ctx.grad = grad
        return total

    @staticmethod
    def backward(ctx, scale):
        return ctx.grad * scale, None, None, None


def chunked_ce(hidden, head, labels, teacher):
    ChunkedCE.apply(hidden, head, labels, max(1, (256 << 20) // (4 * VOCABULARY))).backward()


def linear_ce(hidden, head, labels, teacher):
    F.linear_cross_entropy(hidden, head, labels, reduction="sum").backward()


def cached_kd(hidden, head, labels, teacher):
    distillation_loss(
        hidden, head, labels, teacher, temperature=TEMPERATURE, ce_weight=0.5, kd_weight=0.5
    ).total.backward()


VARIANTS: dict[str, Callable[..., None]] = {
    "naive CE": naive_ce,
    "naive KD, full logits": naive_kd,
    "chunked CE": chunked_ce,
    "torch linear_cross_entropy": linear_ce,
    "kdcache, CE + KD": cached_kd,
}
if not hasattr(F, "linear_cross_entropy"):
    VARIANTS.pop("torch linear_cross_entropy")


def one(name: str, rows: int) -> None:
    """Run one variant once and print its seconds and peak MiB as JSON."""
    torch.set_num_threads(1)
    arguments = inputs(rows)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    VARIANTS[name](*arguments)
    seconds = time.perf_counter() - started
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(json.dumps({"seconds": seconds, "peak": peak}))


def cost_table(rows: int, rounds: int) -> None:
    """Every variant in every round, in a process of its own."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in VARIANTS}
    for _ in range(rounds):
        for name in VARIANTS:
            command = [sys.executable, __file__, "--one", name, "--rows", str(rows)]
            runs[name].append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    seconds = {n: statistics.median(r["seconds"] for r in rs) for n, rs in runs.items()}
    peak = {n: max(r["peak"] for r in rs) for n, rs in runs.items()}
    ratio = {
        n: statistics.median(r["seconds"] / b["seconds"] for r, b in zip(rs, runs["chunked CE"], strict=True))
        for n, rs in runs.items()
    }
    print(
        f"\nforward and backward, N = {rows:,}, D = {HIDDEN}, V = {VOCABULARY:,}, K = {KEPT}, T = {TEMPERATURE:g}, float32\n"
    )
    print("| loss | seconds | x chunked CE | peak extra MiB | x chunked CE |\n|---|---:|---:|---:|---:|")
    for name in VARIANTS:
        print(
            f"| {name} | {seconds[name]:.2f} | {ratio[name]:.2f} | {peak[name]:,.0f} | {peak[name] / peak['chunked CE']:.2f} |"
        )
    if not torch.cuda.is_available():
        print("| Liger fused linear CE, and everything on a GPU | not measured: no GPU | | | |")


def gpu_table(rounds: int) -> None:
    """bfloat16 on CUDA, frozen head: the fused passes beside naive CE and Liger's fused linear CE, in turn."""
    variants = {"naive CE": naive_ce, "kdcache, CE + KD": cached_kd}
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss(reduction="sum")
        variants["Liger fused linear CE"] = lambda hidden, head, labels, teacher: liger(head, hidden, labels).backward()
    except ImportError:
        print("\nLiger is not installed: not measured")
    print("\n| rows | loss | ms | x Liger | peak extra MiB |\n|---:|---|---:|---:|---:|")
    for rows in (8_192, 16_384, 32_768, 65_536):
        hidden, head, labels, teacher = inputs(rows)
        hidden = hidden.detach().cuda().bfloat16().requires_grad_(True)
        head, labels = head.cuda().bfloat16(), labels.cuda()
        teacher = SparseTeacher(teacher.ids_NK.cuda(), teacher.log_probs_NK.cuda(), teacher.log_tail_N.cuda())
        times: dict[str, list[float]] = {name: [] for name in variants}
        peak: dict[str, float] = {}
        for turn in range(rounds + 1):
            for name, run in variants.items():
                # A full [rows, V] tensor and its gradients: beyond this naive CE has nothing to say.
                if name == "naive CE" and rows > 16_384:
                    continue
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                started = time.perf_counter()
                run(hidden, head, labels, teacher)
                torch.cuda.synchronize()
                if turn:  # the first one compiles
                    times[name].append(1000 * (time.perf_counter() - started))
                peak[name] = (torch.cuda.max_memory_allocated() - before) / 2**20
                hidden.grad = None
        reference = statistics.median(times.get("Liger fused linear CE") or [float("nan")])
        for name, own in times.items():
            if own:
                median = statistics.median(own)
                print(f"| {rows:,} | {name} | {median:.1f} | {median / reference:.2f} | {peak[name]:,.0f} |")


def error_table() -> None:
    """Relative gradient error against the float64 oracle of the tests."""
    from tests.reference import dense_loss, relative_error
    from tests.student.test_loss import DIVERGENCES, TEMPERATURES, make_case, sampled

    print(
        f"\nlargest relative gradient error (hidden states) over T in {TEMPERATURES}, V = {VOCABULARY:,}, N = 3, K = 32\n"
    )
    print(
        "| divergence | tail | float32 | bfloat16 hidden states and head | naive bfloat16 |\n|---|---|---:|---:|---:|"
    )
    for divergence in DIVERGENCES:
        for tail in ("lumped", "renormalised", "sampled"):
            if tail != "lumped" and divergence in ("reverse_kl", "jsd"):
                continue
            worst = [0.0, 0.0, 0.0]
            for temperature in TEMPERATURES:
                states, head, labels, teacher = make_case(3, VOCABULARY, 32, hidden=64, temperature=temperature)
                if tail == "renormalised":
                    teacher = teacher.renormalised()
                if tail == "sampled":
                    teacher = sampled(3, VOCABULARY, 16, 16, temperature=temperature)
                weights = {"temperature": temperature, "ce_weight": 0.5, "kd_weight": 0.5, "divergence": divergence}
                for column, dtype in enumerate((torch.float32, torch.bfloat16)):
                    h, w = states.to(dtype), head.to(dtype)
                    truth = dense_loss(h, w, None, labels, teacher, **weights)[3][0]
                    leaf = h.clone().requires_grad_(True)
                    distillation_loss(leaf, w, labels, teacher, **weights).total.backward()
                    worst[column] = max(worst[column], relative_error(leaf.grad, truth))
                worst[2] = max(worst[2], naive_bf16_error(states, head, labels, teacher, weights))
            print(f"| {divergence} | {tail} | {worst[0]:.1e} | {worst[1]:.1e} | {worst[2]:.1e} |")


def naive_bf16_error(states, head, labels, teacher, weights) -> float:
    """The oracle's formula with bfloat16 logits, as a plain training loop under autocast has them."""
    from tests.reference import dense_loss, dense_teacher, loss_from_logits, relative_error

    h, w = states.bfloat16(), head.bfloat16()
    truth = dense_loss(h, w, None, labels, teacher, **weights)[3][0]
    leaf = h.clone().requires_grad_(True)
    log_weights = teacher.log_probs_NK if teacher.log_weights_NK is None else teacher.log_weights_NK
    p, kept, rho = dense_teacher(teacher.ids_NK, log_weights, teacher.log_tail_N, head.shape[0])
    log_p = None
    if teacher.log_weights_NK is not None:
        log_p = dense_teacher(teacher.ids_NK, teacher.log_probs_NK, teacher.log_tail_N, head.shape[0])[0].log()
    logits = (leaf @ w.T).float()
    total = loss_from_logits(
        logits, labels, p.float(), kept, rho.float(), log_p=None if log_p is None else log_p.float(), **weights
    )[0]
    return relative_error(torch.autograd.grad(total, leaf)[0], truth)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        one(args.one, args.rows)
        return
    from kdcache.student.record import hardware

    print(f"torch {torch.__version__}, {hardware()['device']}")
    cost_table(args.rows, args.rounds)
    if torch.cuda.is_available():
        gpu_table(args.rounds)
    error_table()


if __name__ == "__main__":
    main()
