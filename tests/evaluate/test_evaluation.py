import copy
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch

from kdcache.commands import app
from kdcache.errors import CacheError, DataError, KdcacheError, ModelError, TrainingError
from kdcache.evaluate import cached_teacher, saved_run
from kdcache.evaluate.by_sequence import SequenceSums, teacher_errors
from kdcache.evaluate.evaluation import Wanted, evaluate
from kdcache.evaluate.results import earlier_results, write_results
from kdcache.evaluate.saved_run import Students, open_saved_run, score_saved_run
from kdcache.evaluate.tables import leaderboard, score_table, task_table, write_page
from kdcache.intervals import width_of
from kdcache.paired import Losses, difference, difference_text, ratio_error, read_losses, write_losses
from kdcache.progress import Silent
from kdcache.recipe import parse_recipe
from kdcache.run_record import AFTER, BEFORE, TEACHER, record_digest
from kdcache.student.collate import Collator
from kdcache.student.distill import distill
from kdcache.student.forward import loss_sums


class Heard(Silent):
    def __init__(self):
        self.warnings = []

    def warning(self, text):
        self.warnings.append(text)


@pytest.fixture(scope="module")
def sweep(base_values, shared_cache, tmp_path_factory):
    """Two QLoRA students (dropout, bf16) of one base, and a fully trained one, each in a directory below this one."""
    folder = tmp_path_factory.mktemp("sweep")
    nf4 = {"quantization": "nf4", "dtype": "bfloat16", "lora": {"dropout": 0.2}}
    for name, student, training in (
        ("a", nf4, {"precision": "bf16", "learning_rate": 1e-2}),
        ("b", nf4, {"precision": "bf16", "learning_rate": 3e-3, "batch_size": 8}),
        ("full", {"lora": None}, {"learning_rate": 1e-3}),
    ):
        values = copy.deepcopy(base_values)
        values["output"] = str(folder / name)
        values["cache"]["directory"] = str(shared_cache)
        values["student"] |= student
        values["training"] |= training
        distill(parse_recipe(values))
    return folder


@pytest.fixture
def run(sweep, tmp_path):
    """A copy of one run that a test may change."""
    return shutil.copytree(sweep / "a", tmp_path / "a", ignore=shutil.ignore_patterns("evaluation.*"))


def scores_of(path):
    return json.loads((path / "run.json").read_text())["scores"]


def test_evaluate_gives_what_the_training_wrote_down(sweep):
    runs = [sweep / name for name in ("a", "full", "b")]
    found = {e.run.name: e.values["scores"] for e in evaluate(runs)}
    for path in runs:
        for model, score in scores_of(path).items():
            assert {key: found[path.name][model][key] for key in score} == score, (path.name, model)
    assert found["a"][AFTER]["loss"] != found["b"][AFTER]["loss"] != found["full"][AFTER]["loss"]
    assert score_saved_run(sweep / "b").scores == scores_of(sweep / "b")


def test_runs_that_share_a_student_load_it_once(sweep, monkeypatch):
    loaded = []

    def counted(student, saved=None, original=saved_run.load_student):
        loaded.append((student.quantization, saved is None))
        return original(student, saved)

    monkeypatch.setattr(saved_run, "load_student", counted)
    done = list(evaluate([sweep / "a", sweep / "full", sweep / "b"]))
    assert sorted(loaded) == [("nf4", True), ("none", False), ("none", True)]
    # One base after the other, and every run's own results.
    assert [e.run.name for e in done] == ["a", "b", "full"]


def test_an_adapter_leaves_nothing_behind(sweep):
    runs = {name: open_saved_run(sweep / name) for name in "ab"}
    ids = torch.arange(5, 25)[None]
    students, logits = Students(), {}
    for name in "abab":
        with students.before(runs[name]) as model, torch.inference_mode():
            logits.setdefault("before", []).append(model(input_ids=ids).logits)
        with students.after(runs[name]) as model, torch.inference_mode():
            logits.setdefault(name, []).append(model(input_ids=ids).logits)
    for several in logits.values():
        assert all(torch.equal(several[0], other) for other in several)
    assert not torch.equal(logits["a"][0], logits["b"][0])
    assert not torch.equal(logits["a"][0], logits["before"][0])


