"""Chains: stages and their recipes, a chain that is carried out and gone on with, and what is refused before the first stage."""

import copy
import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import kdcache.chain.run as chain_run
from kdcache.cache.reader import open_cache
from kdcache.chain import run_chain
from kdcache.chain.board import WAITING, earlier_states
from kdcache.chain.ready import estimates, refuse_impossible_stages
from kdcache.chain.stages import expand
from kdcache.chain_record import CHAIN_FILE, checked_stage, read_chain
from kdcache.cli import app
from kdcache.errors import CacheError, KdcacheError, ModelError, RecipeError, TokenizerError, TrainingError
from kdcache.evaluate.saved_run import open_saved_run, run_directories
from kdcache.recipe import load_recipe, parse_recipe
from kdcache.report.collect import collect
from kdcache.run_record import AFTER, BEFORE, TEACHER
from kdcache.student.distill import check_student, distill
from kdcache.student.kept import Kept
from tests.report_examples import make_run
from tests.test_recipe import ROOT

RECIPES = sorted((ROOT / "recipes/chains").glob("*.yaml"))


class Told:
    """Progress that remembers what it was told."""

    def __init__(self):
        self.said, self.tasks = [], []

    def message(self, text):
        self.said.append(text)

    warning = message

    def begin(self, task, total, unit):
        self.tasks.append(task)

    def advance(self, amount, note=""):
        pass

    def end(self):
        pass


@pytest.fixture
def chained(values, shared_cache, models, tmp_path):
    """Teacher -> every other layer of it -> small student, from the session's cache."""
    values["output"] = str(tmp_path / "chain")
    values["cache"]["directory"] = str(shared_cache)
    values["training"] |= {"max_steps": 2}
    values["chain"] = {
        "stages": {
            "middle": {
                "student.model": str(models / "teacher"),
                "student.init": {"method": "drop_layers", "every": 2},
                "student.lora": None,
            },
            "small": {"training.learning_rate": 1e-3, "selection.bytes_per_position": 30},
        }
    }
    return values


def stages_of(values):
    return expand(parse_recipe(values))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
def test_shipped_chains_have_possible_stages(path):
    stages = expand(load_recipe(path))
    assert len(stages) == 3
    assert stages[-1].name == "direct"
    assert stages[-1].student == stages[-2].student
    assert stages[1].teacher_section.model == str(stages[0].merged)


def test_the_published_chain_names_its_models():
    stages = expand(load_recipe(ROOT / "recipes/chains/qwen2.5-7b-3b-1.5b.yaml"))
    assert [s.student_section.model for s in stages] == [
        f"Qwen/Qwen2.5-{size}-Instruct" for size in ("3B", "1.5B", "1.5B")
    ]
    assert stages[0].teacher_section.model == stages[2].teacher_section.model == "Qwen/Qwen2.5-7B-Instruct"
    assert stages[0].cache == stages[2].cache != stages[1].cache


