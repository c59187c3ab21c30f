"""Rows of `paper_mini.py` -> tables in the shape of the reference paper's, and a verdict on each of its claims.

Verdicts come from the numbers alone. A difference between two rows that were trained with three seeds is judged seed by seed
(equal seeds see the same batches): it holds, or the contrary does, where all three agree. A row of one seed differs from A1 only
where it lies outside the range of A1's seeds.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdcache.run_record import read_log
from kdcache.student.record import hardware

# Rows that were trained with several seeds, the first of them with seed 0.
SEEDS = ("", " seed 1", " seed 2")
MAIN = {
    "sum": "summed, without clipping",
    "A1": "token-averaged, with clipping (A1)",
    "CE": "CE alone, with clipping",
}
SUMMED_KL = "sum of KL alone"
GRID = ("A1", "A2", "A3", "A4", "A5", "A6")
HOLDS, FAILS, OPEN, UNJUDGED = "holds", "**does not hold**", "undecided", "not judged"
# "Strongly": the published student gains 26 %.
STRONG = 0.10


class MissingRowError(Exception):
    """A row that a verdict needs is not finished."""


@dataclass(frozen=True)
class Row:
    """A finished row: run.json, log.csv."""

    name: str
    values: dict[str, Any]
    log: list[dict[str, float]]

    @property
    def after(self) -> dict[str, float]:
        """Scores of the trained student."""
        found: dict[str, float] = self.values["scores"]["student after"]
        return found


@dataclass(frozen=True)
class Results:
    """Finished rows by name, the others with their error, the cache's size, and A6 at full length."""

    rows: dict[str, Row]
    failed: dict[str, str]
    cache: dict[str, Any]
    full: dict[str, float] | None

    def row(self, name: str) -> Row:
        """A row that has to be there."""
        if name not in self.rows:
            raise MissingRowError(name)
        return self.rows[name]

    def of(self, name: str) -> list[Row]:
        """A main row's seeds, as far as they are finished; any other row alone."""
        return [self.rows[name + seed] for seed in SEEDS if name + seed in self.rows]

    def all_of(self, name: str) -> list[Row]:
        """A main row with every seed."""
        return [self.row(name + seed) for seed in SEEDS]

    def score(self, model: str, key: str) -> float:
        """Of the teacher, or the student before: the same in all rows of full length."""
        value: float = self.row("A1").values["scores"][model][key]
        return value


def load_results(output: Path, full: dict[str, float] | None) -> Results:
    """What the sweep left behind."""
    from kdcache.cache.reader import open_cache

    sweep = json.loads((output / "sweep" / "sweep.json").read_text())
    rows, failed = {}, {}
    for row in sweep["rows"]:
        folder = output / "sweep" / row["directory"]
        if row["state"] == "finished":
            values = json.loads((folder / "run.json").read_text())
            rows[row["name"]] = Row(row["name"], values, read_log(folder / "log.csv"))
        else:
            failed[row["name"]] = row["error"] or row["state"]
    cache = open_cache(str(output / "cache"))
    size, positions = sum(s.bytes for s in cache.manifest.shards), sum(s.positions for s in cache.manifest.splits)
    return Results(rows, failed, {"id": cache.id, "bytes": size, "positions": positions}, full)


def page(
    results: Results, figures: list[str], *, seconds: dict[str, float], load: float, jobs: int, quick: bool
) -> str:
    """The whole page as Markdown."""
    parts = [
        _head(results, seconds, load, jobs, quick),
        _claims(results),
        _table_1(results),
        _table_2(results),
        _table_3(results),
    ]
    captions = (
        "Figure 1: total loss, as logged and smoothed over 10 steps. The scales differ: summed losses are sums.",
        "Figure 2: loss and perplexity of teacher and students on the validation split; whiskers span three seeds.",
        "Figure 3: CE and KL per token of the training batches, mean of three seeds (the KL alone summed: one), smoothed over 10 steps.",
    )
    parts += ["## Figures"]
    parts += [f"![{text}]({name})\n\n{text}" for name, text in zip(figures, captions, strict=True)]
    if results.failed:
        parts.append("Rows that did not finish: " + "; ".join(f"{k}: {v}" for k, v in results.failed.items()))
    return "\n\n".join(parts) + "\n"