def test_top_1_is_the_share_of_rows_whose_largest_entry_the_student_would_say(sweep):
    (done,) = evaluate([sweep / "full"])
    run = open_saved_run(sweep / "full")
    same, losses, tokens = [], [], []
    with Students().after(run) as model, torch.inference_mode():
        for sequence in run.validation:
            logits = model(input_ids=torch.from_numpy(sequence.token_ids.astype(np.int64))[None]).logits[0]
            places = np.flatnonzero(sequence.targets) - 1
            log_p = torch.log_softmax(logits[places].float(), dim=1)
            labels = torch.from_numpy(sequence.token_ids[sequence.targets].astype(np.int64))
            losses.append(-float(log_p.gather(1, labels[:, None]).sum()))
            tokens.append(len(labels))
            for row, said in enumerate(logits[places].argmax(dim=1).tolist()):
                span = slice(*sequence.rows.head_offsets[[row, row + 1]])
                entries = sequence.rows.head_ids[span]
                same.append(said == entries[sequence.rows.head_logits[span].argmax()])
    score = done.values["scores"][AFTER]
    assert score["top_1_agreement"] == pytest.approx(np.mean(same), abs=1e-9)
    assert 0 < score["top_1_agreement"] < 1
    assert score["stderr"] == pytest.approx(ratio_error(np.array(losses), np.array(tokens)), rel=1e-4)
    assert done.values["scores"][TEACHER]["top_1_agreement"] == 1
    assert done.values["scores"][TEACHER]["stderr"] == teacher_errors(run.validation, None)["stderr"] > 0


def test_rows_without_entries_are_not_compared(sweep):
    run = open_saved_run(sweep / "full")
    split = run.validation
    with Students().after(run) as model:
        whole, emptied = SequenceSums(model, run.cache.vocab_size), SequenceSums(model, run.cache.vocab_size)
        none = SequenceSums(model, run.cache.vocab_size)
        for sums, keep in ((whole, lambda n: np.ones(n, bool)), (emptied, lambda n: np.arange(n) % 2 == 0),
                           (none, lambda n: np.zeros(n, bool))):  # fmt: skip
            sequences = [(i, replace(s, rows=s.rows.emptied(keep(len(s.rows))))) for i, s in enumerate(split)]
            batch = Collator(run.cache.plan.tokenizer.pad_id, 1.0)(sequences)
            with sums.listening(), torch.inference_mode():
                found = loss_sums(
                    model, model, batch, vocab_size=run.cache.vocab_size, temperature=1.0, ce_weight=1.0, kd_weight=1.0
                )
                sums(batch, found)
    kept = sum((len(s.rows) + 1) // 2 for s in split)
    assert sum(row[4] for row in emptied._sums.values()) == kept
    assert sum(row[4] for row in whole._sums.values()) == split.summary.positions
    assert none.as_record()["top_1_agreement"] is None
    assert none.as_record()["stderr"] == pytest.approx(whole.as_record()["stderr"], rel=1e-5)


def test_standard_errors_are_those_of_clusters():
    rng = np.random.default_rng(0)
    values = rng.normal(size=400)
    # Clusters of one are plain samples; the same value four times over is no more knowledge than once.
    plain = values.std(ddof=1) / 20
    assert ratio_error(values, np.ones(400)) == pytest.approx(plain)
    assert ratio_error(4 * values, np.full(400, 4.0)) == pytest.approx(plain)
    # Against the bootstrap, for clusters of different size.
    sizes = rng.integers(1, 30, 400).astype(float)
    sums = sizes * (1 + values)
    draws = rng.integers(0, 400, (4000, 400))
    assert ratio_error(sums, sizes) == pytest.approx((sums[draws].sum(1) / sizes[draws].sum(1)).std(), rel=0.05)
    assert ratio_error(np.ones(1), np.ones(1)) is None


def test_parts_are_kept_until_they_are_measured_again(run):
    (first,) = evaluate([run], Wanted(generate=3, samples=2, max_new_tokens=6))
    assert first.measured == ("scores", "generation", "samples")
    assert set(first.values["generation"]["models"]) == {BEFORE, AFTER, TEACHER}
    assert [set(s["answers"]) for s in first.values["samples"]] == [{BEFORE, AFTER, TEACHER}] * 2
    (second,) = evaluate([run])
    assert {k: v for k, v in second.values.items() if k != "scores"} == {
        k: v for k, v in first.values.items() if k != "scores"
    }
    assert json.loads((run / "evaluation.json").read_text()) == second.values
    (third,) = evaluate([run], Wanted(samples=1, max_new_tokens=2))
    assert len(third.values["samples"]) == 1
    assert third.values["generation"] == first.values["generation"]
    write_page(third)
    page = (run / "evaluation.md").read_text()
    assert "ROUGE-L" in page
    assert "**reference**" in page
    # Trained again in the same place: what was measured of the other student is no longer true.
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {"steps": 1}))
    heard = Heard()
    (fourth,) = evaluate([run], progress=heard)
    assert set(fourth.values) == {"format", "kdcache", "cache_id", "run_sha256", "scores"}
    assert "earlier training" in heard.warnings[0]


