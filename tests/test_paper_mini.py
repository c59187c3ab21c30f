"""``benchmarks/paper_mini.py``: verdicts follow the numbers, and the whole of it runs at toy size."""

import json
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
TEACHER, BEFORE = 2.0, 3.0


@pytest.fixture(scope="module", autouse=True)
def _findable():
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(str(BENCHMARKS))
    yield
    patch.undo()


def scores(loss, kl, tokens=100):
    return {"loss": loss, "perplexity": 2.718281828**loss, "kl_to_teacher": kl, "tokens": tokens}


def results(**losses):
    """Finished rows with these losses and KLs of a tenth of them; main rows by a list, one for each seed."""
    from paper_mini_page import SEEDS, Results, Row

    rows = {}
    for name, given in losses.items():
        for seed, loss in zip(SEEDS, given if isinstance(given, list) else [given], strict=False):
            short = name == "A6"
            training = {
                "learning_rate": 1e-3 if name == "A5" else 2e-3,
                "clip": 20.0,
                "max_length": 256 if short else None,
            }
            values = {
                "scores": {
                    "student before": scores(BEFORE, 1.0),
                    "student after": scores(loss, loss / 10),
                    "teacher": scores(TEACHER, 0.0, 90 if short else 100),
                },
                "recipe": {
                    "training": {**training, "epochs": 1},
                    "loss": {"temperature": 2.0, "ce_weight": 0.5, "kd_weight": 0.5},
                    "data": {"max_length": 512},
                },
                "cache_id": "abc",
                "seconds": 60.0,
            }
            log = [{"step": step, "grad_norm": norm} for step, norm in ((1, 1.0), (2, 1.0), (3, 10 * loss))]
            rows[name + seed] = Row(name + seed, values, log)
    return Results(rows, {}, {"id": "abc", "bytes": 640, "positions": 10}, None)


BASE = {
    "A1": [2.50, 2.51, 2.49], "sum": [2.6, 2.7, 2.55], "CE": [2.52, 2.53, 2.505], "A2": 2.6, "A3": 2.5, "A4": 2.495, "A5": 2.3, "A6": 2.5,
    "sum of KL alone": 2.8,
}  # fmt: skip
VERDICTS = {
    "1a": "holds", "1b": "holds", "1c": "holds", "2": "holds", "3": "**does not hold**", "4": "holds", "5": "holds", "6": "holds", "7a": "holds",
    "7b": "holds",
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "verdicts"),
    [
        ({}, {}),
        # Of ranges of three seeds only great differences count.
        ({"sum": [2.505, 2.515, 2.495]}, {"1c": "undecided"}),
        # Two seeds of three are no verdict; against all three is one.
        ({"CE": [2.52, 2.53, 2.48]}, {"7a": "undecided", "7b": "undecided"}),
        ({"CE": [2.4, 2.4, 2.4]}, {"7a": "**does not hold**", "7b": "**does not hold**"}),
        ({"sum": [2.4, 2.4, 2.4]}, {"1a": "**does not hold**", "1c": "**does not hold**"}),
        ({"A1": [1.9, 1.91, 1.92]}, {"3": "holds", "4": "**does not hold**"}),
        ({"A1": [1.9, 1.91, 2.2]}, {"3": "undecided", "4": "**does not hold**", "1c": "undecided"}),
        ({"A1": [2.95, 2.96, 2.94]}, {"1a": "**does not hold**", "1b": "**does not hold**", "1c": "undecided", "2": "**does not hold**", "5": "**does not hold**", "7a": "**does not hold**", "7b": "**does not hold**"}),
        ({"sum of KL alone": 2.505}, {"1b": "undecided"}),
        ({"A5": 2.505}, {"4": "undecided"}),
        ({"A5": 2.6}, {"4": "**does not hold**"}),
        ({"A2": 2.4}, {"5": "**does not hold**"}),
        ({"A6": 3.1}, {"6": "**does not hold**"}),
    ],
)  # fmt: skip
def test_verdicts_follow_the_numbers(changes, verdicts):
    from paper_mini_page import claims

    found = {number: verdict for number, _, verdict, _ in claims(results(**(BASE | changes)))}
    assert found == VERDICTS | verdicts


@pytest.mark.parametrize(
    ("lacking", "not_judged"),
    [
        ("A5", {"4"}),
        ("A6", {"6"}),
        ("sum", {"1a", "1c"}),
        ("sum of KL alone", {"1b"}),
        ("CE", {"7a", "7b"}),
        ("A3", {"5"}),
    ],
)
def test_a_row_that_is_not_there_is_no_verdict(lacking, not_judged):
    from paper_mini_page import claims

    found = {
        number: verdict for number, _, verdict, _ in claims(results(**{k: v for k, v in BASE.items() if k != lacking}))
    }
    assert {number for number, verdict in found.items() if verdict == "not judged"} == not_judged
    # One seed of three is as good as none.
    one = results(**(BASE | {"CE": [2.6]}))
    assert {v for n, _, v, _ in claims(one) if n.startswith("7")} == {"not judged"}