def _head(results: Results, seconds: dict[str, float], load: float, jobs: int, quick: bool) -> str:
    a1 = results.of("A1")[0].values
    recipe, versions, device = a1["recipe"], a1["versions"], hardware()["device"]
    trained = ", ".join(f"{k} {versions[k]}" for k in ("torch", "transformers", "peft", "bitsandbytes"))
    took = ", ".join(f"{part} {value / 60:.1f}" for part, value in seconds.items())
    warning = "\n\n**Made by --quick: two steps a row, which say nothing.**" if quick else ""
    return (
        "# The paper in miniature\n\nWritten by `make paper-mini` ([paper_mini.py](paper_mini.py), recipe "
        "[paper-mini/alpaca.yaml](paper-mini/alpaca.yaml)); tables and verdicts come from the numbers."
        f"{warning}\n\n"
        f"One cache of {recipe['data']['max_length']} tokens, {len(results.rows)} students of {a1['steps']} steps. Teacher "
        f"({Path(recipe['teacher']['model']).name}, {recipe['teacher']['quantization']}) and student "
        f"({Path(recipe['student']['model']).name}, QLoRA r {recipe['student']['lora']['r']}) are Qwen2 models of some millions of "
        "parameters, so learning rates are ten times the paper's (2e-3 for 2e-4, 1e-3 for its best, 1e-4); epochs: "
        f"{recipe['training']['epochs']:g} for its three. Scores are token sums over the response tokens of the validation split.\n\n"
        f"Minutes: {took} ({sum(seconds.values()) / 60:.1f} in all), {jobs} rows at a time. {device['name']} "
        f"{device.get('capability', '')}, {hardware()['cpus']} cores at a load of {load:.1f}, of which the "
        f"rows are {jobs} and the rest is other work; {trained}."
    )


def _claims(results: Results) -> str:
    lines = ["## Claims", "| | claim | in miniature | measured |\n|---:|---|---|---|"]
    found = claims(results)
    rows = [f"| {' | '.join(cells)} |" for cells in found]
    by_verdict = {
        what: [number for number, _, verdict, _ in found if verdict == what] for what in (HOLDS, FAILS, OPEN, UNJUDGED)
    }
    short = "; ".join(f"{what.strip('*')}: {', '.join(numbers)}" for what, numbers in by_verdict.items() if numbers)
    note = (
        "Differences of three seeds are taken between equal seeds and stated as mean (least to most); a verdict needs all three on one "
        "side. Rows A2 to A6 have one seed, and differ from A1 only where they lie outside the range of its three seeds. Ranges of losses "
        "(1c) differ from one and a half times on."
    )
    return "\n\n".join([lines[0], f"In short, {short}.", "\n".join([lines[1], *rows]), note])


def claims(results: Results) -> list[tuple[str, str, str, str]]:
    """Number, claim of the paper, verdict, and the numbers it rests on."""
    judged: list[tuple[str, str, Callable[[Results], tuple[str, str]]]] = [
        ("1a", "token-averaged KL with clipping is better than summed KL without", _clipping_is_better),
        ("1b", "... than the KL alone summed, beside an averaged CE", _better_than_summed_kl),
        ("1c", "... and stabler", _clipping_is_stabler),
        ("2", f"cached KD improves the student strongly (perplexity by {STRONG:.0%} or more)", _improves),
        ("3", "the student ends below its teacher's perplexity", _below_teacher),
        ("4", "a lower learning rate than the default is best", _lower_rate),
        ("5", "T 2 with weights .5/.5 is a good choice (no neighbour is better)", _good_choice),
        ("6", "one cache of 512 tokens serves the run at 256", _one_cache),
        ("7a", "KD is better than CE alone at equal steps: perplexity", _against_ce("perplexity")),
        ("7b", "... KL to the teacher (T 1)", _against_ce("kl_to_teacher")),
    ]
    found = []
    for number, claim, judge in judged:
        try:
            found.append((number, claim, *judge(results)))
        except MissingRowError as exc:
            found.append((number, claim, UNJUDGED, f"{exc} did not finish"))
    return found


