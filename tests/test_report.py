"""Reports of runs and sweeps: every row is there, figures are exact, and strangers' strings stay strings."""

import copy
import html.parser
import json
import re
import shlex
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from kdcache.errors import StorageError, TrainingError
from kdcache.evaluate.tables import task_table
from kdcache.markdown import escaped
from kdcache.recipe import parse_recipe
from kdcache.recipe_yaml import read_values
from kdcache.report import write_pages
from kdcache.report.blocks import Table
from kdcache.report.collect import Row, collect
from kdcache.report.effects import effects
from kdcache.report.judged import Evaluation, Inference
from kdcache.report.markdown import markdown
from kdcache.report.recipes import bases, differences, varied
from kdcache.report.run_page import smoothed
from kdcache.report.sections import compose
from kdcache.report.write import write_report
from kdcache.run_record import RunRecord, load_record, record_digest
from tests.report_examples import (
    CACHE_ID,
    RECIPE,
    example_sweep,
    hostile_sweep,
    make_evaluation,
    make_run,
    make_sweep,
    recipe_with,
)


class Reader(html.parser.HTMLParser):
    """Tables by caption (lines of cells, each with class, text and values), tags, and whatever could fetch or run."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.tags, self.suspicious, self.headings, self.ids = [], [], [], [], []
        self.scripts = 0
        self._into = None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.tags.append((tag, given))
        self.ids += [given["id"]] if "id" in given else []
        self.scripts += tag == "script"
        refers = any(
            k in given and not (given[k] or "").startswith("#")
            for k in ("src", "href", "xlink:href", "action", "srcset")
        )
        if (
            refers
            or any(k.startswith("on") for k in given)
            or tag in ("iframe", "object", "embed", "link", "base", "form", "img")
        ):
            self.suspicious.append((tag, given))
        if tag == "table":
            self.tables.append({"class": given.get("class"), "lines": [], "caption": ""})
        elif tag == "tr":
            self.tables[-1]["lines"].append({"class": given.get("class", ""), "cells": []})
        elif tag in ("td", "th"):
            self._into = {"text": "", **given}
            self.tables[-1]["lines"][-1]["cells"].append(self._into)
        elif re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        elif tag == "caption":
            self._into = self.tables[-1]

    def handle_data(self, data):
        if self._into is not None:
            key = "caption" if "caption" in self._into else "text"
            self._into[key] += data

    def handle_endtag(self, tag):
        if tag in ("td", "th", "caption"):
            self._into = None

    def board(self):
        heads, *lines = self.tables[0]["lines"]
        columns = [cell["text"] for cell in heads["cells"]]
        return [{"class": line["class"], **dict(zip(columns, line["cells"], strict=True))} for line in lines]


def board(paths):
    """The leaderboard's lines as they will be written; nothing is drawn."""
    document = compose(collect(paths), title="", folder="")
    [table] = [b for b in document.sections[0].blocks if isinstance(b, Table)]
    labels = [column.label for column in table.columns]
    return [(line.kind, dict(zip(labels, line.cells, strict=True))) for line in table.lines]


def text_of(*paths):
    """The Markdown of a report; nothing is drawn."""
    return markdown(compose(collect(paths), title="", folder="out"))


def names(lines):
    return [(cells["student"].text, kind) for kind, cells in lines if kind != "reference"]


def read(written):
    [path] = [p for p in written.files if p.suffix == ".html"]
    return Reader(path.read_text())


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """An example sweep and its report; tests read and never change them."""
    folder = example_sweep(tmp_path_factory.mktemp("report") / "sweep")
    return folder, write_report([folder])


def test_the_leaderboard_has_every_row_and_the_figures_of_run_json(swept):
    folder, written = swept
    lines = read(written).board()
    assert [line["student"]["text"] for line in lines] == [
        "teacher",
        "student before",
        "A2",
        "A1",
        "A4",
        "A10",
        "A6",
        "A5",
    ]
    assert [line["class"] for line in lines] == ["reference", "reference", "", "", "", "", "open", "failed"]
    by_name = {line["student"]["text"]: line for line in lines}
    for name, row in (("A1", 0), ("A2", 1), ("A10", 2), ("A4", 3)):
        after = json.loads((folder / f"row{row}" / "run.json").read_text())["scores"]["student after"]
        for column, key in (("perplexity", "perplexity"), ("loss", "loss"), ("KL to teacher", "kl_to_teacher")):
            assert float(by_name[name][column]["data-value"]) == after[key]
        assert float(by_name[name]["minutes"]["data-value"]) == 93.25 / 60
    assert (
        float(by_name["teacher"]["perplexity"]["data-value"])
        == json.loads((folder / "row0/run.json").read_text())["scores"]["teacher"]["perplexity"]
    )
    assert by_name["A2"]["changed"]["text"] == "loss.temperature=2"
    assert by_name["A2"]["ROUGE-L"]["data-value"] == "0.42"
    assert by_name["A2"]["top-1"]["data-value"] == "0.42"
    assert by_name["teacher"]["facts"]["data-value"] == "0.5"
    assert by_name["A2"]["retention %"]["text"] == "84.0"
    assert "the loss is not a number since step 12" in by_name["A5"]["changed"]["text"]
    assert "training.learning_rate=10" in by_name["A5"]["changed"]["text"]
    assert by_name["A6"]["changed"]["text"].startswith("waiting")