def test_stages_are_whole_recipes(chained, tmp_path, shared_cache, models):
    middle, small, direct = stages_of(chained)
    out = tmp_path / "chain"
    assert [s.recipe.output for s in (middle, small, direct)] == [
        str(out / n / "run") for n in ("middle", "small", "direct")
    ]
    assert [s.cache for s in (middle, small, direct)] == [
        str(shared_cache),
        str(out / "small/cache"),
        str(shared_cache),
    ]
    assert small.recipe.teacher.model == str(out / "middle/merged")
    assert small.recipe.teacher.quantization == "none"
    assert middle.recipe.student.lora is None
    assert small.recipe.student.lora is not None
    assert small.recipe.selection.bytes_per_position == 30
    # Of the last stage's changes the direct way has those of the student.
    assert direct.recipe.training.learning_rate == 1e-3
    assert direct.recipe.selection.bytes_per_position == 48
    assert direct.recipe.teacher.model == str(models / "teacher")
    assert direct.merged is None
    assert not any(s.recipe.chain for s in (middle, small, direct))
    chained["chain"]["direct"] = False
    assert [s.name for s in stages_of(chained)] == ["middle", "small"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stages": {"a": {}}}, r"chain\.stages needs two stages or more"),
        ({"stages": {"a": {}, "direct": {}}}, r"the stage name 'direct' is to be a directory"),
        ({"stages": {"a": {}, "b/c": {}}}, r"the stage name 'b/c' is to be a directory"),
        ({"stages": {"a": {}, "A": {}}}, r"the stages a and A would share a directory"),
        (
            {"stages": {"a": {"teacher.quantization": "int8"}, "b": {}}},
            r"stage a is the first, and changes teacher\.quant",
        ),
        (
            {"stages": {"a": {}, "b": {"teacher.model": "m"}}},
            r"stage b changes teacher\.model; a stage changes keys of",
        ),
        ({"stages": {"a": {}, "b": {"data.max_length": 4}}}, r"stage b changes data\.max_length.*the same sequences"),
        ({"stages": {"a": {}, "b": {"student": {"model": "m"}}}}, r"stage b gives the section student as a whole"),
        ({"drop": ["caches", "caches"]}, r"chain\.drop names caches twice"),
        ({"drop": ["runs"]}, r"recipe key chain\.drop\.0"),
        ({"direkt": True}, r"unknown recipe key chain\.direkt; did you mean chain\.direct"),
    ],
)
def test_a_bad_section_names_the_stage_and_the_key(chained, change, message):
    chained["chain"] = {**chained["chain"], **change}
    with pytest.raises(RecipeError, match=message):
        parse_recipe(chained)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda v: v["chain"]["stages"]["small"].update({"training.epochs": -1}),
            r"stage small: recipe key training\.epochs",
        ),
        (
            lambda v: v["chain"]["stages"]["small"].update({"loss.temp": 1}),
            r"stage small: unknown recipe key loss\.temp",
        ),
        (lambda v: v.update(teacher=None), "needs the recipe section teacher"),
        (lambda v: v.update(student=None), "stage small has no student|student"),
        (lambda v: v["cache"].update(mixture=[{"directory": "x"}]), "leave cache.mixture out"),
        (lambda v: v.update(sweep={"grid": {"seed": [1, 2]}}), "section sweep beside its chain"),
        (
            lambda v: v["chain"]["stages"]["small"].update(
                {"student.init": {"method": "teacher"}, "student.model": None}
            ),
            "stage small: ",
        ),
    ],
)
def test_a_recipe_that_makes_no_stage_is_refused(chained, change, message):
    change(chained)
    with pytest.raises(RecipeError, match=message):
        stages_of(chained)


def test_other_commands_refuse_a_chain(chained):
    with pytest.raises(RecipeError, match=r"has a section chain, .* train them with kdcache chain"):
        distill(parse_recipe(chained))
    with pytest.raises(RecipeError, match="a recipe with a section chain"):
        stages_of({**chained, "chain": None})


def with_other_tokens(models, folder):
    """The student with a tokenizer in which two tokens have changed places."""
    shutil.copytree(models / "student", folder)
    tokens = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokens["model"]["vocab"]
    a, b = list(vocabulary)[-2:]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (folder / "tokenizer.json").write_text(json.dumps(tokens))
    return folder


def test_a_chain_whose_tokenizers_differ_is_refused_before_anything_runs(chained, models, tmp_path):
    chained["chain"]["stages"]["small"]["student.model"] = str(with_other_tokens(models, tmp_path / "other"))
    with pytest.raises(TokenizerError, match=r"stage small: the tokenizer of .*other differs from the cache's in 2 of"):
        run_chain(parse_recipe(chained))
    assert not (tmp_path / "chain" / CHAIN_FILE).exists()
    # Nor where the first cache is still to be made.
    chained["cache"]["directory"] = str(tmp_path / "to-come")
    with pytest.raises(TokenizerError, match=r"stage small: "):
        run_chain(parse_recipe(chained))
    assert not (tmp_path / "to-come").exists()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"student.model": "/nowhere/at/all"}, ModelError, "stage small: .*nowhere"),
        ({"loss.temperature": 0.5}, KdcacheError, r"stage small: loss\.temperature 0\.5 is below the smallest"),
        ({"student.lora": {"targets": ["nothing"]}}, ModelError, "stage small: .*nothing"),
        ({"training.optimizer": "none such"}, KdcacheError, "stage small: .*none such"),
        ({"student.init": {"method": "drop_layers", "every": 99}}, ModelError, r"stage small: student\.init\.every"),
    ],
)
def test_what_the_last_stage_would_refuse_is_refused_first(chained, tmp_path, change, error, message):
    chained["chain"]["stages"]["small"] |= change
    with pytest.raises(error, match=message):
        run_chain(parse_recipe(chained))
    assert not (tmp_path / "chain" / CHAIN_FILE).exists()