def paired(results: Results, one: str, other: str, key: str) -> tuple[str, str]:
    """Whether ``one`` is lower than ``other`` in all seeds, and the differences in words."""
    rows = zip(results.all_of(one), results.all_of(other), strict=True)
    differences = [a.after[key] - b.after[key] for a, b in rows]
    return _below_zero(differences), _spread(differences, "+.4f")


def _below_zero(values: list[float]) -> str:
    return HOLDS if max(values) < 0 else FAILS if min(values) > 0 else OPEN


def _clipping_is_better(results: Results) -> tuple[str, str]:
    verdict, differences = paired(results, "A1", "sum", "perplexity")
    return verdict, f"perplexity {_of(results, 'A1')} against {_of(results, 'sum')}, difference {differences}"


def _better_than_summed_kl(results: Results) -> tuple[str, str]:
    found = against_a1(results, SUMMED_KL, "perplexity")
    before, own = results.score("student before", "perplexity"), results.row(SUMMED_KL).after["perplexity"]
    return {"higher": HOLDS, "lower": FAILS, "within": OPEN}[found], (
        f"perplexity {_of(results, 'A1')} against {own:.3f} (one seed; before training {before:.3f}): so many tokens are summed that the "
        "labels hardly count"
    )


def _clipping_is_stabler(results: Results) -> tuple[str, str]:
    peaks = {name: [_peak_of_gradient(row) for row in results.all_of(name)] for name in ("A1", "sum")}
    ranges = {name: _range([r.after["loss"] for r in results.all_of(name)]) for name in peaks}
    better = 1.5 * ranges["A1"] < ranges["sum"], max(peaks["A1"]) < min(peaks["sum"])
    worse = ranges["A1"] > 1.5 * ranges["sum"], min(peaks["A1"]) > max(peaks["sum"])
    verdict = OPEN if any(better) == any(worse) else HOLDS if any(better) else FAILS
    return verdict, (
        f"range of the final loss over seeds {ranges['A1']:.4f} against {ranges['sum']:.4f}; largest gradient norm over the median, before "
        f"clipping: {_spread(peaks['A1'], '.1f')} against {_spread(peaks['sum'], '.1f')}; {_clipped(results):.1%} of A1's steps were clipped"
    )


def _improves(results: Results) -> tuple[str, str]:
    before = results.score("student before", "perplexity")
    gains = [1 - row.after["perplexity"] / before for row in results.all_of("A1")]
    verdict = HOLDS if min(gains) >= STRONG else FAILS if max(gains) < STRONG else OPEN
    gap = results.score("student before", "loss") - results.score("teacher", "loss")
    closed = [(results.score("student before", "loss") - row.after["loss"]) / gap for row in results.all_of("A1")]
    return verdict, (
        f"{before:.3f} to {_of(results, 'A1')}: {_spread(gains, '.1%')} lower, {_spread(closed, '.1%')} of the way to the teacher in loss "
        "(paper: 5.50 to 4.09, 26 %)"
    )


def _below_teacher(results: Results) -> tuple[str, str]:
    teacher = results.score("teacher", "perplexity")
    values = [row.after["perplexity"] for row in results.all_of("A1")]
    verdict = HOLDS if max(values) < teacher else FAILS if min(values) > teacher else OPEN
    return verdict, f"student {_of(results, 'A1')}, teacher {teacher:.3f} (paper: 4.09 and 4.23)"


