"""A distilled student is reinforced: from its own adapter, against itself, to an ordinary adapter, and on after a stop."""

import copy
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import peft
import pytest
import safetensors.torch
import torch
from typer.testing import CliRunner

from kdcache.cli import app
from kdcache.errors import KdcacheError, ModelError, RecipeError, TrainingError
from kdcache.models import load_model
from kdcache.progress import Silent
from kdcache.recipe import parse_recipe
from kdcache.recipe_reinforce import parse_reinforce_recipe
from kdcache.reinforce.questions import load_questions
from kdcache.reinforce.run import reinforce, reward_ends
from kdcache.reinforce.seeds import seed_rows
from kdcache.reinforce.student import adapter_weights, load_policy, open_start, refuse_other_reference
from kdcache.reinforce.symptoms import symptoms
from kdcache.reinforce.trainer import make_trainer, reinforce_arguments
from kdcache.reinforce_record import load_trained
from kdcache.run_record import read_log
from kdcache.student.distill import distill
from kdcache.token_maps import load_tokenizer

# Of trl's and peft's own code.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")


@pytest.fixture(scope="session")
def runs(base_values, shared_cache, tmp_path_factory):
    """Finished distillation runs: with LoRA on a quantised base, and in every weight. Their cache lies elsewhere by now."""
    folder, made = tmp_path_factory.mktemp("runs"), {}
    for name, student, training in (
        ("lora", {"quantization": "nf4", "dtype": "bfloat16", "lora": {"r": 4}}, {"learning_rate": 1e-2}),
        ("full", {"lora": None}, {}),
    ):
        values = copy.deepcopy(base_values)
        values |= {"output": str(folder / name)}
        values["cache"]["directory"] = str(shared_cache)
        values["student"] |= student
        values["training"] |= {"max_steps": 4, **training}
        distill(parse_recipe(values))
        record = json.loads((folder / name / "run.json").read_text())
        record["recipe"]["cache"]["directory"] = "nowhere"
        (folder / name / "run.json").write_text(json.dumps(record))
        made[name] = folder / name
    return made


@pytest.fixture
def wanted(tmp_path):
    """Values of a recipe of four steps."""
    return {
        "output": str(tmp_path / "out"),
        "data": {"arithmetic": {"train": 12, "test": 4, "steps": 1}},
        "prompt": {"system": None},
        # Untrained students earn nothing else, and from equal rewards nothing is learnt.
        "rewards": {"length": 1.0, "length_target": 1},
        "training": {
            "steps": 4, "prompts": 2, "num_generations": 4, "batch_size": 4, "max_completion_length": 8, "learning_rate": 1e-2,
            "precision": "fp32", "gradient_checkpointing": False, "save_steps": 2,
        },
        "evaluation": {"examples": 4},
    }  # fmt: skip


def recipe(wanted, **changes):
    return parse_reinforce_recipe({**wanted, **changes})


def adapter(folder):
    return peft.utils.load_peft_weights(str(folder))


def test_an_adapter_goes_on_and_stays_an_adapter_of_its_base(runs, wanted, tmp_path, models):
    record = reinforce(runs["lora"], recipe(wanted))
    out = tmp_path / "out"
    assert {p.name for p in out.iterdir() if p.name != ".lock"} == {
        "model", "checkpoints", "started.json", "reinforce.json", "log.csv", "result.md", "reward.png", "reward.svg",
    }  # fmt: skip
    assert record == json.loads((out / "reinforce.json").read_text())
    assert record["steps"] == 4
    assert list(record["held_out"]) == ["distilled student", "after reinforcement"]
    assert record["held_out"]["after reinforcement"]["questions"] == 4
    log = read_log(out / "log.csv")
    assert [row["step"] for row in log] == [1, 2, 3, 4]
    # The first step is sampled from the reference itself.
    assert log[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert log[-1]["kl"] > 1e-5
    assert record["reward"] == reward_ends(log)
    before, after = adapter(runs["lora"] / "model"), adapter(out / "model")
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[k].float(), after[k].float()) for k in before)
    assert after[next(iter(after))].dtype == torch.float32
    assert not list((out / "model").glob("ref"))
    base = load_model(str(models / "student"), quantization="nf4", device="cpu")
    assert json.loads((out / "model/adapter_config.json").read_text())["base_model_name_or_path"] == str(
        models / "student"
    )
    loaded = peft.PeftModel.from_pretrained(base, str(out / "model"))
    assert loaded(input_ids=torch.tensor([[5, 6, 7]])).logits.isfinite().all()