def test_a_chain_from_end_to_end_and_again(chained, tmp_path, shared_cache):
    recipe, out, trained = parse_recipe(chained), tmp_path / "chain", []
    board = run_chain(recipe, after_run=trained.append)
    assert [r.output for r in trained] == [out / n / "run" for n in ("middle", "small", "direct")]
    assert [s.state for s in board.stages] == ["finished"] * 3
    middle, small, direct = board.stages
    # Each is taught by the one before, in the same words as all.
    caches = {s.name: open_cache(s.stage.cache) for s in board.stages}
    assert [s.cache_id for s in board.stages] == [c.id for c in caches.values()]
    assert caches["middle"].id == caches["direct"].id == open_cache(shared_cache).id != caches["small"].id
    for a, b in zip(caches["small"].plan.data.splits, caches["middle"].plan.data.splits, strict=True):
        assert (a.fingerprint, a.tokens) == (b.fingerprint, b.tokens)
    # The teacher of the second stage is the student of the first.
    merged = AutoModelForCausalLM.from_pretrained(out / "middle/merged", dtype=torch.float32)
    assert merged.config.num_hidden_layers == 2
    assert (
        AutoTokenizer.from_pretrained(out / "middle/merged").chat_template
        == AutoTokenizer.from_pretrained(recipe.teacher.model).chat_template
    )
    assert small.scores[TEACHER]["perplexity"] == pytest.approx(middle.scores[AFTER]["perplexity"], rel=0.02)
    assert {s.scores[AFTER]["tokens"] for s in board.stages} == {small.scores[AFTER]["tokens"]}
    assert small.scores[BEFORE]["perplexity"] == pytest.approx(direct.scores[BEFORE]["perplexity"])
    # What is compared is the same for all: the first teacher.
    assert middle.kl_to_first == middle.scores[AFTER]["kl_to_teacher"]
    assert direct.kl_to_first == direct.scores[AFTER]["kl_to_teacher"]
    assert small.kl_to_first not in (None, small.scores[AFTER]["kl_to_teacher"])
    assert 0 < small.kl_to_first < 5
    # The merged student is the trained one.
    run = open_saved_run(out / "small/run")
    assert run.recipe.teacher.model == str(out / "middle/merged")
    assert (out / "small/merged/model.safetensors").exists()
    assert not (out / "direct/merged").exists()
    page = (out / "chain.md").read_text()
    assert "| small | middle | student |" in page
    assert "by way of the chain against direct: perplexity" in page
    # Again: nothing is done, and nothing changes.
    before = {
        p: p.stat().st_mtime_ns
        for p in out.rglob("*")
        if p.suffix in (".safetensors", ".json") and p.name != CHAIN_FILE
    }
    told = Told()
    again = run_chain(recipe, progress=told)
    assert told.said == [f"stage {n}: finished" for n in ("middle", "small", "direct")]
    assert told.tasks == []
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert [s.as_record() for s in again.stages] == [s.as_record() for s in board.stages]
    # What is written is read back.
    assert [s["name"] for s in read_chain(out)["stages"]] == ["middle", "small", "direct"]
    assert [s.as_record() for s in earlier_states(out, expand(recipe))] == [s.as_record() for s in board.stages]
    # Other settings for what is done are refused, and so is a student whose teacher was trained again.
    other = copy.deepcopy(chained)
    other["chain"]["stages"]["middle"]["training.learning_rate"] = 1.0
    with pytest.raises(TrainingError, match=r"stage middle: .*training\.learning_rate was"):
        run_chain(parse_recipe(other))
    shutil.rmtree(out / "middle")
    with pytest.raises(
        TrainingError, match=r"stage small: it learnt from an earlier student of stage middle, .* remove .*chain/small"
    ):
        run_chain(recipe)


