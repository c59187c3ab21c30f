"""An evaluation as tables of text, and as the page evaluation.md."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from kdcache.cache.files import write_file
from kdcache.evaluate.evaluation import Evaluation
from kdcache.evaluate.generation import retention
from kdcache.intervals import INTERVAL_NOTE, half_width
from kdcache.markdown import table
from kdcache.paired import difference, difference_text, read_losses
from kdcache.run_record import AFTER, BEFORE, EVALUATION_PAGE, MODELS, TEACHER

Rows = list[tuple[str, ...]]
Table = tuple[tuple[str, ...], Rows]
SCORE_NOTE = (
    "Top-1: how often the student's most probable token is the teacher's; positions without cached "
    "entries are not compared. ±: half the 95 % interval, sequences being the clusters."
)
ROUGE_NOTE = (
    "ROUGE-L F1 over lower-case words of any script (no stemming), exact match of the text but for white space; retained: the "
    "student in percent of the teacher."
)


def score_note(values: dict[str, Any]) -> str:
    """What to read under `score_table`: of a reinforced student also which model is the one before."""
    return SCORE_NOTE + (f" Student before: {values['before']}." if "before" in values else "")


def title(evaluation: Evaluation) -> str:
    """Which run, and on how many tokens it was scored."""
    tokens = int(evaluation.values["scores"][AFTER]["tokens"])
    return f"{evaluation.run}, on {tokens:,} response tokens of its cache's validation split"


def score_table(values: dict[str, Any]) -> Table:
    """Loss, perplexity, KL and top-1 agreement of each model."""
    temperature = max(s["kl_temperature"] for s in values["scores"].values())
    at = "" if temperature == 1 else f", T = {temperature:g}"
    rows: Rows = [
        (
            name,
            f"{s['loss']:.4f}",
            _number(half_width(s["loss"], s["stderr"], None), 4),
            f"{s['perplexity']:.3f}",
            f"{s['kl_to_teacher']:.4f}",
            _number(s["top_1_agreement"], 3),
            _number(
                None if s["top_1_agreement"] is None else half_width(s["top_1_agreement"], s["top_1_stderr"], None), 3
            ),
        )
        for name, s in values["scores"].items()
    ]
    return ("model", "loss", "±", "perplexity", "KL" + at, "top-1", "±"), rows


def generation_table(values: dict[str, Any]) -> Table:
    """ROUGE-L and exact match of each model, with intervals, and what the student retains."""
    part = values["generation"]
    rows: Rows = [
        (name, *(_interval(s[key], s[f"{key}_stderr"], part["examples"]) for key in ("rouge_l", "exact_match")))
        for name, s in part["models"].items()
    ]
    if "retention" in part:
        whole = part["models"][TEACHER]
        for name, kept in (("before", retention(part["models"][BEFORE], whole)), ("after", part["retention"])):
            shares = ("-" if kept[k] is None else f"{kept[k]:.1f} %" for k in ("rouge_l", "exact_match"))
            rows.append((f"retained {name}", *shares))
    return ("model", "ROUGE-L", "exact match"), rows


def task_table(values: dict[str, Any], names: Sequence[str] | None = None) -> Table:
    """A row for each metric of each task, the models side by side.

    Args:
        values: of evaluation.json.
        names: tasks that were measured together; None for all, which may have been asked in different ways.
    """
    rows: Rows = []
    chosen = {name: task for name, task in values["tasks"].items() if names is None or name in names}
    models = [m for m in MODELS if any(m in task["models"] for task in chosen.values())]
    for name, task in chosen.items():
        label = name if not task["shots"] or "shot" in name else f"{name} {task['shots']}-shot"
        label += ", chat" if names is None and task["chat_template"] else ""
        for metric, found in {task["metric"]: task["models"], **task.get("also", {})}.items():
            cells = [
                _interval(found[m]["value"], found[m]["stderr"], task["examples"]) if m in found else "-"
                for m in models
            ]
            rows.append((label, metric, str(task["examples"]), *cells))
    return ("task", "metric", "n", *(m.removeprefix("student ") for m in models)), rows


def leaderboard(evaluations: Sequence[Evaluation]) -> Table:
    """The students after training of several runs, in a row each, named as far as their paths differ.

    Each is held against the best, sequence by sequence.
    """
    rows: Rows = []
    losses = [read_losses(e.run, {m: s["loss"] for m, s in e.values["scores"].items()}) for e in evaluations]
    best = min(range(len(evaluations)), key=lambda i: float(evaluations[i].values["scores"][AFTER]["loss"]))
    # Cut at different lengths, runs are scored on different tokens.
    apart = len({e.values["scores"][AFTER]["tokens"] for e in evaluations}) > 1
    folder = os.path.commonpath([evaluation.run.absolute().parent for evaluation in evaluations])
    for i, evaluation in enumerate(evaluations):
        own, least = losses[i], losses[best]
        apart_from_best = None if own is None or least is None or i == best else difference(own, least, AFTER)
        score, values = evaluation.values["scores"][AFTER], evaluation.values
        # Generations kept from another call may have answered other prompts.
        kept = values["generation"].get("retention") if "generation" in evaluation.measured else None
        rows.append((
            str(evaluation.run.absolute().relative_to(folder)), f"{score['loss']:.4f}",
            "best" if i == best else difference_text(apart_from_best),
            f"{score['perplexity']:.3f}", f"{score['kl_to_teacher']:.4f}", _number(score["top_1_agreement"], 3),
            *((f"{score['tokens']:,}",) if apart else ()),
            "-" if not kept or kept["rouge_l"] is None else f"{kept['rouge_l']:.1f} %",
        ))  # fmt: skip
    return (
        "run",
        "loss",
        "above the best",
        "perplexity",
        "KL",
        "top-1",
        *(("tokens",) if apart else ()),
        "ROUGE-L kept",
    ), rows


def sample_lines(values: dict[str, Any]) -> list[str]:
    """Prompts with their reference and the answers of each model, to be read."""
    lines = []
    for number, sample in enumerate(values["samples"], 1):
        lines.append(f"[{number}] {_indented(sample['prompt'])}")
        for name, text in {"reference": sample["reference"], **sample["answers"]}.items():
            lines.append(f"    {name + ':':<16}{_indented(text) or '(nothing)'}")
        lines.append("")
    return lines


def write_page(evaluation: Evaluation) -> None:
    """Write everything that is known of a run to evaluation.md in its directory.

    Raises:
        StorageError: it cannot be written.
    """
    values = evaluation.values
    heading = title(evaluation).removeprefix(str(evaluation.run))
    parts = [
        f"# {evaluation.run.name}, evaluated",
        f"Scores{heading[1:]}:",
        table(*score_table(values)),
        score_note(values),
    ]
    if "generation" in values:
        part = values["generation"]
        parts += [
            f"## Answers to {part['examples']} validation prompts, of at most {part['max_new_tokens']} tokens",
            table(*generation_table(values)),
            f"{ROUGE_NOTE} {INTERVAL_NOTE}",
        ]
    if "tasks" in values:
        parts += [
            "## Tasks of lm-evaluation-harness",
            table(*task_table(values)),
            f"Chat: through the chat template. {INTERVAL_NOTE}",
        ]
    if "samples" in values:
        parts += ["## Samples", *("\n".join(_quoted(sample)) for sample in values["samples"])]
    parts.append(f"Cache {values['cache_id'][:12]}, kdcache {values['kdcache']}.")
    write_file(evaluation.run / EVALUATION_PAGE, ("\n\n".join(p.rstrip("\n") for p in parts) + "\n").encode())


def _quoted(sample: dict[str, Any]) -> list[str]:
    texts = {"prompt": sample["prompt"], "reference": sample["reference"], **sample["answers"]}
    lines = []
    for name, text in texts.items():
        # As code: an answer may hold any Markdown, also the end of a fence.
        fence = "```"
        while fence in text:
            fence += "`"
        lines += [f"**{name}**", "", fence + "text", text, fence, ""]
    return lines


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _interval(value: float, error: float | None, examples: int) -> str:
    half = half_width(value, error, examples)
    return f"{value:.3f}" + ("" if half is None else f" ±{half:.3f}")


def _indented(text: str) -> str:
    return text.replace("\n", "\n" + " " * 20)