def set_up(run, wanted, tmp_path):
    chosen = recipe(wanted)
    start = open_start(run)
    model = load_policy(start, chosen.lora)
    arguments = reinforce_arguments(
        chosen, device="cpu", checkpoints=tmp_path / "checkpoints", tell=lambda text: None, date=start.date
    )
    questions, _ = load_questions(chosen)
    tokenizer = load_tokenizer(start.tokenizer)
    before = adapter_weights(model)
    return before, make_trainer(chosen, model, tokenizer, questions, arguments, tmp_path / "log.csv", Silent())


def test_the_reference_is_the_distilled_student_and_not_its_base(runs, wanted, tmp_path):
    before, trainer = set_up(runs["lora"], wanted, tmp_path)
    model = trainer.model
    kept = dict(model.named_parameters())
    assert any("lora_B" in name and bool(weight.any()) for name, weight in before.items())
    for name, weight in before.items():
        assert torch.equal(kept[name], weight)
        assert kept[name].dtype == torch.float32
        assert torch.equal(kept[name.replace(".default.", ".ref.")].float(), weight)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        distilled = model(input_ids=ids).logits
        with trl_reference(model):
            assert torch.equal(model(input_ids=ids).logits, distilled)
        with model.disable_adapter():
            assert not torch.allclose(model(input_ids=ids).logits, distilled, atol=1e-3)
    refuse_other_reference(model)
    with torch.no_grad():
        kept[next(n for n in kept if ".ref." in n)].add_(1.0)
    with pytest.raises(TrainingError, match="KL would be against another model"):
        refuse_other_reference(model)
    model.delete_adapter("ref")
    with pytest.raises(TrainingError, match="keeps no frozen copy"):
        refuse_other_reference(model)


def trl_reference(model):
    """As trl takes the reference."""
    from trl.trainer.utils import use_adapter

    return use_adapter(model, adapter_name="ref")


class StopsAt(Silent):
    """Sends Ctrl-C after so many steps, once."""

    def __init__(self, step):
        self.left = step
        self.said = []

    def message(self, text):
        self.said.append(text)

    def advance(self, amount, note=""):
        if note and self.left > 0:
            self.left -= amount
            if self.left <= 0:
                os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("name", ["lora", "full"])