def test_the_files_of_a_report(swept):
    folder, written = swept
    assert {p.name for p in written.files} == {
        "report.md", "report.html", "recipe.yaml",
        *(f"{name}.{end}" for name in ("scores", "training", "evaluation", "effects") for end in ("png", "svg")),
    }  # fmt: skip
    for path in written.files:
        assert path.parent == folder / "report"
        data = path.read_bytes()
        if path.suffix == ".png":
            assert data[:4] == b"\x89PNG"
        if path.suffix == ".svg":
            assert ElementTree.fromstring(data).tag.endswith("svg")
    again = {p: p.read_bytes() for p in written.files}
    assert {p: p.read_bytes() for p in write_report([folder]).files} == again


def test_markdown_says_what_the_page_says(swept):
    _, written = swept
    text = next(p for p in written.files if p.suffix == ".md").read_text()
    page = read(written)
    for line in page.board():
        assert f"| {escaped(line['student']['text'])} |" in text
        assert f"| {line['perplexity']['text']} |" in text
    for name in ("scores", "training", "evaluation", "effects"):
        assert f"]({name}.png)" in text
    tables = re.findall(r"^\|---", text, flags=re.MULTILINE)
    assert len(tables) == len(page.tables)


def test_the_page_is_a_document_that_fetches_and_runs_nothing(swept):
    _, written = swept
    page = read(written)
    assert page.suspicious == []
    assert page.scripts == 1
    assert page.headings[0] == 1
    assert all(b <= a + 1 for a, b in zip(page.headings, page.headings[1:], strict=False))
    assert len(page.ids) == len(set(page.ids))
    images = [given for tag, given in page.tags if given.get("role") == "img"]
    assert len(images) == 2 + 4 + 1 + 2
    assert all(len(given["aria-label"]) > 20 for given in images)
    [policy] = [given["content"] for tag, given in page.tags if tag == "meta" and given.get("http-equiv")]
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-")
    assert "http" not in policy


def test_effects_are_means_over_the_rows_that_share_a_value(swept):
    folder, written = swept
    [table] = [t for t in read(written).tables if t["caption"] == "Mean perplexity by value"]
    found = {
        (a["text"], b["text"]): (float(mean["data-value"]), int(n["data-value"]))
        for a, b, mean, _, n in (line["cells"] for line in table["lines"][1:])
    }
    perplexity = [
        json.loads((folder / f"row{i}/run.json").read_text())["scores"]["student after"]["perplexity"] for i in range(4)
    ]
    assert found == {
        ("loss.temperature", "1"): (pytest.approx((perplexity[0] + perplexity[2]) / 2), 2),
        ("loss.temperature", "2"): (pytest.approx((perplexity[1] + perplexity[3]) / 2), 2),
        ("training.learning_rate", "1e-05"): (pytest.approx((perplexity[2] + perplexity[3]) / 2), 2),
        ("training.learning_rate", "0.004"): (pytest.approx((perplexity[0] + perplexity[1]) / 2), 2),
    }


def points(name, values, perplexity):
    """A row of a report as `effects` sees it."""
    recipe = {"loss": {"temperature": values[0], "ce_weight": values[1], "kd_weight": 1 - values[1]}, "seed": values[2]}
    scores = {"student after": {"perplexity": perplexity}}
    record = RunRecord(Path(name), {"recipe": recipe, "scores": scores})
    return Row(name, Path(name), sweep=0, record=record)


def found_effects(rows):
    keys = ("loss.temperature", "loss.ce_weight", "loss.kd_weight", "seed")
    base = SimpleNamespace(name="base", file="recipe.yaml", rows=rows)
    comparison = SimpleNamespace(sets=[rows], set_name=lambda row: "A")
    return {
        e.title: {level.value: dict(level.points) for level in e.levels}
        for e in effects([base], comparison, {"recipe.yaml": keys})
    }


def test_named_rows_are_held_against_the_one_that_differs_in_nothing_else():
    rows = [
        points("A1", (2, 0.5, 0), 6.8),
        points("A2", (1, 0.5, 0), 6.5),
        points("A3", (2, 0.8, 0), 6.6),
        points("A4", (2, 0.2, 0), 7.1),
    ]
    assert found_effects(rows) == {
        "loss.temperature": {"1": {"A2": 6.5}, "2": {"A1": 6.8}},
        "loss.ce_weight, loss.kd_weight": {"0.2, 0.8": {"A4": 7.1}, "0.5, 0.5": {"A1": 6.8}, "0.8, 0.2": {"A3": 6.6}},
    }  # fmt: skip