@pytest.fixture
def no_model(monkeypatch):
    """Fails the test when a model is loaded."""

    def load(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(saved_run, "load_student", load)
    monkeypatch.setattr(cached_teacher, "load_model", load)


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("text", ["{", "[]", '{"format": "other"}'])
def test_an_evaluation_that_cannot_be_read_is_not_written_over(run, text):
    (run / "evaluation.json").write_text(text)
    with pytest.raises(TrainingError, match=r"evaluation\.json .*(not readable|no|not an evaluation)"):
        list(evaluate([run]))
    assert (run / "evaluation.json").read_text() == text


@pytest.mark.usefixtures("no_model")
def test_a_recipe_of_another_version_is_refused_by_key(run):
    record = json.loads((run / "run.json").read_text())
    record["recipe"]["loss"]["sharpness"] = 3
    (run / "run.json").write_text(json.dumps(record | {"kdcache": "7.1"}))
    with pytest.raises(
        TrainingError, match=r"a is a run directory of kdcache 7\.1.*unknown recipe key loss\.sharpness"
    ):
        list(evaluate([run]))


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("name", "lacking"),
    [
        ("a", "model/adapter_model.safetensors"),
        ("a", "model/adapter_config.json"),
        ("full", "model/model.safetensors"),
        ("a", "model"),
    ],
)
def test_a_saved_student_that_is_gone_is_found_before_the_teacher_answers(sweep, tmp_path, name, lacking):
    run = shutil.copytree(sweep / name, tmp_path / "run")
    (run / lacking).rename(tmp_path / "gone")
    with pytest.raises(ModelError, match=r"is not whole: it lacks|no saved student"):
        list(evaluate([sweep / "b", run], Wanted(generate=2)))


@pytest.mark.usefixtures("no_model")
def test_a_base_or_a_part_of_the_weights_that_is_gone_is_found_as_well(sweep, run, tmp_path):
    record = json.loads((run / "run.json").read_text())
    record["recipe"]["student"]["model"] = str(tmp_path / "gone" / "base")
    (run / "run.json").write_text(json.dumps(record))
    with pytest.raises(ModelError, match="gone/base does not exist"):
        list(evaluate([run], Wanted(generate=2)))
    whole = shutil.copytree(sweep / "full", tmp_path / "whole")
    index = whole / "model" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}))
    with pytest.raises(ModelError, match=r"lacks model-2\.safetensors"):
        list(evaluate([whole], Wanted(generate=2)))
    index.write_text("[]")
    with pytest.raises(ModelError, match="is not readable"):
        list(evaluate([whole], Wanted(generate=2)))


def parts(**tasks):
    return {"scores": {}, **({"tasks": tasks} if tasks else {})}


def test_evaluations_at_the_same_time_lose_nothing(run):
    """Both read the run at the start, and write long afterwards."""
    digest, heard = record_digest(run), Heard()
    assert earlier_results(run, digest, heard) == {}
    for name in ("arc", "piqa"):
        write_results(run, digest, "c", parts(**{name: {"examples": 5}}), heard)
    write_results(run, digest, "c", parts() | {"generation": {"examples": 1}, "samples": []}, heard)
    values = write_results(run, digest, "c", parts(), heard)
    assert json.loads((run / "evaluation.json").read_text()) == values
    assert set(values["tasks"]) == {"arc", "piqa"}
    assert values["generation"] == {"examples": 1}
    # At the very same moment as well.
    names = [f"task {i}" for i in range(24)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: write_results(run, digest, "c", parts(**{name: {}}), heard), names))
    assert set(json.loads((run / "evaluation.json").read_text())["tasks"]) == {"arc", "piqa", *names}
    assert heard.warnings == []