def test_a_first_cache_that_is_made_anew_has_to_be_that_of_the_finished_stages(chained, models, tmp_path):
    teacher, cache, out = tmp_path / "own/teacher", tmp_path / "cache", tmp_path / "chain"
    shutil.copytree(models / "teacher", teacher)
    chained["teacher"]["model"], chained["cache"]["directory"] = str(teacher), str(cache)
    chained["training"]["max_steps"], chained["chain"]["direct"] = 1, False
    first = run_chain(parse_recipe(chained))["middle"].cache_id
    chained["chain"]["direct"] = True
    cache.rename(tmp_path / "kept")
    weights = load_file(teacher / "model.safetensors")
    save_file({k: v * 1.5 for k, v in weights.items()}, teacher / "model.safetensors", metadata={"format": "pt"})
    message = rf"stage middle: it learnt from the cache {first[:12]}, and {cache} is (?!{first[:12]})\w{{12}} by now; bring .* remove {out}/middle "
    # Noticed when it has been made, and on every later call before anything starts.
    for _ in range(2):
        with pytest.raises(TrainingError, match=message):
            run_chain(parse_recipe(chained))
        assert [s["state"] for s in read_chain(out)["stages"]] == ["finished", "finished", "failed"]
        assert read_chain(out)["stages"][0]["cache_id"] == first
        assert not (out / "direct/run").exists()
    shutil.rmtree(cache)
    (tmp_path / "kept").rename(cache)
    middle, small, direct = run_chain(parse_recipe(chained)).stages
    assert middle.cache_id == direct.cache_id == first
    # Nor may a later stage's own cache be another.
    shutil.rmtree(small.stage.cache)
    shutil.copytree(cache, small.stage.cache)
    with pytest.raises(TrainingError, match="stage small: it learnt from the cache "):
        run_chain(parse_recipe(chained))


class Stop(BaseException):
    """Something that comes from outside, as Ctrl-C does."""


@pytest.mark.parametrize("where", ["capture", "distill", "save_whole", "run_score"])
def test_a_chain_that_is_stopped_anywhere_goes_on(chained, tmp_path, monkeypatch, where):
    chained["chain"]["direct"] = False
    recipe, out = parse_recipe(chained), tmp_path / "chain"
    real, calls = getattr(chain_run, where), []

    def stops_once(*args, **kwargs):
        calls.append(where)
        # The first distill and merge are of the first stage, all else of the second.
        if len(calls) == (2 if where == "distill" else 1):
            raise Stop
        return real(*args, **kwargs)

    monkeypatch.setattr(chain_run, where, stops_once)
    with pytest.raises(Stop):
        run_chain(recipe)
    states = [s["state"] for s in read_chain(out)["stages"]]
    assert states == (["stopped", WAITING] if where == "save_whole" else ["finished", "stopped"])
    done = {p: p.stat().st_mtime_ns for p in out.rglob("run.json")}
    board = run_chain(recipe)
    assert [s.state for s in board.stages] == ["finished"] * 2
    assert {p: p.stat().st_mtime_ns for p in done} == done


def test_a_stage_that_fails_says_why_and_is_tried_again(chained, tmp_path, monkeypatch):
    chained["chain"]["direct"] = False
    recipe, out = parse_recipe(chained), tmp_path / "chain"

    def full(recipe, **options):
        raise CacheError("no space left")

    monkeypatch.setattr(chain_run, "distill", full)
    for _ in range(2):
        with pytest.raises(CacheError, match="no space left"):
            run_chain(recipe)
        stage = read_chain(out)["stages"][0]
        assert (stage["state"], stage["error"]) == ("failed", "no space left")
    monkeypatch.setattr(chain_run, "distill", lambda recipe, **options: (_ for _ in ()).throw(Stop()))
    with pytest.raises(Stop):
        run_chain(recipe)
    stage = read_chain(out)["stages"][0]
    assert (stage["state"], stage["error"]) == ("stopped", None)