def test_measured_numbers_stand_in_the_verdicts():
    from paper_mini_page import claims

    text = {number: measured for number, _, _, measured in claims(results(**BASE))}
    assert "difference -0.0018 (-0.0020 to -0.0015)" in text["7b"]
    assert "0.2500 (0.2490 to 0.2510) against 0.2518 (0.2505 to 0.2530)" in text["7b"]
    assert "50.0% (49.0% to 51.0%) of the way" in text["2"]
    assert "0.0200 against 0.1500" in text["1c"]
    # The third step of each.
    assert text["1c"].endswith("33.3% of A1's steps were clipped")
    assert "25.0 (24.9 to 25.1) against 26.2 (25.5 to 27.0)" in text["1c"]


def test_missing_models_are_named(capsys, tmp_path):
    from paper_mini import main

    with pytest.raises(SystemExit) as exit_:
        main(["--data", str(tmp_path / "no.jsonl.gz"), "--teacher", str(tmp_path), "--student", str(tmp_path / "none")])
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert "--data (found nothing at" in error
    assert "--student (found nothing at" in error
    assert "--teacher (" not in error


def test_a_score_at_full_length_is_of_the_row_that_lies_there(base_values, shared_cache, tmp_path, monkeypatch):
    from paper_mini import at_full_length

    import kdcache.models
    import kdcache.student.assembly
    from kdcache.evaluate import perplexity

    scored = []

    class Score:
        def as_record(self):
            return {"loss": float(len(scored))}

    monkeypatch.setattr(kdcache.student.assembly, "load_student", lambda *args: None)
    monkeypatch.setattr(kdcache.models, "load_adapter", lambda *args, **options: None)
    monkeypatch.setattr(perplexity, "student_score", lambda *args, **options: scored.append(args) or Score())
    run, kept = tmp_path / "A6", tmp_path / "full-length.json"
    assert at_full_length(run, kept) is None
    run.mkdir()
    recipe = {**base_values, "cache": {"directory": str(shared_cache)}}
    record = {"format": "kdcache-run", "recipe": recipe, "cache_id": "c", "scores": {"student after": scores(2.0, 0.1)}}
    (run / "run.json").write_text(json.dumps(record))
    # What an earlier version kept does not say of what it is.
    kept.write_text(json.dumps({"loss": 9.0}))
    assert [at_full_length(run, kept) for _ in range(2)] == [{"loss": 1.0}] * 2
    (run / "run.json").write_text(json.dumps({**record, "steps": 3}))
    assert [at_full_length(run, kept) for _ in range(2)] == [{"loss": 2.0}] * 2


def test_the_whole_runs_at_toy_size(models, tmp_path, capfd):
    from paper_mini import main

    options = [
        "--quick", "--jobs", "1", "--data", str(models / "train.jsonl"), "--teacher", str(models / "teacher"), "--student",
        str(models / "student"), "--output", str(tmp_path / "out"), "--page", str(tmp_path / "page.md"),
    ]  # fmt: skip
    main(options)
    page = (tmp_path / "page.md").read_text()
    assert "did not finish" not in page
    assert [line.split(" | ")[0] for line in page.splitlines() if line.startswith("| A")] == 2 * [
        f"| A{i}" for i in range(1, 7)
    ] + ["| A6 on whole sequences"]
    for number in (1, 2, 3):
        assert f"(page-{number}.png)" in page
        assert (tmp_path / f"page-{number}.png").read_bytes()[1:4] == b"PNG"
    rows = json.loads((tmp_path / "out" / "sweep" / "sweep.json").read_text())["rows"]
    records = {
        r["name"]: json.loads((tmp_path / "out" / "sweep" / r["directory"] / "run.json").read_text()) for r in rows
    }
    # Rows that are compared by seed have equal seeds and steps; what differs is what should.
    for name in ("A1", "sum", "CE"):
        found = [records[name + seed] for seed in ("", " seed 1", " seed 2")]
        assert [r["recipe"]["seed"] for r in found] == [0, 1, 2]
        assert {r["steps"] for r in found} == {2}
    losses = {name: r["scores"]["student after"]["loss"] for name, r in records.items()}
    assert len(set(losses.values())) == len(losses) == 15
    assert f"{losses['A1']:.4f}" in page
    assert {r["cache_id"] for r in records.values()} == {records["A1"]["cache_id"]}