def test_a_grid_that_lacks_a_row_leaves_out_what_was_to_be_held_against_it():
    rows = [points(f"{t}-{s}", (t, 0.5, s), t + s / 10) for t in (1, 2) for s in (0, 1, 2) if (t, s) != (2, 2)]
    assert found_effects(rows)["loss.temperature"] == {"1": {"1-0": 1.0, "1-1": 1.1}, "2": {"2-0": 2.0, "2-1": 2.1}}


def test_rows_that_differ_in_everything_have_no_means():
    rows = [points(f"trial-{i}", (1 + i / 7, 0.1 + i / 10, i), 6 + i) for i in range(5)]
    # All change together here: one factor, and nothing else varies.
    assert list(found_effects(rows)) == ["loss.temperature, loss.ce_weight, loss.kd_weight, seed"]
    rows.append(points("trial-5", (1, 0.2, 7), 5.0))
    assert all(title.endswith("(others vary too)") or "seed" in title for title in found_effects(rows))


def test_what_is_neither_run_nor_sweep_is_refused(tmp_path):
    (tmp_path / "notes").mkdir()
    with pytest.raises(TrainingError, match="neither a run nor a sweep"):
        write_report([tmp_path / "notes"])
    assert not (tmp_path / "notes" / "report").exists()


def test_tasks_have_intervals_and_samples_stand_side_by_side(swept):
    _, written = swept
    page = read(written)
    [task] = [t for t in page.tables if t["caption"].startswith("facts: acc, 50 examples, 8")]
    assert [cell["text"] for cell in task["lines"][1]["cells"]] == [
        "A2",
        "0.200 ± 0.098",
        "0.420 ± 0.098",
        "0.500 ± 0.098",
        "84.0",
    ]
    [measured] = [t for t in page.tables if t["caption"].startswith("Inference of A2: 64 prompt tokens")]
    assert measured["lines"][1]["cells"][3]["text"] == "3.0 MiB (process)"
    assert measured["lines"][2]["class"] == "failed"
    text = next(p for p in written.files if p.suffix == ".html").read_text()
    card = re.search(r"Question 0</p><dl>(.*?)</dl>", text)[1]
    assert re.findall(r"<dt>(.*?)</dt><dd[^>]*>(.*?)</dd>", card) == [
        ("reference", "Paris"), ("teacher", "teacher says 0"), ("student before", "student before says 0"),
        ("A2", "student after says 0"), ("A1", "student after says 0"),
    ]  # fmt: skip


def test_answers_of_other_bases_and_teachers_are_told_apart(tmp_path):
    folder = example_sweep(tmp_path / "sweep")
    run = next(p.parent for p in folder.rglob("evaluation.json") if json.loads(p.read_text()).get("samples"))
    values = json.loads((run / "evaluation.json").read_text())
    for sample in values["samples"]:
        sample["answers"] |= {"teacher": "another teacher's", "student before": "another base's"}
    (run / "evaluation.json").write_text(json.dumps(values))
    text = next(p for p in write_report([folder]).files if p.suffix == ".html").read_text()
    found = re.findall(r"<dt>(.*?)</dt><dd[^>]*>(.*?)</dd>", re.search(r"Question 0</p><dl>(.*?)</dl>", text)[1])
    said = dict(found)
    assert len(said) == len(found) == 7
    assert {"another teacher&#x27;s", "teacher says 0"} <= set(said.values())
    [other] = [name for name, text in found if text == "another base&#x27;s"]
    assert other.endswith("student before")


def test_commands_repeat_the_rows(swept):
    folder, written = swept
    [base] = bases(written.found)
    for row in base.rows:
        program, command, path, *overrides = shlex.split(base.command(row, str(folder / "report")))
        assert (program, command) == ("kdcache", "train-student")
        values = read_values(folder / "report" / path.rpartition("/")[2], overrides)
        assert values["output"].endswith("-again")
        if row.recipe is not None:
            assert {**values, "output": 0} == {**row.recipe, "output": 0}
        else:
            assert all(key in " ".join(overrides) for key in row.changes)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"student.lora": None}, {"student.lora": None}),
        ({"loss.temperature": {"start": 2.0, "end": 1.0, "shape": "linear"}}, {"loss.temperature": {"start": 2.0, "end": 1.0, "shape": "linear"}}),
        ({"student.lora": {"r": 16, "alpha": 64.0}}, {"student.lora.alpha": 64.0}),
        ({"training.optimizer": "yes"}, {"training.optimizer": "yes"}),
        ({"training.optimizer": "a: b, 'c' $(d)"}, {"training.optimizer": "a: b, 'c' $(d)"}),
        ({"student.model": "data[:5%]"}, {"student.model": "data[:5%]"}),
    ],
)  # fmt: skip
def test_differences_are_keys_that_can_be_overridden(tmp_path, changes, expected):
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", changes=changes)
    [base] = bases(collect([tmp_path / "a", tmp_path / "b"]))
    (tmp_path / "recipe.yaml").write_text(base.yaml())
    changed = base.changed(base.rows[1])
    assert {key: after for key, (_, after) in changed.items()} == expected
    words = shlex.split(base.command(base.rows[1], str(tmp_path)))
    assert words[:3] == ["kdcache", "train-student", str(tmp_path / "recipe.yaml")]
    values = read_values(tmp_path / "recipe.yaml", words[3:])
    assert {**values, "output": 0} == {**base.rows[1].recipe, "output": 0}