def test_what_has_been_used_may_be_dropped_and_the_chain_still_gone_on_with(chained, tmp_path, shared_cache):
    chained["chain"] |= {"drop": ["caches", "merged"], "direct": False}
    out, recipe = tmp_path / "chain", parse_recipe(chained)
    board = run_chain(recipe)
    assert not (out / "middle/merged").exists()
    assert (out / "small/merged").exists()
    assert not (out / "small/cache").exists()
    assert open_cache(shared_cache).id == board["middle"].cache_id
    told = Told()
    run_chain(recipe, progress=told)
    assert told.said == ["stage middle: finished", "stage small: finished"]
    # What was dropped is made again for a stage that is done again.
    shutil.rmtree(out / "small")
    again = run_chain(recipe)
    assert again["small"].scores[AFTER]["perplexity"] == pytest.approx(
        board["small"].scores[AFTER]["perplexity"], rel=1e-6
    )


def test_a_directory_of_something_else_and_one_at_work_are_refused(chained, tmp_path):
    recipe, out = parse_recipe(chained), tmp_path / "chain"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(TrainingError, match=r"holds something that is no chain \(notes\.txt\)"):
        run_chain(recipe)
    (out / "notes.txt").unlink()
    holds = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", holds, str(out / ".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(TrainingError, match="another process is at work on the chain"):
            run_chain(recipe)
        other.communicate()
    # The first teacher's cache may lie in it.
    chained["cache"]["directory"] = str(out / "cache")
    (out / "cache").mkdir(parents=True)
    with chain_run.held(parse_recipe(chained)):
        pass


def test_the_launchers_are_refused(chained, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(TrainingError, match="without a launcher"):
        run_chain(parse_recipe(chained))


def test_dry_run_shows_every_stage_and_writes_nothing(chained, tmp_path):
    (tmp_path / "recipe.yaml").write_text(json.dumps(chained))
    found = CliRunner().invoke(app, ["chain", str(tmp_path / "recipe.yaml"), "--dry-run"], catch_exceptions=False)
    assert found.exit_code == 0
    for text in ("middle", "small", "direct", "waiting", "drop_layers", "training.learning_rate=0.001", "the first"):
        assert text in found.output
    assert not (tmp_path / "chain").exists()
    sizes = estimates(parse_recipe(chained), stages_of(chained))
    assert sizes[0].parameters > sizes[1].parameters == sizes[2].parameters
    assert sizes[0].teacher_bytes == sizes[2].teacher_bytes > sizes[1].teacher_bytes
    assert sizes[1].cache_bytes == 30 * sizes[1].positions
    # Without the cache the data is tokenised instead.
    chained["cache"]["directory"] = str(tmp_path / "to-come")
    assert [e.positions for e in estimates(parse_recipe(chained), stages_of(chained))] == [e.positions for e in sizes]
    refuse_impossible_stages(earlier_states(tmp_path / "chain", stages_of(chained)))


STAGE = {"name": "a", "teacher": "t", "student": "s", "state": "finished", "seconds": {"cache": 1.5}, "run": None,
         "scores": {AFTER: {"loss": 1.0, "perplexity": 2.7, "kl_to_teacher": 0.1}}}  # fmt: skip


def test_a_stage_of_the_record_is_read():
    found = checked_stage(STAGE)
    assert found["seconds"] == {"cache": 1.5, "train": 0, "merge": 0, "compare": 0}
    assert found["merged"] is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": ""}, "its name"),
        ({"name": "../x"}, "its name"),
        ({"name": "a/b"}, "its name"),
        ({"state": "asleep"}, "the state 'asleep'"),
        ({"seconds": {"train": -1}}, "its seconds"),
        ({"seconds": 3}, "its seconds"),
        ({"run": 7}, "its run is no text"),
        ({"scores": {AFTER: {"loss": "low"}}}, "its scores"),
        ({"cache_bytes": "many"}, "its cache_bytes"),
        ({"kl_to_first": [1]}, "its kl_to_first"),
    ],
)
def test_a_broken_record_is_refused(tmp_path, change, message):
    (tmp_path / CHAIN_FILE).write_text(
        json.dumps({"format": "kdcache-chain", "recipe": {}, "stages": [{**STAGE, **change}]})
    )
    with pytest.raises(TrainingError, match=f"stage 1: .*{message}"):
        read_chain(tmp_path)