def _lower_rate(results: Results) -> tuple[str, str]:
    found = against_a1(results, "A5", "perplexity")
    verdict = {"lower": HOLDS, "higher": FAILS, "within": OPEN}[found]
    rate = results.row("A5").values["recipe"]["training"]["learning_rate"]
    usual = results.row("A1").values["recipe"]["training"]["learning_rate"]
    return verdict, f"{rate:g}: {results.rows['A5'].after['perplexity']:.3f}; {usual:g}: {_of(results, 'A1')}"


def _good_choice(results: Results) -> tuple[str, str]:
    others = {"A2": "T 1", "A3": "λ .8/.2", "A4": "λ .2/.8"}
    told = {name: against_a1(results, name, "perplexity") for name in others}
    better = [name for name, found in told.items() if found == "lower"]
    kl = [name for name in others if against_a1(results, name, "kl_to_teacher") == "lower"]
    listed = ", ".join(f"{what} ({n}) {results.row(n).after['perplexity']:.3f}" for n, what in others.items())
    closer = ", ".join(kl) or "none"
    return (FAILS if better else HOLDS), (
        f"perplexity of A1 {_of(results, 'A1')}; {listed}; better: {', '.join(better) or 'none'}; closer to the teacher in KL: {closer}"
    )


def _one_cache(results: Results) -> tuple[str, str]:
    row = results.row("A6")
    same = {r.values["cache_id"] for r in results.rows.values()} == {results.cache["id"]}
    scores = row.values["scores"]
    cut = scores["teacher"]["tokens"] < results.score("teacher", "tokens")
    improved = scores["student after"]["loss"] < scores["student before"]["loss"]
    at_full = (
        ""
        if results.full is None
        else f"; on whole sequences {results.full['perplexity']:.3f}, A1 {_of(results, 'A1')}"
    )
    return (HOLDS if same and cut and improved else FAILS), (
        f"all rows from cache {results.cache['id'][:12]}; at {row.values['recipe']['training']['max_length']}: {scores['student before']['perplexity']:.3f} to "
        f"{scores['student after']['perplexity']:.3f} on {scores['teacher']['tokens']:,.0f} of {results.score('teacher', 'tokens'):,.0f} tokens{at_full}"
    )


def _against_ce(key: str) -> Callable[[Results], tuple[str, str]]:
    def judge(results: Results) -> tuple[str, str]:
        verdict, differences = paired(results, "A1", "CE", key)
        before = f"{results.score('student before', key):{_FORMS[key]}}"
        return verdict, (
            f"{_of(results, 'A1', key)} against {_of(results, 'CE', key)}, difference {differences}; before training {before}"
        )

    return judge


def against_a1(results: Results, name: str, key: str) -> str:
    """Where a row of one seed lies: ``lower`` or ``higher`` than all seeds of A1, or ``within`` them."""
    return place(results, results.row(name).after[key], key)


def place(results: Results, value: float, key: str) -> str:
    """As `against_a1`, of a value."""
    seeds = [row.after[key] for row in results.all_of("A1")]
    return "lower" if value < min(seeds) else "higher" if value > max(seeds) else "within"


def _table_1(results: Results) -> str:
    lines = ["| | seeds | loss | perplexity | KL to teacher (T 1) |\n|---|---:|---:|---:|---:|"]
    for model in ("teacher", "student before"):
        loss, perplexity, kl = (results.score(model, k) for k in ("loss", "perplexity", "kl_to_teacher"))
        lines.append(f"| {model} | | {loss:.4f} | {perplexity:.3f} | {kl:.4f} |")
    for name, what in MAIN.items():
        if rows := results.of(name):
            cells = " | ".join(_of(results, name, key, form) for key, form in _FORMS.items())
            lines.append(f"| {what} | {len(rows)} | {cells} |")
    if SUMMED_KL in results.rows:
        after = results.rows[SUMMED_KL].after
        cells = " | ".join(f"{after[key]:{form}}" for key, form in _FORMS.items())
        lines.append(f"| KL summed over 8 sequences, CE averaged, without clipping | 1 | {cells} |")
    return "\n\n".join(
        ["## Table 1: how the KL is reduced", "\n".join(lines), "Mean over seeds, and in brackets the range."]
    )