def test_where_the_caches_of_a_mixture_lie_is_no_difference_and_how_they_are_mixed_is(tmp_path):
    def mixed(folder, weight):
        return {"cache.mixture": [{"directory": f"{folder}/b", "weight": weight}]}

    make_run(tmp_path / "a", changes=mixed("/here", 2.0))
    make_run(tmp_path / "b", changes=mixed("/there", 2.0))
    make_run(tmp_path / "c", changes=mixed("/here", 3.0))
    make_run(tmp_path / "d")
    for others, expected in (("ab", []), ("abc", ["cache.mixture"]), ("ad", ["cache.mixture"])):
        [base] = bases(collect([tmp_path / name for name in others]))
        assert varied(base) == expected
    # A command that repeats the row still says where they are.
    [base] = bases(collect([tmp_path / "a", tmp_path / "b"]))
    assert "/there/b" in base.command(base.rows[1], "out")


def test_a_key_that_another_version_does_not_know_is_no_difference():
    assert differences(RECIPE, {k: v for k, v in RECIPE.items() if k != "loss"}) == {}


def broken_json(folder):
    (folder / "run.json").write_text('{"format": "kdcache-run", ')


def other_format(folder):
    (folder / "run.json").write_text('{"format": "something"}')


def deep_json(folder):
    (folder / "run.json").write_text("[" * 200_000)


def without(*keys):
    def change(folder):
        values = json.loads((folder / "run.json").read_text())
        (folder / "run.json").write_text(
            json.dumps({k: v for k, v in values.items() if k not in keys} | {"kdcache": "0.0.7"})
        )

    return change


def with_scores(scores):
    def change(folder):
        values = json.loads((folder / "run.json").read_text())
        (folder / "run.json").write_text(json.dumps({**values, "scores": scores}))

    return change


@pytest.mark.parametrize(
    ("breaking", "reason"),
    [
        (broken_json, "not readable"),
        (deep_json, "nested too deeply"),
        (other_format, "not the record of a kdcache run"),
        (without("scores"), "written by kdcache 0.0.7, lacks scores"),
        (without("recipe", "cache_id"), "written by kdcache 0.0.7, lacks recipe, cache_id"),
        (with_scores([]), "lacks scores that are mappings"),
        (with_scores({"teacher": {"loss": 1, "perplexity": 2}}), "lacks scores of the student after training"),
        (with_scores({"student after": {"loss": "low"}}), "lacks loss of student after, perplexity of student after"),
        (lambda folder: (folder / "run.json").unlink(), "holds no finished run"),
    ],
)
@pytest.mark.parametrize("in_sweep", [True, False])
def test_a_broken_run_is_a_failed_row(tmp_path, breaking, reason, in_sweep):
    if in_sweep:
        paths = [make_sweep(tmp_path / "sweep", [("good", {}, 1.9), ("bad", {"loss.temperature": 1.0}, 1.8)])]
        broken = paths[0] / "row1"
    else:
        paths = [make_run(tmp_path / "good"), make_run(tmp_path / "bad", 1.8)]
        broken = paths[1]
    breaking(broken)
    with pytest.raises(TrainingError, match=reason):
        load_record(broken)
    lines = board(paths)
    assert names(lines) == [("good", ""), ("bad", "failed")]
    assert reason in lines[-1][1]["changed"].text


def test_another_version_is_read_where_nothing_needed_is_missing(tmp_path):
    make_run(
        tmp_path / "old", 1.7, kdcache="0.0.7", versions=None, hardware=None, steps=None, seconds=None, resumed_at=None
    )
    make_run(tmp_path / "new")
    lines = board([tmp_path / "old", tmp_path / "new"])
    assert names(lines) == [("old", ""), ("new", "")]
    assert (lines[2][1]["steps"].text, lines[2][1]["minutes"].text) == ("-", "-")


def test_a_diverged_row_is_shown_and_ranked_behind_the_others(tmp_path):
    make_run(tmp_path / "wild", float("nan"))
    make_run(tmp_path / "high", 690.0)
    make_run(tmp_path / "good")
    lines = read(write_report([tmp_path / "wild", tmp_path / "high", tmp_path / "good"], tmp_path / "out")).board()
    assert [line["student"]["text"] for line in lines[2:]] == ["good", "high", "wild"]
    assert lines[-1]["loss"]["text"] == "nan"


def test_a_broken_sweep_file_is_a_failed_row_and_its_runs_are_found(tmp_path):
    folder = example_sweep(tmp_path / "sweep")
    (folder / "sweep.json").write_text("{")
    lines = board([folder])
    assert names(lines) == [("row1", ""), ("row0", ""), ("row3", ""), ("row2", ""), ("sweep", "failed")]
    assert "sweep.json is not the record of a sweep" in lines[-1][1]["changed"].text