def test_an_evaluation_is_of_the_training_that_it_began_with(run):
    digest, heard = record_digest(run), Heard()
    write_results(run, digest, "c", parts(arc={}), heard)
    (run / "evaluation.json").write_text("{")
    write_results(run, digest, "c", parts(piqa={}), heard)
    assert (run / "evaluation.json.unreadable").read_text() == "{"
    assert "moved to evaluation.json.unreadable" in heard.warnings[0]
    kept = (run / "evaluation.json").read_bytes()
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {"steps": 1}))
    with pytest.raises(TrainingError, match="trained again while it was evaluated"):
        write_results(run, digest, "c", parts(), heard)
    assert (run / "evaluation.json").read_bytes() == kept


@pytest.mark.parametrize("directory", ["../victim", "/tmp", "a/../../victim", "."])
def test_a_sweep_does_not_send_an_evaluation_elsewhere(tmp_path, directory):
    rows = [{"name": "A", "directory": directory, "state": "finished"}]
    (tmp_path / "sweep.json").write_text(json.dumps({"format": "kdcache-sweep", "rows": rows}))
    with pytest.raises(TrainingError, match="does not lie in the sweep"):
        saved_run.run_directories([tmp_path])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--task-data", "x", "--limit", "3"], "--task-data goes with --tasks"),
        (["--limit", "3"], "--limit goes with --tasks"),
        (["--chat-template", "--generate", "2"], "--chat-template goes with --tasks"),
        (["--tasks", ","], "names no task"),
        (["--max-new-tokens", "3"], "--max-new-tokens goes with --generate or --samples"),
        (["--max-new-tokens", "3", "--tasks", "arc"], "--max-new-tokens goes with --generate or --samples"),
        (["--teacher", "nowhere"], "--teacher goes with --generate, --samples or --tasks"),
    ],
)
def test_options_that_would_do_nothing_are_refused(tmp_path, options, message):
    import kdcache.cli  # noqa: F401 (registers the commands)

    with pytest.raises(KdcacheError, match=message):
        app.app(["evaluate", str(tmp_path), *options], standalone_mode=False)


def test_a_cache_that_moved_is_named(run, shared_cache, tmp_path, no_model, monkeypatch):
    record = json.loads((run / "run.json").read_text())
    record["recipe"]["cache"]["directory"] = str(tmp_path / "gone")
    (run / "run.json").write_text(json.dumps(record))
    with pytest.raises(CacheError, match=r"cache of .* is not at .*gone; say where it lies with --cache"):
        list(evaluate([run]))
    other = json.loads((run / "run.json").read_text()) | {"cache_id": "0" * 64}
    (run / "run.json").write_text(json.dumps(other))
    with pytest.raises(TrainingError, match="was trained from cache 000000000000"):
        list(evaluate([run], Wanted(cache=str(shared_cache))))
    (run / "run.json").write_text(json.dumps(record))
    monkeypatch.undo()
    (done,) = evaluate([run], Wanted(cache=str(shared_cache)))
    assert done.values["scores"][AFTER]["loss"] == record["scores"][AFTER]["loss"]


def test_a_sweep_stands_for_its_finished_rows(sweep, tmp_path, no_model):
    def write(*states):
        rows = [
            {"name": name.upper(), "directory": name, "state": state, "error": None, "changes": {}, "seconds": 1.0}
            for name, state in zip(("a", "b", "full"), states, strict=True)
        ]
        (sweep / "sweep.json").write_text(json.dumps({"format": "kdcache-sweep", "rows": rows}))

    heard = Heard()
    try:
        write("finished", "failed", "finished")
        assert saved_run.run_directories([sweep, sweep / "a"], heard) == [sweep / "a", sweep / "full"]
        assert "B (failed)" in heard.warnings[0]
        write("failed", "waiting", "stopped")
        with pytest.raises(TrainingError, match="no finished row"):
            list(evaluate([sweep]))
        (sweep / "sweep.json").write_text('{"format": "kdcache-sweep", "rows": [{}]}')
        with pytest.raises(TrainingError, match="not the record of a sweep"):
            list(evaluate([sweep]))
    finally:
        (sweep / "sweep.json").unlink()
    with pytest.raises(TrainingError, match="holds no finished run"):
        list(evaluate([tmp_path]))