def test_a_chain_stands_for_its_finished_stages(tmp_path):
    out, heard = tmp_path / "chain", Told()
    for name, loss in (("a", 1.9), ("b", 1.8)):
        make_run(out / name / "run", loss)
    (out / "c/run").mkdir(parents=True)

    def write(*states):
        stages = [
            {**STAGE, "name": n, "state": s, "error": f"{n} broke" if s == "failed" else None}
            for n, s in zip("abc", states, strict=True)
        ]
        (out / CHAIN_FILE).write_text(json.dumps({"format": "kdcache-chain", "recipe": {}, "stages": stages}))

    write("finished", "finished", "failed")
    assert run_directories([out, out / "a/run"], heard) == [out / "a/run", out / "b/run"]
    assert heard.said == [f"of {out} these stages are left out: c (failed)"]
    rows = collect([out]).rows
    assert [(r.name, r.state, r.reason) for r in rows] == [
        ("a", "finished", None),
        ("b", "finished", None),
        ("c", "failed", "c broke"),
    ]
    assert [r.directory for r in rows] == [out / n / "run" for n in "abc"]
    # What says finished and is not is no finished one.
    write("finished", "finished", "finished")
    (out / "a/run/run.json").write_text("{")
    (out / "c/run").rmdir()
    assert [r.state for r in collect([out]).rows] == ["failed", "finished", "failed"]
    with pytest.raises(TrainingError, match=r"there is no run directory .*c/run"):
        run_directories([out])
    write("finished", "finished", "waiting")
    assert run_directories([out], heard) == [out / "b/run"]
    assert "a (finished, but " in heard.said[-1]
    write("waiting", "stopped", "failed")
    with pytest.raises(TrainingError, match=r"the chain .* has no finished stage; kdcache chain goes on with it"):
        run_directories([out])
    (out / CHAIN_FILE).write_text("{")
    with pytest.raises(TrainingError, match="is not the record of a chain"):
        run_directories([out])
    broken = collect([out]).rows
    assert [(r.directory, r.state) for r in broken] == [
        (out, "failed"),
        (out / "a/run", "failed"),
        (out / "b/run", "finished"),
    ]


def test_other_files_are_no_chain(tmp_path):
    for text, message in (
        ("{", "is not the record of a chain"),
        ("[]", "its format is 'None'"),
        ('{"format": "kdcache-sweep"}', "its format is 'kdcache-sweep'"),
        ('{"format": "kdcache-chain", "stages": {}}', "no recipe or no stages"),
        (json.dumps({"format": "kdcache-chain", "recipe": {}, "stages": [STAGE, STAGE]}), "two stages have one name"),
        (json.dumps({"format": "kdcache-chain", "recipe": {}, "stages": ["a"]}), "stage 1: it is no mapping"),
    ):
        (tmp_path / CHAIN_FILE).write_text(text)
        with pytest.raises(TrainingError, match=message):
            read_chain(tmp_path)


def test_a_run_that_knows_no_chains_is_gone_on_with(values, shared_cache, tmp_path):
    """Run directories of before: their record of the recipe has no such section, nor a mixture."""
    values["cache"]["directory"] = str(shared_cache)
    values["training"] |= {"max_steps": 1}
    recipe = parse_recipe(values)
    distill(recipe)
    started_file = tmp_path / "student/started.json"
    started = json.loads(started_file.read_text())
    new = ("chain", "cache.mixture", "cache.weight")
    started["recipe"] = {k: v for k, v in started["recipe"].items() if not k.startswith(new)}
    started_file.write_text(json.dumps(started))
    assert check_student(recipe, Kept()) is not None