@pytest.mark.parametrize("folder", ["../elsewhere", "/etc", "", ".", "a/../../b", None, "x\0y", "\ud800"])
def test_a_row_does_not_leave_its_sweep(tmp_path, folder):
    sweep = make_sweep(tmp_path / "sweep", [("good", {}, 1.9)])
    make_run(tmp_path / "elsewhere", 1.0)
    values = json.loads((sweep / "sweep.json").read_text())
    values["rows"].append({**values["rows"][0], "name": "bad", "directory": folder})
    values["rows"] += ["nothing", {"state": []}]
    (sweep / "sweep.json").write_text(json.dumps(values))
    found = collect([sweep])
    assert [(row.name, row.state) for row in found.rows] == [
        ("good", "finished"),
        ("bad", "failed"),
        ("row 3", "failed"),
        ("row 4", "failed"),
    ]
    assert "does not lie in the sweep" in found.rows[1].reason


def test_states_of_a_sweep_that_is_under_way(tmp_path):
    sweep = make_sweep(tmp_path / "sweep", [("a", {}, 1.9), ("b", {}, 1.8), ("c", {}, None)])
    values = json.loads((sweep / "sweep.json").read_text())
    for row, state in zip(values["rows"], ("running", "dancing", "stopped"), strict=True):
        row["state"] = state
    values["rows"][0]["changes"] = {"loss.temperature": 3.0}
    (sweep / "sweep.json").write_text(json.dumps(values))
    a, b, c = collect([sweep]).rows
    assert (a.state, b.state, c.state) == ("finished", "failed", "stopped")
    assert "dancing" in b.reason
    assert a.notes == ["run.json was trained with another loss.temperature than sweep.json says"]


def test_what_cannot_be_read_beside_a_run_is_named(tmp_path):
    run = make_run(tmp_path / "run", log="step,loss\n1,abc\n")
    (run / "inference.json").write_text("[]")
    make_evaluation(run, 0.4, cache_id="f" * 64)
    [row] = collect([run]).rows
    assert row.state == "finished"
    assert len(row.notes) == 3
    assert row.evaluation.scores == {}
    text = text_of(run)
    assert "was measured with the cache ffffffffffff" in text


def test_parts_of_another_kind_are_left_out(tmp_path):
    run = make_run(tmp_path / "run")
    make_evaluation(
        run, 0.4, generation=[], tasks={"x": 3, "y": {"models": {"student after": {"value": "high"}}}},
        samples=[1, {"prompt": 2}, {"prompt": "p", "answers": {"student after": 3, "other": "x"}}],
    )  # fmt: skip
    [row] = collect([run]).rows
    assert (row.evaluation.tasks, row.evaluation.generation) == ((), ())
    assert [s.answers for s in row.evaluation.samples] == [{}]
    write_report([run])


def test_what_was_measured_of_an_earlier_training_is_left_out(tmp_path):
    sweep = example_sweep(tmp_path / "sweep")
    run = sweep / "row1"
    digest = record_digest(run)
    for name in ("evaluation.json", "inference.json"):
        values = json.loads((run / name).read_text())
        (run / name).write_text(json.dumps({**values, "run_sha256": digest}))
    row = collect([run]).rows[0]
    assert row.evaluation.tasks
    assert row.inference.rows
    assert row.notes == []
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {"steps": 101}))
    row = collect([run]).rows[0]
    assert (row.evaluation, row.inference) == (Evaluation(), Inference())
    assert [note.partition(":")[0] for note in row.notes] == [
        "evaluation.json is of an earlier training in this directory",
        "inference.json is of an earlier training in this directory",
    ]
    assert "0.420" not in text_of(run)


def test_an_interval_of_nothing_is_not_nothing(tmp_path):
    run = make_run(tmp_path / "run")
    models = {"student before": {"value": 0.0, "stderr": 0.0}, "student after": {"value": 0.4, "stderr": 0.1}}
    task = {"metric": "acc", "examples": 5, "shots": 0, "chat_template": False, "models": models}
    make_evaluation(run, 0.4, tasks={"arc": task})
    text = text_of(run)
    assert "| 0.000 ± 0.600 | 0.400 ± 0.196 |" in text
    # The one that `kdcache evaluate` shows.
    values = json.loads((run / "evaluation.json").read_text())
    assert task_table(values)[1][0][3:] == ("0.000 ±0.600", "0.400 ±0.196")