def test_a_teacher_that_is_gone_is_left_out_with_one_warning(run, models, tmp_path, monkeypatch):
    record = json.loads((run / "run.json").read_text())
    record["recipe"]["teacher"]["model"] = str(tmp_path / "gone" / "teacher")
    (run / "run.json").write_text(json.dumps(record))
    heard = Heard()
    (done,) = evaluate([run], Wanted(generate=2, max_new_tokens=2), heard)
    assert len(heard.warnings) == 1
    assert heard.warnings[0].startswith("the teacher is left out: the model folder")
    assert set(done.values["generation"]["models"]) == {BEFORE, AFTER}
    assert "retention" not in done.values["generation"]
    (done,) = evaluate([run], Wanted(generate=2, max_new_tokens=2, teacher=str(models / "teacher")))
    assert TEACHER in done.values["generation"]["models"]
    monkeypatch.setattr(saved_run, "load_student", None)
    with pytest.raises(CacheError, match="student is not the teacher of"):
        list(evaluate([run], Wanted(generate=2, teacher=str(models / "student"))))


@pytest.mark.usefixtures("no_model")
def test_tasks_are_looked_at_before_a_model_is_loaded(run, tmp_path):
    with pytest.raises(DataError, match=r"no file .*gsm8k/test\.jsonl\.gz; --task-data"):
        list(evaluate([run], Wanted(tasks=("gsm8k",), task_data=tmp_path)))


def test_tasks_of_several_calls_are_kept_together(run, tmp_path):
    question = {"question": "What is 1 plus 1?", "answer": "#### 2"}
    for name in ("test", "train"):
        (tmp_path / "gsm8k").mkdir(exist_ok=True)
        (tmp_path / "gsm8k" / f"{name}.jsonl").write_text((json.dumps(question) + "\n") * 8)
    (first,) = evaluate([run], Wanted(tasks=("gsm8k",), task_data=tmp_path, limit=3, chat_template=True))
    assert first.values["tasks"]["gsm8k"]["examples"] == 3
    assert set(first.values["tasks"]["gsm8k"]["models"]) == {BEFORE, AFTER, TEACHER}
    (second,) = evaluate([run], Wanted(tasks=("gsm8k_8shot",), task_data=tmp_path, limit=1))
    assert second.tasks == ("gsm8k_8shot",)
    assert second.values["tasks"]["gsm8k"] == first.values["tasks"]["gsm8k"]
    assert second.values["tasks"]["gsm8k_8shot"]["shots"] == 8
    # The page says which of them went through the chat template; the printed table holds the new ones alone.
    assert [row[0] for row in task_table(second.values)[1]] == ["gsm8k, chat", "gsm8k_8shot"]
    assert [row[0] for row in task_table(second.values, second.tasks)[1]] == ["gsm8k_8shot"]


def test_the_command_prints_what_it_measured(sweep, capsys):
    import kdcache.cli  # noqa: F401 (registers the commands)

    app.app(
        ["evaluate", str(sweep / "a"), str(sweep / "b"), "--generate", "3", "--samples", "1", "--max-new-tokens", "4"],
        standalone_mode=False,
    )
    out = capsys.readouterr().out
    for expected in ("top-1", "ROUGE-L", "retained after", "[1]", "reference:", "student before:", "ROUGE-L kept"):
        assert expected in out
    assert f"{scores_of(sweep / 'b')[AFTER]['loss']:.4f}" in out
    assert (sweep / "a" / "evaluation.md").exists()


def test_tables_take_figures_that_are_missing(run):
    (done,) = evaluate([run])
    done.values["scores"][AFTER] |= {"stderr": None, "top_1_agreement": None, "top_1_stderr": None}
    _, rows = score_table(done.values)
    assert rows[1][2] == rows[1][5] == "-"
    assert leaderboard([done])[1][0][5:] == ("-", "-")
    # Generations of another call may have answered other prompts: only new ones stand beside each other.
    done.values["generation"] = {"retention": {"rouge_l": 50.0}}
    assert leaderboard([done])[1][0][6] == "-"
    assert leaderboard([replace(done, measured=("scores", "generation"))])[1][0][6] == "50.0 %"