def test_a_stopped_run_goes_on_to_the_same_end(runs, wanted, tmp_path, name):
    cold = {"data": {**wanted["data"]}, "cold_start": {"steps": 2, "batch_size": 2}} if name == "full" else {}
    wanted["training"]["save_steps"] = 100
    reinforce(runs[name], recipe(wanted, output=str(tmp_path / "straight"), **cold))
    stopped = recipe(wanted, output=str(tmp_path / "stopped"), **cold)
    progress = StopsAt(2)
    with pytest.raises(KeyboardInterrupt):
        reinforce(runs[name], stopped, progress=progress)
    assert any("stopping after this step" in text for text in progress.said)
    (checkpoint,) = (tmp_path / "stopped/checkpoints").iterdir()
    assert not (checkpoint / "ref").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with pytest.raises(TrainingError, match="go on with it by --resume"):
        reinforce(runs[name], stopped)
    record = reinforce(runs[name], stopped, resume=True)
    assert record["resumed_at"] == int(checkpoint.name.rpartition("-")[2]) < 4
    one, other = (adapter(tmp_path / run / "model") for run in ("straight", "stopped"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    logs = [read_log(tmp_path / run / "log.csv") for run in ("straight", "stopped")]
    assert logs[0] == logs[1]


def test_a_run_that_only_lacks_its_record_takes_no_further_step(runs, wanted, tmp_path):
    first = reinforce(runs["lora"], recipe(wanted))
    before = adapter(tmp_path / "out/model")
    log = (tmp_path / "out/log.csv").read_bytes()
    (tmp_path / "out/reinforce.json").unlink()
    again = reinforce(runs["lora"], recipe(wanted), resume=True)
    assert again["steps"] == again["resumed_at"] == 4
    assert again["held_out"] == first["held_out"]
    after = adapter(tmp_path / "out/model")
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert (tmp_path / "out/log.csv").read_bytes() == log


def test_a_student_trained_in_full_gets_an_adapter_of_what_the_cold_start_made(runs, wanted, tmp_path):
    record = reinforce(runs["full"], recipe(wanted, cold_start={"steps": 2, "batch_size": 2, "learning_rate": 1e-3}))
    out = tmp_path / "out"
    assert list(record["held_out"]) == ["distilled student", "after the cold start", "after reinforcement"]
    assert record["reference"] == "after the cold start"
    assert record["student"]["model"] == str(out / "reference")
    assert (out / "reference/model.safetensors").exists()
    assert read_log(out / "log.csv")[0]["kl"] == pytest.approx(0, abs=1e-5)
    base = load_model(str(out / "reference"), dtype="float32", device="cpu")
    peft.PeftModel.from_pretrained(base, str(out / "model"))
    # And once more, from there.
    again = reinforce(out, recipe(wanted, output=str(tmp_path / "again")))
    assert again["student"]["model"] == str(out / "reference")
    assert again["run"] == str(out)
    assert adapter(tmp_path / "again/model").keys() == adapter(out / "model").keys()


def test_without_a_cold_start_the_whole_student_is_the_named_base(runs, wanted, tmp_path):
    wanted["training"]["beta"] = 0.0
    record = reinforce(runs["full"], recipe(wanted))
    assert record["student"]["model"] == str(runs["full"] / "model")
    assert "kl" not in record["reward"]["last_tenth"]


def test_a_finished_run_is_shown_kept_and_forgotten_on_request(runs, wanted, tmp_path):
    wanted["training"]["steps"] = 1
    first = reinforce(runs["lora"], recipe(wanted))
    assert reinforce(runs["lora"], recipe(wanted), resume=True) == first
    with pytest.raises(TrainingError, match="--overwrite"):
        reinforce(runs["lora"], recipe(wanted))
    with pytest.raises(TrainingError, match=r"other settings: seed was 0, now 1"):
        reinforce(runs["lora"], recipe(wanted, seed=1), resume=True)
    with pytest.raises(TrainingError, match="run digest"):
        reinforce(runs["full"], recipe(wanted), resume=True)
    assert reinforce(runs["lora"], recipe(wanted, seed=1), overwrite=True)["recipe"]["seed"] == 1
    (tmp_path / "out/reinforce.json").write_text("{")
    with pytest.raises(TrainingError, match="is not readable"):
        open_start(tmp_path / "out")


def test_what_cannot_be_is_refused_before_a_model_is_loaded(runs, wanted, tmp_path, monkeypatch):
    def refused(run, error, message, **changes):
        with pytest.raises(error, match=message):
            reinforce(run, recipe(wanted, **changes))

    monkeypatch.setattr("kdcache.reinforce.run.load_policy", lambda *a: pytest.fail("a model was loaded"))
    refused(tmp_path / "none", TrainingError, "there is no run directory")
    refused(runs["lora"], RecipeError, "the run to start from", output=str(runs["lora"]))
    (tmp_path / "other").mkdir()
    (tmp_path / "other/file").write_text("x")
    refused(runs["lora"], TrainingError, "something that is no reinforcement", output=str(tmp_path / "other"))
    refused(runs["lora"], RecipeError, "trl refuses", training={**wanted["training"], "schedule": "zigzag"})
    refused(
        runs["lora"],
        KdcacheError,
        "precision fp16 needs a CUDA device",
        training={**wanted["training"], "precision": "fp16"},
    )
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(runs["lora"], RecipeError, "one process")
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setitem(sys.modules, "trl", None)
    refused(runs["lora"], KdcacheError, r"pip install 'kdcache\[rl\]'")
    monkeypatch.undo()
    started = recipe(wanted).output
    assert not os.path.exists(started)  # noqa: PTH110


def test_a_student_that_is_gone_is_named(runs, wanted, tmp_path):
    import shutil

    shutil.copytree(runs["lora"], tmp_path / "run")
    (tmp_path / "run/model/adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"lacks adapter_model\.safetensors"):
        open_start(tmp_path / "run")


def command(*words):
    return CliRunner().invoke(app, ["reinforce", *map(str, words)])


def written(wanted, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(wanted))
    return path


def test_the_dry_run_says_what_it_comes_to_and_writes_nothing(runs, wanted, tmp_path):
    done = command(runs["lora"], written(wanted, tmp_path), "--dry-run")
    assert done.exit_code == 0, done.exception
    for text in (
        "12 to learn from, 4 held out",
        "2 questions x 4 completions = 8",
        "at most 256 sampled tokens",
        "its adapter learns",
        "KL weight 0.04",
    ):
        assert text in done.stdout
    assert not (tmp_path / "out").exists()
    published = command(runs["lora"], "recipes/reinforce/qwen2.5-gsm8k.yaml", "--dry-run")
    assert published.exit_code == 0, published.exception
    assert "openai/gsm8k on the Hub" in published.stdout
    assert "64,000 completions, at most 32,768,000 sampled tokens" in published.stdout
    wanted["data"] = {"train": {"path": str(tmp_path / "absent.jsonl")}}
    absent = command(runs["lora"], written(wanted, tmp_path), "--dry-run")
    assert "does not exist" in str(absent.exception)


@pytest.mark.parametrize("name", ["lora", "full"])
def test_a_reinforced_student_is_judged_and_exported_like_any_other(runs, wanted, tmp_path, shared_cache, name):
    reinforce(runs[name], recipe(wanted))
    out, cache = tmp_path / "out", ["--cache", str(shared_cache)]
    judged = CliRunner().invoke(app, ["evaluate", str(out), *cache])
    assert judged.exit_code == 0, judged.exception
    found = json.loads((out / "evaluation.json").read_text())["scores"]
    # The base of a LoRA run's adapter, and of a student trained in full that student, are what came before.
    distilled = json.loads((runs[name] / "run.json").read_text())["scores"]
    known = distilled["student before" if name == "lora" else "student after"]
    assert found["student before"]["loss"] == pytest.approx(known["loss"], rel=1e-6)
    assert all(abs(found["student after"]["loss"] - score["loss"]) > 1e-4 for score in distilled.values())
    refused = CliRunner().invoke(app, ["export", str(out), str(tmp_path / "x"), "--to", "adapter", *cache])
    assert ("published nowhere" in str(refused.exception)) == (name == "full")
    forms = "merged,adapter" if name == "lora" else "merged"
    exported = CliRunner().invoke(app, ["export", str(out), str(tmp_path / "x"), "--to", forms, *cache, "--overwrite"])
    assert exported.exit_code == 0, exported.exception
    rows = json.loads((tmp_path / "x/export.json").read_text())["rows"]
    page = (out / "evaluation.md").read_text()
    assert "Student before: the base of its adapter, " in page
    assert rows["run"]["loss"] == pytest.approx(found["student after"]["loss"], rel=1e-6)
    if name == "lora":
        assert rows["adapter"]["kl_to_run"] == pytest.approx(0, abs=1e-7)
    assert rows["merged"]["kl_to_run"] < 1e-3
    card = (tmp_path / "x/README.md").read_text()
    assert "reinforced afterwards, for 4 steps of GRPO" in card
    assert "| after reinforcement |" in card
    assert "## Before and after" not in card
    assert "# student, distilled from teacher" in card


def test_a_reinforcement_is_of_the_base_that_it_was_trained_on(runs, wanted, tmp_path, shared_cache, monkeypatch):
    """The base of a student trained in full lies in that run, and is found from anywhere; trained again, it is another one."""
    copied = tmp_path / "full"
    shutil.copytree(runs["full"], copied)
    monkeypatch.chdir(tmp_path)
    reinforce(Path("full"), recipe(wanted, output="out"))
    cache, out = ["--cache", str(shared_cache)], tmp_path / "out"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert CliRunner().invoke(app, ["evaluate", str(out), *cache]).exit_code == 0
    assert "kdcache evaluate judges it" in CliRunner().invoke(app, ["report", str(out)]).output
    weights = next((copied / "model").glob("*.safetensors"))
    tensors = safetensors.torch.load_file(weights)
    safetensors.torch.save_file({k: v * 1.01 for k, v in tensors.items()}, weights, {"format": "pt"})
    for command in (["evaluate", str(out), *cache], ["export", str(out), "x", "--to", "merged", *cache]):
        refused = CliRunner().invoke(app, command)
        assert isinstance(refused.exception, ModelError)
        assert "holds another model by now" in str(refused.exception)
    with pytest.raises(ModelError, match="holds another model by now"):
        open_start(out)


def test_a_base_that_was_replaced_while_it_was_trained_on_is_noticed(runs, wanted, tmp_path, monkeypatch):
    copied = tmp_path / "full"
    shutil.copytree(runs["full"], copied)

    def replaced(*arguments):
        weights = next((copied / "model").glob("*.safetensors"))
        tensors = safetensors.torch.load_file(weights)
        safetensors.torch.save_file({k: v * 1.3 for k, v in tensors.items()}, weights, {"format": "pt"})
        return []

    with monkeypatch.context() as patch:
        patch.setattr("kdcache.reinforce.run.write_plot", replaced)
        reinforce(copied, recipe(wanted))
    with pytest.raises(ModelError, match="holds another model by now"):
        open_start(tmp_path / "out")
    with pytest.raises(TrainingError, match="base was"):
        reinforce(copied, recipe(wanted), resume=True)


def test_a_project_is_moved_as_a_whole(runs, wanted, tmp_path):
    (tmp_path / "a").mkdir()
    shutil.copytree(runs["full"], tmp_path / "a/full")
    reinforce(tmp_path / "a/full", recipe(wanted, output=str(tmp_path / "a/out")))
    shutil.move(tmp_path / "a", tmp_path / "b")
    assert open_start(tmp_path / "b/out").student.model == str(tmp_path / "b/full/model")


def test_the_base_that_the_cold_start_made_moves_with_the_directory(runs, wanted, tmp_path, shared_cache):
    reinforce(runs["full"], recipe(wanted, cold_start={"steps": 1, "examples": 4}))
    shutil.move(tmp_path / "out", tmp_path / "moved")
    assert open_start(tmp_path / "moved").student.model == str(tmp_path / "moved/reference")
    judged = CliRunner().invoke(app, ["evaluate", str(tmp_path / "moved"), "--cache", str(shared_cache)])
    assert judged.exit_code == 0, judged.exception


def test_no_training_begins_where_a_reinforcement_lies(runs, wanted, tmp_path, base_values, shared_cache):
    out = tmp_path / "out"
    reinforce(runs["lora"], recipe(wanted))
    shutil.rmtree(out / "checkpoints")
    before = (out / "model/adapter_model.safetensors").read_bytes()
    values = copy.deepcopy(base_values) | {"output": str(out)}
    values["cache"]["directory"] = str(shared_cache)
    for overwrite in (False, True):
        with pytest.raises(TrainingError, match="holds a reinforcement"):
            distill(parse_recipe(values), overwrite=overwrite)
    assert (out / "model/adapter_model.safetensors").read_bytes() == before
    shutil.copy(runs["lora"] / "run.json", out / "run.json")
    for reads in (load_trained, open_start):
        with pytest.raises(TrainingError, match="holds both a training"):
            reads(out)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distilled": None}, "from the distilled run on"),
        ({"distilled": [1]}, "from the distilled run on"),
        ({"distilled": {"recipe": 1, "cache_id": ""}}, "from the distilled run on"),
        ({"student": None}, "is not the record of a reinforcement"),
        ({"student": {"model": 1}}, "is not the record of a reinforcement"),
        ({"format": "x"}, "is not the record of a reinforcement"),
    ],
)
def test_a_record_that_is_none_is_one_clear_error(tmp_path, changes, message):
    values = {"format": "kdcache-reinforce", "student": {"model": "x"}, "run": "some/run"}
    (tmp_path / "reinforce.json").write_text(json.dumps(values | changes))
    with pytest.raises(TrainingError, match=message):
        load_trained(tmp_path)
    (tmp_path / "reinforce.json").unlink()
    (tmp_path / "started.json").write_text(json.dumps({"run digest": ""}))
    with pytest.raises(TrainingError, match="finish it with kdcache reinforce --resume"):
        load_trained(tmp_path)
    (tmp_path / "started.json").write_text('["run digest"]')
    with pytest.raises(TrainingError, match="holds no finished run"):
        load_trained(tmp_path)


def test_several_seeds_are_compared(runs, wanted, tmp_path):
    wanted["training"]["steps"] = 2
    done = command(runs["lora"], written(wanted, tmp_path), "--seeds", "0,3")
    assert done.exit_code == 0, done.exception
    assert "mean" in done.stdout
    values = json.loads((tmp_path / "out/seeds.json").read_text())["seeds"]
    assert list(values) == ["0", "3"]
    log = read_log(tmp_path / "out/seed-3/log.csv")
    assert values["3"]["reward_first"] == log[0]["reward"]
    assert values["3"]["reward_last"] == log[-1]["reward"]
    assert (tmp_path / "out/reward.png").exists()
    assert "| mean |" in (tmp_path / "out/seeds.md").read_text()
    for bad in ("", "a", "1,1", "1,-2"):
        assert "--seeds should be" in str(command(runs["lora"], written(wanted, tmp_path), "--seeds", bad).exception)


def test_what_is_wrong_with_a_reinforcement_is_told():
    log = [{"step": i, "reward": 0.0, "same_reward": 1.0} for i in range(9)]
    few, many = {"questions": 50.0}, {"questions": 500.0}
    [told] = symptoms([*log, {"step": 9, "same_reward": 0.5}], {"right": 0.5} | few, {"right": 0.4} | few)
    assert told.startswith("for 95% of the questions all completions got the same reward")
    assert "make the questions easier" in told
    [told] = symptoms([row | {"reward_correct": 1.0} for row in log], None, None)
    assert "make the questions harder" in told
    # Ten points are chance among fifty questions, and none among five hundred.
    [told] = symptoms([{"same_reward": 0.5}], {"right": 0.5} | many, {"right": 0.4} | many)
    assert "fell from 50.0% to 40.0%" in told
    assert symptoms([], None, None) == symptoms([{"step": 1}], {"right": 0.0} | few, None) == []


def test_means_over_seeds():
    record = {
        "reward": {"first_tenth": {"reward": 1.0}, "last_tenth": {"reward": 2.0}},
        "held_out": {"distilled student": {"right": 0.25}, "after reinforcement": {"right": 0.5}},
        "reference": "distilled student",
    }
    rows = seed_rows(
        [0, 1], [record, {**record, "reward": {"first_tenth": {"reward": 3.0}, "last_tenth": {"reward": 2.0}}}]
    )
    assert rows[0] == ["0", "1.000", "2.000", "0.250", "0.500", "-"]
    assert rows[-1] == ["mean", "2.000 ± 1.414", "2.000 ± 0.000", "0.250 ± 0.000", "0.500 ± 0.000", "-"]
    assert reward_ends([{"reward": float(i), "kl": 1.0} for i in range(20)])["last_tenth"] == {
        "reward": 18.5,
        "kl": 1.0,
    }