def test_figures_that_were_asked_for_in_two_ways_stand_in_two_columns(tmp_path):
    def task(value, **other):
        models = {"student after": {"value": value, "stderr": 0.01}}
        return {"metric": "acc", "examples": 1000, "shots": 0, "chat_template": False, "models": models, **other}

    runs = [make_run(tmp_path / name) for name in "abc"]
    for run, examples, budget, tasks in (
        (runs[0], 64, 32, {"arc": task(0.51), "piqa": task(0.6)}),
        (runs[1], 64, 8, {"arc": task(0.52, examples=5, chat_template=True), "piqa": task(0.61)}),
        (runs[2], 3, 32, {"arc": task(0.53, shots=5), "piqa": task(0.62)}),
    ):
        make_evaluation(run, 0.4, tasks=tasks)
        values = json.loads((run / "evaluation.json").read_text())
        values["generation"] |= {"examples": examples, "max_new_tokens": budget}
        (run / "evaluation.json").write_text(json.dumps(values))
    lines = {cells["student"].text: cells for _, cells in board(runs)}
    columns = {
        "arc (n = 1000, 0-shot, no chat)": ("0.510", "-", "-"),
        "arc (n = 5, 0-shot, chat)": ("-", "0.520", "-"),
        "arc (n = 1000, 5-shot, no chat)": ("-", "-", "0.530"),
        "piqa": ("0.600", "0.610", "0.620"),
        "ROUGE-L (n = 64, 32 tokens)": ("0.400", "-", "-"),
        "ROUGE-L (n = 64, 8 tokens)": ("-", "0.400", "-"),
        "retention % (n = 3, 32 tokens)": ("-", "-", "80.0"),
    }
    assert {name: tuple(lines[run][name].text for run in "abc") for name in columns} == columns
    assert "ROUGE-L" not in lines["a"]
    text = text_of(*runs)
    assert text.count("arc: acc, ") == 3
    assert "arc: acc, 5 examples, none shown first, through the chat template:" in text


def test_numbers_of_a_sweep_that_no_float_holds_are_refused(tmp_path):
    sweep = make_sweep(tmp_path / "sweep", [("good", {}, 1.9)], jobs=int("9" * 400))
    found = collect([sweep])
    assert [row.state for row in found.rows] == ["failed", "finished"]
    assert "lacks jobs" in found.rows[0].reason
    text_of(sweep)


@pytest.mark.parametrize("log", ["step,loss\n1,low\n", "epoch,loss\n1,2\n", "step,loss\n1,2,3\n"])
def test_a_damaged_log_is_an_error_of_ours(tmp_path, log):
    run = make_run(tmp_path / "run", log=log)
    with pytest.raises(TrainingError, match=r"log\.csv is damaged, so that loss\.png cannot be drawn"):
        write_pages(load_record(run))
    assert "student after" in (run / "table.md").read_text()


def test_pages_of_a_run_that_lacks_what_they_do_not_need(tmp_path):
    run = make_run(tmp_path / "run", steps=None, seconds=None, resumed_at=None)
    write_pages(load_record(run))
    assert "unknown steps, - s." in (run / "table.md").read_text()


def test_a_printed_command_trains_the_row_again(base_values, shared_cache, tmp_path):
    """Of a cache with a selection of its own, which the recipe does not name."""
    import kdcache.cli  # noqa: F401 (registers the commands)
    from kdcache.commands.app import app
    from kdcache.student.distill import distill

    values = copy.deepcopy(base_values)
    del values["selection"]
    values |= {"output": str(tmp_path / "run"), "cache": {"directory": str(shared_cache)}}
    values["training"] |= {"max_steps": 1, "batch_size": 2}
    first = distill(parse_recipe(values))
    assert first.values["selection"]["bytes_per_position"] != first.values["recipe"]["selection"]["bytes_per_position"]
    # The same row as a sweep has it: its base says what the recipe says, run.json all defaults besides.
    sweep = {
        "format": "kdcache-sweep",
        "recipe": values,
        "rows": [{"name": "A", "directory": "run", "state": "finished"}],
    }
    written = write_report([tmp_path / "run"])
    [alone] = bases(written.found)
    assert "selection" not in alone.recipe
    assert "selection is left out" in (tmp_path / "run/report/report.md").read_text()
    (tmp_path / "sweep.json").write_text(json.dumps(sweep))
    [base] = bases(collect([tmp_path]))
    assert base.changed(base.rows[0]) == alone.changed(alone.rows[0]) == {}
    _, *words = shlex.split(alone.command(alone.rows[0], str(tmp_path / "run/report")))
    app(words, standalone_mode=False)
    again = load_record(tmp_path / "run-again")
    assert again.scores == first.scores


def test_a_selection_that_the_cache_holds_stays_in_the_base(tmp_path):
    held = {"method": "threshold_sampling", "bytes_per_position": 32.0, "floors": [0.01, 0.02]}
    chosen = {"method": "threshold_sampling", "bytes_per_position": 32.0, "floors": None}
    make_run(tmp_path / "a", changes={"selection": chosen}, selection=held)
    make_run(tmp_path / "b", changes={"selection": {**chosen, "bytes_per_position": 64.0}}, selection=held)
    [stays], [goes] = (bases(collect([tmp_path / name])) for name in "ab")
    assert stays.recipe["selection"] == chosen
    assert stays.note == ""
    assert "selection" not in goes.recipe
    # A sweep of a version that wrote defaults into its base as well.
    changes = {"selection": {**chosen, "bytes_per_position": 64.0}, "loss.temperature": 3.0}
    sweep = make_sweep(tmp_path / "sweep", [("A1", {}, None)], recipe=recipe_with({"selection": changes["selection"]}))
    make_run(sweep / "row0", changes=changes, selection=held)
    values = json.loads((sweep / "sweep.json").read_text())
    values["rows"][0] |= {"state": "finished", "changes": {"loss.temperature": 3.0}}
    (sweep / "sweep.json").write_text(json.dumps(values))
    [base] = bases(collect([sweep]))
    assert "selection" not in base.recipe
    assert set(base.changed(base.rows[0])) == {"loss.temperature"}
    assert " selection" not in base.command(base.rows[0], "out")