def _table_2(results: Results) -> str:
    lines = ["| | T | λ CE | λ KD | learning rate | length |\n|---|---:|---:|---:|---:|---:|"]
    for name in GRID:
        if name in results.rows:
            recipe = results.rows[name].values["recipe"]
            loss, training = recipe["loss"], recipe["training"]
            lines.append(
                f"| {name} | {loss['temperature']:g} | {loss['ce_weight']:g} | {loss['kd_weight']:g} | {training['learning_rate']:g} "
                f"| {training['max_length'] or recipe['data']['max_length']} |"
            )
    return "\n\n".join(["## Table 2: the grid", "\n".join(lines)])


def _table_3(results: Results) -> str:
    lines = [
        "| | loss | perplexity | x before | KL to teacher (T 1) | to A1's seeds | minutes |\n|---|---:|---:|---:|---:|---|---:|"
    ]
    for name in GRID:
        if name not in results.rows:
            continue
        row = results.rows[name]
        after, before = row.after, row.values["scores"]["student before"]
        where = "" if name in ("A1", "A6") else _place(results, after["perplexity"])
        cells = " | ".join(f"{after[key]:{form}}" for key, form in _FORMS.items())
        loss, perplexity, kl = cells.split(" | ")
        lines.append(
            f"| {name} | {loss} | {perplexity} | {after['perplexity'] / before['perplexity']:.3f} | {kl} | {where} | {row.values['seconds'] / 60:.1f} |"
        )
    if results.full is not None:
        after, before = results.full, results.score("student before", "perplexity")
        lines.append(
            f"| A6 on whole sequences | {after['loss']:.4f} | {after['perplexity']:.3f} | {after['perplexity'] / before:.3f} "
            f"| {after['kl_to_teacher']:.4f} | {_place(results, after['perplexity'])} | |"
        )
    cache = results.cache
    note = (
        f"All rows were trained from one cache: {cache['bytes']:,} bytes, {cache['bytes'] / cache['positions']:.1f} for each of "
        f"{cache['positions']:,} positions. A6 is scored on sequences cut as it was trained, and again on whole ones. "
        "Minutes of a row with others beside it, scoring included."
    )
    return "\n\n".join(["## Table 3: results of the grid, one seed", "\n".join(lines), note])


_FORMS = {"loss": ".4f", "perplexity": ".3f", "kl_to_teacher": ".4f"}


def _place(results: Results, perplexity: float) -> str:
    """For the table, where A1's seeds may not all be there."""
    try:
        return place(results, perplexity, "perplexity")
    except MissingRowError:
        return ""


def _of(results: Results, name: str, key: str = "perplexity", form: str = "") -> str:
    return _spread([row.after[key] for row in results.of(name)], form or _FORMS[key])


def _spread(values: list[float], form: str) -> str:
    if len(values) == 1:
        return f"{values[0]:{form}}"
    return f"{statistics.mean(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def _range(values: list[float]) -> float:
    return max(values) - min(values)


def _clipped(results: Results) -> float:
    """Share of A1's logged steps, over all seeds, whose gradient was cut."""
    norms = [
        (line["grad_norm"], row.values["recipe"]["training"]["clip"])
        for row in results.all_of("A1") for line in row.log if "grad_norm" in line
    ]  # fmt: skip
    return sum(norm > clip for norm, clip in norms) / len(norms)


def _peak_of_gradient(row: Row) -> float:
    norms = [line["grad_norm"] for line in row.log if "grad_norm" in line]
    return max(norms) / statistics.median(norms)