def test_a_difference_is_surer_than_the_losses_that_it_is_of(tmp_path):
    rng = np.random.default_rng(1)
    tokens = rng.integers(5, 60, 200)
    hard = rng.normal(2, 0.8, 200)
    for name, worse in (("a", 0.0), ("b", 0.05), ("c", 0.0)):
        (tmp_path / name).mkdir()
        nats = tokens * (hard + worse + rng.normal(0, 0.05, 200) * (name != "a"))
        write_losses(tmp_path / name, {AFTER: {i: (n, x) for i, (n, x) in enumerate(zip(tokens, nats, strict=True))}})
    a, b, c = (read(tmp_path / name) for name in "abc")
    apart = difference(b, a, AFTER)
    plain = b.nats_S[AFTER].sum() / tokens.sum() - a.nats_S[AFTER].sum() / tokens.sum()
    assert apart.value == pytest.approx(plain)
    assert apart.sure
    assert apart.margin < 0.15 * 1.96 * ratio_error(a.nats_S[AFTER], tokens)
    # Against the bootstrap of the difference itself.
    draws = rng.integers(0, 200, (4000, 200))
    differences = (b.nats_S[AFTER] - a.nats_S[AFTER])[draws].sum(1) / tokens[draws].sum(1)
    assert apart.margin == pytest.approx(1.96 * differences.std(), rel=0.1)
    assert abs(difference(c, a, AFTER).value) < apart.value / 2
    assert difference(a, a, AFTER).value == 0
    assert not difference(a, a, AFTER).sure
    assert difference_text(None) == "-"
    assert difference_text(apart).startswith("+0.0")


@pytest.mark.parametrize("sequences", [2, 3, 5, 30])
def test_intervals_of_few_sequences_are_as_wide_as_they_have_to_be(sequences):
    rng = np.random.default_rng(2)
    tokens = np.full(sequences, 10.0)
    inside = 0
    for apart in rng.normal(0.3, 1, (4000, sequences)):
        best, other = (Losses(tuple(range(sequences)), tokens, {AFTER: x}) for x in (np.zeros(sequences), 10 * apart))
        found = difference(other, best, AFTER)
        inside += abs(found.value - 0.3) <= found.margin
    assert inside / 4000 == pytest.approx(0.95, abs=0.012)


def test_widths_are_students():
    # 97.5 % points of the t distribution, from tables.
    for clusters, width in ((2, 12.706), (3, 4.303), (4, 3.182), (5, 2.776), (11, 2.228), (31, 2.042), (1001, 1.962)):
        assert width_of(clusters) == pytest.approx(width, abs=0.004)


def read(folder):
    lines = (folder / "by_sequence.csv").read_text().splitlines()[1:]
    tokens, nats = np.array([[float(x) for x in line.split(",")[1:]] for line in lines]).T
    return read_losses(folder, {AFTER: nats.sum() / tokens.sum()})


def test_losses_by_sequence_are_only_read_where_they_are_those_of_the_evaluation(sweep, tmp_path):
    done = {e.run.name: e for e in evaluate([sweep / "a", sweep / "b"])}
    means = {name: {m: s["loss"] for m, s in e.values["scores"].items()} for name, e in done.items()}
    a, b = (read_losses(done[name].run, means[name]) for name in "ab")
    split = open_saved_run(sweep / "a").validation
    assert list(a.tokens_S) == [sequence.targets.sum() for sequence in split]
    assert set(a.nats_S) == {"student before", AFTER, TEACHER}
    apart = difference(b, a, AFTER)
    assert apart.value == pytest.approx(means["b"][AFTER] - means["a"][AFTER], abs=1e-6)
    columns, rows = leaderboard(list(done.values()))
    assert columns[2] == "above the best"
    assert sorted(row[2] == "best" for row in rows) == [False, True]
    worse = apart if apart.value > 0 else difference(a, b, AFTER)
    assert difference_text(worse) in {row[2] for row in rows}
    # Of another evaluation, damaged, or absent: as if there were none.
    assert read_losses(done["a"].run, {m: loss + 0.01 for m, loss in means["a"].items()}) is None
    for text in ("", "sequence,tokens\n", "sequence,tokens,student after\n0,x,1\n", "sequence,tokens,student after\n0,3\n1,2,3\n",
                 "sequence,tokens,student after\n0,0,nan\n", "sequence,tokens,student after\ninf,3,1\n", "\0"):  # fmt: skip
        (tmp_path / "by_sequence.csv").write_text(text)
        assert read_losses(tmp_path, {AFTER: 1.0}) is None
    assert read_losses(tmp_path / "nowhere", {AFTER: 1.0}) is None