def test_a_run_that_was_stopped_is_no_failure(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "run.json").unlink()
    (run / "started.json").write_text("{}")
    [row] = collect([run]).rows
    assert (row.state, len(row.log)) == ("stopped", 25)
    assert "--resume" in row.reason
    assert names(board([run])) == [("run", "open")]


def test_strings_of_a_stranger_stay_strings(tmp_path):
    sweep = hostile_sweep(tmp_path / "sweep")
    written = write_report([sweep])
    page = read(written)
    assert page.suspicious == []
    assert page.scripts == 1
    for path in written.files:
        if path.suffix == ".svg":
            assert not [
                e for e in ElementTree.fromstring(path.read_bytes()).iter() if e.tag.endswith(("script", "image"))
            ]
        if path.suffix in (".md", ".html"):
            text = path.read_text()
            assert "\x1b" not in text
            assert "\u202e" not in text
    text = next(p for p in written.files if p.suffix == ".md").read_text()
    outside_code = "\n".join(line for line in text.split("\n") if not line.startswith("    "))
    assert "<script" not in outside_code
    assert "<img" not in outside_code
    widths = {len(re.findall(r"(?<!\\)\|", line)) for line in outside_code.split("\n\n")[4].split("\n")}
    assert len(widths) == 1


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a|b", "a\\|b"), ("<b>", "&lt;b&gt;"), ("[x](y)", "\\[x\\](y)"), ("learning_rate=1e-05", "learning_rate=1e-05"),
        ("_x_ **y** `z`", "\\_x\\_ \\*\\*y\\*\\* \\`z\\`"), ("two\nlines", "two lines"), ("\x1b", "\\\\x1b"), ("&lt;", "&amp;lt;"),
    ],
)  # fmt: skip
def test_markdown_shows_text_as_it_is(text, shown):
    assert escaped(text) == shown


def test_runs_of_different_caches_are_said_not_to_compare(tmp_path):
    paths = [make_run(tmp_path / "a"), make_run(tmp_path / "b", 1.5, cache_id="d" * 64, tokens=900)]
    lines = [cells for _, cells in board(paths)]
    assert [cells["scored on"].text for cells in lines] == ["A", "B", "A", "B", "B", "A"]
    assert [cells["student"].text for cells in lines[:4]] == ["teacher (a)", "teacher (b)", "student before (a)", "student before (b)"]  # fmt: skip
    assert "comparable only within a set (A: a; B: b)" in text_of(*paths)
    assert "comparable" not in text_of(paths[0])


def test_a_real_cache_gives_its_size_and_its_validation_tokens(tmp_path, shared_cache):
    from kdcache.cache.reader import open_cache

    cache = open_cache(shared_cache)
    changes = {"cache.directory": str(shared_cache)}
    paths = [make_run(tmp_path / "a", cache_id=cache.id, changes=changes), make_run(tmp_path / "b", cache_id="e" * 64, changes=changes)]  # fmt: skip
    by_name = {cells["student"].text: cells for _, cells in board(paths)}
    size = sum(p.stat().st_size for p in (shared_cache / "shards").iterdir())
    positions = sum(s.positions for s in cache.plan.data.splits)
    assert by_name["a"]["bytes each"].value == size / positions
    assert by_name["b"]["bytes each"].text == "-"
    assert "another cache lies there now" in text_of(*paths)


def test_a_kl_of_another_cache_over_the_same_tokens_does_not_compare(tmp_path, shared_cache):
    from kdcache.cache.reader import open_cache
    from kdcache.cache.subset import subset

    cache = open_cache(shared_cache)
    subset(cache, tmp_path / "half", sequences=(0, len(cache["validation"])))
    paths = []
    for name, directory in (("whole", shared_cache), ("half", tmp_path / "half")):
        changes = {"cache.directory": str(directory)}
        paths.append(make_run(tmp_path / name / "run", cache_id=open_cache(directory).id, changes=changes))
    text = text_of(*paths)
    assert "the perplexities are over the same tokens" in text
    assert "scored on" not in text


def test_a_url_of_a_cache_is_not_fetched(tmp_path, monkeypatch):
    import socket

    monkeypatch.setattr(socket, "socket", lambda *_: pytest.fail("a report opened a connection"))
    run = make_run(tmp_path / "a", changes={"cache.directory": "https://example.invalid/cache"})
    assert "which a report does not read" in text_of(run)


def test_what_is_given_twice_counts_once(tmp_path):
    sweep = make_sweep(tmp_path / "sweep", [("A1", {}, 1.9)])
    found = collect([sweep / "row0", sweep, sweep / "row0", tmp_path / "sweep/../sweep"])
    assert [(row.name, row.sweep) for row in found.rows] == [("A1", 0)]
    make_run(tmp_path / "x/same")
    make_run(tmp_path / "y/same")
    names = [row.name for row in collect([tmp_path / "x/same", tmp_path / "y/same", sweep]).rows]
    assert names == [str(tmp_path / "x/same"), str(tmp_path / "y/same"), "example/A1"]


def test_paths_that_are_not_there_are_refused(tmp_path):
    run = make_run(tmp_path / "run")
    with pytest.raises(TrainingError, match="nowhere does not exist; expected run directories"):
        write_report([run, tmp_path / "nowhere"])
    with pytest.raises(TrainingError, match="is a file"):
        write_report([run / "run.json"])
    with pytest.raises(StorageError, match="is a file"):
        write_report([run], run / "run.json")
    assert not (run / "report").exists()


def test_thirty_rows_have_a_panel_each(tmp_path):
    rows = [
        (f"r{i}", {"loss.temperature": 1 + i % 5, "training.learning_rate": 10.0 ** -(i // 5)}, 1.5 + i / 50)
        for i in range(30)
    ]
    folder = make_sweep(tmp_path / "sweep", rows)
    document = write_report([folder]).document
    panels = {figure.name: len(figure.panels) for figure in document.figures()}
    assert panels == {"scores": 2, "training": 30, "evaluation": 1, "effects": 2}
    assert (folder / "report/report.html").stat().st_size < 3 << 20


def test_smoothing_takes_the_last_steps():
    steps = [1.0, 2.0, 12.0, 13.0]
    assert smoothed(steps, [1.0, 3.0, 5.0, 9.0], window=10) == [1.0, 2.0, 5.0, 7.0]
    assert smoothed([5.0, 10.0, 15.0], [1.0, 2.0, 3.0], window=10) == [1.0, 1.5, 2.5]


def test_the_command_needs_no_torch(tmp_path):
    folder = example_sweep(tmp_path / "sweep")
    code = (
        "import sys\nfrom kdcache.cli import main\ntry:\n    main()\nexcept SystemExit as exc:\n    assert not exc.code, exc.code\n"
        "print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, "report", str(folder)], capture_output=True, text=True, check=True
    )
    out = run.stdout
    assert out.rstrip().endswith("[]")
    assert "A5 failed: the loss is not a number since step 12" in out
    assert "report.html" in out
    assert "6.125" in out
    failed = subprocess.run(
        [sys.executable, "-m", "kdcache", "report", str(tmp_path / "no")], capture_output=True, text=True, check=False
    )
    assert failed.returncode == 2
    assert failed.stderr.startswith("error: ")
    assert len(failed.stderr.splitlines()) == 1


def test_a_single_run_is_a_report_too(tmp_path):
    run = make_run(tmp_path / "run")
    written = write_report([run])
    assert [line["student"]["text"] for line in read(written).board()] == ["teacher", "student before", "run"]
    assert (
        yaml.safe_load((run / "report/recipe.yaml").read_text()) == json.loads((run / "run.json").read_text())["recipe"]
    )
    assert CACHE_ID in (run / "report/report.md").read_text()


def test_an_evaluation_that_disagrees_with_the_run_is_told(tmp_path):
    run = make_run(tmp_path / "run", 1.9)
    make_evaluation(run, 0.4)
    assert collect([run]).rows[0].notes == []
    values = json.loads((run / "evaluation.json").read_text())
    values["scores"]["student after"]["loss"] = 1.8
    (run / "evaluation.json").write_text(json.dumps(values))
    assert collect([run]).rows[0].notes == [
        "evaluation.json measured the loss 1.8000, run.json has 1.9000: evaluate it again"
    ]


@pytest.mark.parametrize(
    "log",
    ["step,loss\n1,2,3,4\n", "\0\n1", "step\n" + "1" * 200_000, "step,loss\n1,low\n", b"\xff\xfe\x00"],
)
def test_a_log_that_is_none_is_named_and_left_out(tmp_path, log):
    run = make_run(tmp_path / "run")
    (run / "log.csv").write_bytes(log if isinstance(log, bytes) else log.encode())
    [row] = collect([run]).rows
    assert (row.state, row.log) == ("finished", [])


def test_rows_with_odd_directories_do_not_stop_the_report(tmp_path):
    sweep = make_sweep(tmp_path / "sweep", [("long", {}, None), ("loop", {}, None), ("good", {}, 1.9)])
    values = json.loads((sweep / "sweep.json").read_text())
    values["rows"][0]["directory"] = "x" * 5000
    values["rows"][0]["state"] = values["rows"][1]["state"] = "finished"
    (sweep / "sweep.json").write_text(json.dumps(values))
    (sweep / "row1").symlink_to(sweep / "row1")
    assert [(row.name, row.state) for row in collect([sweep]).rows] == [
        ("long", "failed"),
        ("loop", "failed"),
        ("good", "finished"),
    ]
