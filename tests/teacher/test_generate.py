"""The teacher answers its own prompts: what it says, that nothing is lost or done twice, and every way it can go wrong."""

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
import yaml

from kdcache.cache.reader import open_cache
from kdcache.cli import main
from kdcache.errors import CacheError, DataError, ModelError, PlanMismatchError, RecipeError, StorageError
from kdcache.evaluate import rescore as rescoring
from kdcache.evaluate.rescore import rescore
from kdcache.models import load_model
from kdcache.progress import Silent
from kdcache.recipe import parse_recipe
from kdcache.student.agreement import refuse_other_cache
from kdcache.teacher import capture as capturing
from kdcache.teacher import decode
from kdcache.teacher.capture import AnswerShare, CaptureResult, capture, capture_share, load_ground
from kdcache.teacher.decode import Sampling, answer, choose, numbers_of, replay
from kdcache.teacher.estimate import estimate
from kdcache.teacher.forward import TeacherForward
from kdcache.teacher.generate import Task, generate, prepare
from kdcache.teacher.planning import plan_cache
from kdcache.teacher.workers import Worker
from kdcache.token_maps import load_tokenizer
from tests.crash.small_run import files
from tests.told import Told

ROOT = Path(__file__).parent.parent.parent
QUESTIONS = [
    f"How many {thing} are {n} {thing}?" for n in range(3) for thing in ("cats", "old dogs", "very small birds")
]


def write_questions(path, questions):
    path.write_text("".join(json.dumps({"question": q}) + "\n" for q in questions))
    return {"path": str(path)}


@pytest.fixture(scope="session")
def ending(models, tmp_path_factory):
    """The teacher with a generation configuration that names an eighth of all tokens as ends: answers of all lengths."""
    folder = tmp_path_factory.mktemp("ending") / "teacher"
    shutil.copytree(models / "teacher", folder)
    size = transformers.AutoConfig.from_pretrained(folder).vocab_size
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": list(range(5, size, 8))}))
    return folder


@pytest.fixture
def own(values, ending, tmp_path):
    """Recipe values: questions without responses, answered by sampling."""
    values["teacher"] |= {"model": str(ending)}
    values["data"] = {
        "source": "generate",
        "train": write_questions(tmp_path / "train.jsonl", QUESTIONS),
        "validation": write_questions(tmp_path / "validation.jsonl", ["What is a cat?", "What is a dog?"]),
        "columns": {"instruction": "question"},
        "max_length": 64,
        "generate": {"max_new_tokens": 12, "temperature": 1.0, "batch_size": 4},
    }
    values["cache"]["positions_per_shard"] = 24
    return values


@pytest.fixture(scope="session")
def forward(models):
    model = load_model(str(models / "teacher"), dtype="float32", device="cpu")
    tokenizer = load_tokenizer(str(models / "teacher"))
    return TeacherForward(model, vocab_size=len(tokenizer), pad_id=tokenizer.pad_token_id), model


def prompts(count, seed=0):
    chance = np.random.default_rng(seed)
    return [chance.integers(5, 200, size=chance.integers(3, 12)).astype(np.uint32) for _ in range(count)]


def split_up(answers):
    return [part.tolist() for part in answers.ids.split(answers.lengths.tolist())]


def texts(directory):
    return {
        name: [(s.token_ids.tolist(), s.targets.tolist()) for s in split]
        for name, split in open_cache(directory).splits.items()
    }


def test_greedy_answers_are_those_of_transformers(forward):
    teacher, model = forward
    asked = prompts(5)
    width, stop = max(map(len, asked)), [7, 90]
    ids = torch.full((5, width), teacher.pad_id)
    for i, prompt in enumerate(asked):
        ids[i, width - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in asked])
    made = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=20, do_sample=False, eos_token_id=stop, pad_token_id=teacher.pad_id,
        use_cache=True,
    )[:, width:].tolist()  # fmt: skip
    ours = answer(teacher, asked, [20] * 5, sampling=Sampling(), stop=stop)
    for theirs, own, ended in zip(made, split_up(ours), ours.ended.tolist(), strict=True):
        assert own == theirs[: len(own)]
        assert ended == (own[-1] in stop)
        assert ended or len(own) == 20


def test_answers_have_their_own_limits_and_the_others_go_on(forward):
    teacher, _ = forward
    asked, limits = prompts(6), [1, 2, 3, 9, 9, 4]
    together = split_up(answer(teacher, asked, limits, sampling=Sampling(), stop=[]))
    assert list(map(len, together)) == limits
    alone = [split_up(answer(teacher, [p], [9], sampling=Sampling(), stop=[]))[0] for p in asked]
    assert together == [a[:n] for a, n in zip(alone, limits, strict=True)]


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(1.0),
        Sampling(0.7, top_k=5),
        Sampling(1.5, top_p=0.6),
        Sampling(2.0, top_p=0.8, top_k=9),
        Sampling(1.0, top_p=1e-9),
        Sampling(1.0, top_k=1),
    ],
    ids=str,
)
def test_tokens_are_drawn_from_the_filtered_distribution(sampling):
    torch.manual_seed(0)
    logits = 2 * torch.randn(1, 40)
    scores = logits.double() / sampling.temperature
    for warper, used in (
        (transformers.TopKLogitsWarper(max(1, sampling.top_k)), sampling.top_k > 0),
        (transformers.TopPLogitsWarper(sampling.top_p), sampling.top_p < 1),
    ):
        scores = warper(None, scores) if used else scores
    expected = scores.softmax(dim=1)[0]
    count = 20_000
    # Every point of an even grid stands for as much mass, so the shares are exact up to a point on either side.
    points = (torch.arange(count).double() + 0.5) / count
    drawn = torch.bincount(choose(logits.expand(count, -1), sampling, points), minlength=40) / count
    assert torch.allclose(drawn.double(), expected, atol=2 / count)


def test_a_point_at_either_end_finds_a_token_that_is_in():
    logits = torch.tensor([[-100.0, 3.0, 2.0, -100.0], [0.0, -torch.inf, 0.0, -torch.inf]])
    for sampling in (Sampling(1.0), Sampling(1.0, top_k=2), Sampling(1.0, top_p=0.9)):
        ends = [choose(logits, sampling, torch.full((2,), u, dtype=torch.float64)) for u in (0.0, 1 - 2**-53)]
        assert all(logits[i, e[i]] > -torch.inf for e in ends for i in range(2))
    assert choose(torch.tensor([[1.0, 5.0, 5.0]]), Sampling(), None).tolist() == [1]


def test_chance_depends_on_seed_and_prompt_alone(forward):
    teacher, _ = forward
    asked, sampling = prompts(7), Sampling(1.0, seed=3)

    def run(order, size, seed=3):
        found = {}
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            made = answer(
                teacher, [asked[i] for i in batch], [10] * len(batch), sampling=Sampling(1.0, seed=seed), stop=[7]
            )
            found |= dict(zip(batch, split_up(made), strict=True))
        return found

    whole = run(list(range(7)), 7)
    assert whole == run([3, 1, 6, 0, 2, 5, 4], 2) == run(list(range(7)), 1)
    assert whole != run(list(range(7)), 7, seed=4)
    assert (numbers_of(asked[0], sampling.seed, 4) == numbers_of(asked[0], 3, 9)[:4]).all()
    assert (numbers_of(asked[0], 3, 4) != numbers_of(asked[1], 3, 4)).all()


def test_states_are_those_of_a_pass_over_the_finished_answers(own):
    recipe = parse_recipe(own)
    task = prepare(recipe, Silent())
    teacher = load_ground(recipe, task.ground)
    done = generate(recipe, task, lambda: teacher, Silent())
    for rows in done.planned.rows:
        forced, labels = teacher.hidden(rows)
        stepped, same = replay(teacher, rows)
        assert (labels == same).all()
        for states in (done.planned.states(rows), stepped):
            assert states.dtype == torch.float32
            assert torch.allclose(states, forced, atol=2e-5, rtol=1e-4)
    strange = copy.deepcopy(done.planned.rows[0][0])
    strange.ids[0] += 1
    assert done.planned.states([done.planned.rows[0][1], strange]) is None


def test_a_cache_of_answers(own):
    recipe, told = parse_recipe(own), Told()
    done = capture(recipe, told)
    assert isinstance(done, CaptureResult)
    assert not Path(f"{recipe.cache.directory}.generating").exists()
    cache = open_cache(done.directory)
    train, validation = cache.plan.data.splits
    assert train.selected == "train answered by the teacher: temperature 1, seed 0, at most 12 tokens"
    assert (train.examples, validation.examples, cache.plan.data.shape) == (len(QUESTIONS), 2, "instruction")
    tokenizer = load_tokenizer(recipe.teacher.model)
    for question, sequence in zip(QUESTIONS, cache["train"], strict=True):
        start = int(np.argmax(sequence.targets))
        assert sequence.targets[start:].all()
        assert (
            tokenizer.decode(sequence.token_ids[:start])
            == f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        )
        stops = [i for i, t in enumerate(sequence.token_ids[start:].tolist()) if t % 8 == 5]
        assert stops in ([], [len(sequence.token_ids) - start - 1])
        assert stops or len(sequence.token_ids) - start == 12
    assert train.truncated == sum(s.token_ids[-1] % 8 != 5 for s in cache["train"])
    refuse_other_cache(recipe, cache)
    for change in ({"source": "dataset", "generate": {}}, {"generate": {"temperature": 0.5}}):
        with pytest.raises(PlanMismatchError, match=r"data\.train\.split .* answered by the teacher"):
            refuse_other_cache(parse_recipe({**own, "data": {**own["data"], **change}}), cache)
    assert rescore(done.directory, sequences=8, teacher=recipe.teacher.model, seed=1).explained


@pytest.mark.parametrize("states", ["reuse", "fresh"])
def test_a_cache_in_half_precision_is_what_its_teacher_says(own, monkeypatch, states):
    """What was made token by token is held against a teacher that is run token by token as well."""
    own["teacher"]["dtype"] = "bfloat16"
    own["data"]["generate"]["states"] = states
    recipe, steps = parse_recipe(own), []
    directory = capture(recipe).directory
    monkeypatch.setattr(rescoring, "replay", lambda *args: steps.append(1) or replay(*args))
    assert rescore(directory, sequences=8, teacher=recipe.teacher.model, seed=1).explained
    assert len(steps) == (8 if states == "reuse" else 0)


def test_a_finished_cache_needs_no_model(own, monkeypatch):
    first = capture(parse_recipe(own))
    before = files(first.directory)
    monkeypatch.setattr(capturing, "load_model", lambda *args, **options: pytest.fail("the teacher is not needed"))
    again = capture(parse_recipe(own))
    assert (again.shards_made, again.manifest.cache_id) == (0, first.manifest.cache_id)
    assert files(again.directory) == before


def test_a_second_pass_gives_the_same_numbers_and_says_so(own):
    reused = capture(parse_recipe(own)).directory
    own["cache"]["directory"] += "-fresh"
    own["data"]["generate"]["states"] = "fresh"
    fresh = capture(parse_recipe(own))
    assert fresh.plan.data.splits[0].selected.endswith(", second pass")
    assert texts(reused) == texts(fresh.directory)
    for one, other in zip(open_cache(reused)["train"], open_cache(fresh.directory)["train"], strict=True):
        assert np.allclose(one.rows.label_log_prob, other.rows.label_log_prob, atol=2e-3)


def test_the_validation_split_may_keep_its_responses(own, base_values):
    own["data"]["validation"] = base_values["data"]["validation"]
    own["data"]["columns"] = {}
    own["data"]["train"] = base_values["data"]["validation"] | {"split": "train[:6]"}
    own["data"]["max_length"] = 96
    own["data"]["generate"]["splits"] = "train"
    plan = capture(parse_recipe(own)).plan
    assert [s.selected.partition(" ")[0] for s in plan.data.splits] == ["train[:6]", "train"]
    own["cache"]["directory"] += "-plain"
    own["data"] |= {"source": "dataset", "generate": {}}
    plain = capture(parse_recipe(own)).plan
    assert plan.data.splits[1] == plain.data.splits[1]


def test_conversations_are_answered_after_their_last_question(own, tmp_path):
    talk = [("system", "Be brief."), ("user", "a?"), ("assistant", "one"), ("user", "b?"), ("assistant", "two")]
    rows = [talk, talk[:2], talk[2:3], [("user", " ")]]
    path = tmp_path / "chat.jsonl"
    path.write_text(
        "".join(json.dumps({"messages": [{"role": r, "content": c} for r, c in row]}) + "\n" for row in rows)
    )
    own["data"] |= {"train": {"path": str(path)}, "columns": {}, "validation": {"path": str(path)}}
    recipe = parse_recipe(own)
    done = capture(recipe)
    tokenizer = load_tokenizer(recipe.teacher.model)
    asked = [tokenizer.decode(s.token_ids[: int(np.argmax(s.targets))]) for s in open_cache(done.directory)["train"]]
    begin = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\na?<|im_end|>\n<|im_start|>assistant\n"
    assert asked == [begin + "one<|im_end|>\n<|im_start|>user\nb?<|im_end|>\n<|im_start|>assistant\n", begin]
    assert done.plan.data.splits[0].dropped_empty == 2


def test_plain_prompts(own):
    own["data"]["prompt"] = "plain"
    recipe = parse_recipe(own)
    tokenizer = load_tokenizer(recipe.teacher.model)
    task = prepare(recipe, Silent())
    assert [tokenizer.decode(p.ids) for p in task.asked[0].prompts] == [q + "\n" for q in QUESTIONS]


def interrupted(monkeypatch, after):
    real, calls = Task.answer, []

    def answer_some(self, *args):
        calls.append(1)
        if len(calls) > after:
            raise KeyboardInterrupt
        return real(self, *args)

    monkeypatch.setattr(Task, "answer", answer_some)
    return calls


def test_a_stopped_generation_goes_on_with_the_next_batch(own, monkeypatch):
    whole = capture(parse_recipe(own)).directory
    reference = files(whole)
    own["cache"]["directory"] += "-again"
    recipe = parse_recipe(own)
    with monkeypatch.context() as patch:
        interrupted(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            capture(recipe)
    assert not Path(recipe.cache.directory).exists()
    [spool] = Path(recipe.cache.directory + ".generating").iterdir()
    _, second = sorted(spool.iterdir())
    second.write_bytes(second.read_bytes()[:-100])
    calls, told = interrupted(monkeypatch, 99), Told()
    done = capture(recipe, told)
    assert len(calls) == 2
    assert "1 of 3 batches of answers are there already" in told.messages
    assert files(done.directory) == reference
    assert not spool.exists()


def test_other_settings_have_answers_of_their_own(own, monkeypatch):
    with monkeypatch.context() as patch:
        interrupted(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            capture(parse_recipe(own))
    own["data"]["generate"]["seed"] = 1
    calls, told = interrupted(monkeypatch, 99), Told()
    capture(parse_recipe(own), told)
    assert len(calls) == 3
    [left] = Path(own["cache"]["directory"] + ".generating").iterdir()
    assert any(str(left) in m and "other settings" in m for m in told.messages)


def test_killed_and_gone_on_with(own, tmp_path):
    own["data"]["generate"]["batch_size"] = 1
    reference = files(capture(parse_recipe(own)).directory)
    own["cache"]["directory"] += "-killed"
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(own))
    spool = Path(own["cache"]["directory"] + ".generating")
    child = subprocess.Popen(
        [sys.executable, "-m", "kdcache", "teacher-cache", str(tmp_path / "recipe.yaml")],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not list(spool.glob("*/00001*")) and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert list(spool.glob("*/00000*")) or Path(own["cache"]["directory"]).exists()
    assert files(capture(parse_recipe(own)).directory) == reference
    assert not spool.exists()


def test_workers_share_the_answers_and_the_last_one_makes_the_cache(own):
    reference = files(capture(parse_recipe(own)).directory)
    own["cache"]["directory"] += "-shared"
    recipe = parse_recipe(own)
    first = capture_share(recipe, Worker(0, 2))
    assert isinstance(first, AnswerShare)
    assert (first.batches_made, first.unfinished) == (2, 1)
    last = capture_share(recipe, Worker(1, 2))
    assert isinstance(last, CaptureResult)
    assert files(last.directory) == reference
    assert isinstance(capture_share(recipe, Worker(0, 2)), CaptureResult)


def test_whoever_comes_second_to_the_end_is_not_disturbed(own, monkeypatch):
    """Two workers may both find all answers there; the faster one finishes the cache and takes the answers away."""
    recipe = parse_recipe(own)
    capture_share(recipe, Worker(0, 2))
    real = capturing._make_shards

    def overtaken(*args):
        with monkeypatch.context() as patch:
            patch.setattr(capturing, "_make_shards", real)
            capture(recipe)
        return real(*args)

    monkeypatch.setattr(capturing, "_make_shards", overtaken)
    own["selection"] = {"floors": [0.1, 0.1]}
    recipe = parse_recipe(own)
    assert isinstance(capture_share(recipe, Worker(1, 2)), CaptureResult)


def test_answers_that_vanish_are_a_storage_error(own, monkeypatch):
    own["selection"] = {"floors": [0.1, 0.1]}
    recipe, real = parse_recipe(own), capturing._make_shards

    def after_a_cleaning(*args):
        shutil.rmtree(recipe.cache.directory + ".generating")
        real(*args)

    monkeypatch.setattr(capturing, "_make_shards", after_a_cleaning)
    with pytest.raises(StorageError, match=r"cannot be read any more .* run kdcache teacher-cache again"):
        capture(recipe)


def test_another_recipe_is_refused_before_a_model_is_loaded(own, tmp_path, monkeypatch):
    directory = capture(parse_recipe(own)).directory
    before = files(directory)
    monkeypatch.setattr(
        capturing, "load_model", lambda *args, **options: pytest.fail("refuse before the model is loaded")
    )
    for change, message in (
        ({"generate": {**own["data"]["generate"], "seed": 5}}, "selected.* seed 5"),
        ({"prompt": "plain"}, "data.prompt: 'plain'"),
        ({"train": write_questions(tmp_path / "few.jsonl", QUESTIONS[:-1])}, r"data.splits.0.examples: 8 against 9"),
    ):
        with pytest.raises(PlanMismatchError, match=message):
            capture(parse_recipe({**own, "data": {**own["data"], **change}}))
    with pytest.raises(PlanMismatchError, match=r"selection\.method"):
        capture(parse_recipe({**own, "selection": {"method": "top_k"}}))
    write_questions(tmp_path / "train.jsonl", [*QUESTIONS[:-1], "another?"])
    with pytest.raises(PlanMismatchError, match=r"answers to other prompts .* the data set has changed"):
        capture(parse_recipe(own))
    assert files(directory) == before
    own["cache"]["directory"] = str(tmp_path)
    with pytest.raises(CacheError, match="neither empty nor a cache"):
        capture(parse_recipe(own))


def test_a_damaged_shard_is_made_again_from_new_answers(own):
    done = capture(parse_recipe(own))
    reference = files(done.directory)
    shard = sorted((done.directory / "shards").iterdir())[1]
    shard.write_bytes(shard.read_bytes()[:50])
    assert capture(parse_recipe(own)).shards_made == 1
    assert files(done.directory) == reference


def test_generation_that_never_stops(own, models):
    own["teacher"]["model"] = str(models / "teacher")
    own["data"]["generate"] |= {"max_new_tokens": 3}
    told = Told()
    plan = capture(parse_recipe(own), told).plan
    assert (plan.data.splits[0].truncated, plan.data.splits[0].sequences) == (9, 9)
    early, train, _ = told.warnings
    assert "none of the first 8 answers has come to its end" in early
    assert "train: 9 of 9 answers have no end: they ran into data.generate.max_new_tokens 3" in train
    own["cache"]["directory"] += "-dropped"
    own["data"]["generate"]["unfinished"] = "drop"
    with pytest.raises(
        DataError, match=r"no answer is left: 0 of 9 prompts .* They ran into data\.generate\.max_new_tokens 3"
    ):
        capture(parse_recipe(own))
    assert not Path(own["cache"]["directory"]).exists()


def test_unfinished_answers_can_be_dropped(own):
    kept = capture(parse_recipe(own)).plan.data.splits[0]
    own["cache"]["directory"] += "-dropped"
    own["data"]["generate"]["unfinished"] = "drop"
    left = capture(parse_recipe(own)).plan.data.splits[0]
    assert 0 < kept.truncated < kept.sequences
    assert (left.truncated, left.dropped_no_target, left.sequences) == (
        0,
        kept.truncated,
        kept.sequences - kept.truncated,
    )
    assert left.selected == kept.selected + ", unfinished dropped"


def test_empty_answers_and_useless_prompts_are_counted(own, models, tmp_path, monkeypatch):
    eos = load_tokenizer(str(models / "teacher")).eos_token_id

    def sometimes_silent(logits, sampling, numbers):
        return torch.tensor([eos, 300][-len(logits) :])

    monkeypatch.setattr(decode, "choose", sometimes_silent)
    own["teacher"]["model"] = str(models / "teacher")
    asked = ["one?", "two?", "  ", "long " * 80]
    own["data"] |= {"train": write_questions(tmp_path / "t.jsonl", asked), "max_length": 32}
    own["data"]["generate"] |= {"splits": "train", "batch_size": 2, "max_new_tokens": 2, "temperature": 0.0}
    own["data"]["validation"] = {"path": str(models / "validation.jsonl")}
    own["data"]["columns"] = {}
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"instruction": q}) + "\n" for q in asked))
    told = Told()
    train = capture(parse_recipe(own), told).plan.data.splits[0]
    assert (train.examples, train.dropped_empty, train.dropped_no_target, train.sequences) == (4, 2, 1, 1)
    [line] = [m for m in told.messages if m.startswith("train:")]
    for part in ("1 of 4 prompts answered", "1 ask nothing", "1 leave no room within 32", "1 got an empty answer"):
        assert part in line
    (tmp_path / "t.jsonl").write_text(json.dumps({"instruction": " "}) + "\n")
    own["cache"]["directory"] += "-none"
    with pytest.raises(DataError, match="of 1 examples 1 ask nothing and 0 leave no room"):
        capture(parse_recipe(own))


def test_a_dry_run_answers_one_batch_and_writes_nothing(own, monkeypatch):
    calls = interrupted(monkeypatch, 1)
    found = estimate(parse_recipe(own))
    assert len(calls) == 1
    assert "to answer 11 prompts in 3 batches of 4" in found.answering
    assert not list(Path(own["cache"]["directory"]).parent.glob("cache*"))
    monkeypatch.undo()
    made = capture(parse_recipe(own))
    assert 0.4 < found.positions / made.positions_made < 2.5
    assert found.cache_bytes > 0
    assert found.waiting_bytes > 0


def test_what_the_command_says(own, tmp_path, monkeypatch, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(own))

    def said(*options):
        monkeypatch.setattr(sys, "argv", ["kdcache", "teacher-cache", str(path), *options])
        with pytest.raises(SystemExit) as exited:
            main()
        assert not exited.value.code
        return capsys.readouterr().out

    dry = said("--dry-run")
    assert "to answer 11 prompts in 3 batches of 4" in dry
    assert f"of hidden states wait in {own['cache']['directory']}.generating" in dry
    assert "2 batches answered" in said("--worker", "0/2")
    assert "1 of 3 batches" not in said("--worker", "1/2")
    again = said()
    assert "complete already" in again


def test_states_that_are_not_finite_and_memory_that_is_not_there(forward, monkeypatch):
    teacher, _ = forward
    real = decode._step
    monkeypatch.setattr(decode, "_step", lambda *args: real(*args) * float("nan"))
    with pytest.raises(ModelError, match="no finite distribution while it answers"):
        answer(teacher, prompts(2), [2, 2], sampling=Sampling(), stop=[])

    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(decode, "_step", full)
    with pytest.raises(ModelError, match=r"answering 2 prompts .* lower data\.generate\.batch_size"):
        answer(teacher, prompts(2), [2, 2], sampling=Sampling(), stop=[])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stream": True}, r"data\.stream is for data\.source dataset"),
        ({"token_budget": "10k"}, r"data\.token_budget is for data\.source dataset"),
        ({"pack": True}, r"data\.pack is for data\.source dataset"),
        ({"shape": "text"}, r"data\.shape text has no prompts"),
        ({"source": "dataset"}, r"data\.generate goes with data\.source generate"),
        ({"generate": {"top_p": 0.9}}, r"data\.generate\.top_p and .* 0 draws none"),
        ({"generate": {"top_k": 3}}, r"data\.generate\.top_k choose .* 0 draws none"),
        ({"generate": {"temperature": -1}}, r"data\.generate\.temperature"),
        ({"generate": {"max_new_tokens": 0}}, r"data\.generate\.max_new_tokens"),
        (
            {"generate": {"max_tokens": 5}},
            r"unknown recipe key data\.generate\.max_tokens; did you mean data\.generate",
        ),
    ],
)
def test_contradictions_are_named(own, change, message):
    with pytest.raises(RecipeError, match=message):
        parse_recipe({**own, "data": {**own["data"], **change}})


def test_data_without_prompts_and_recipes_whose_text_is_not_written_yet(own, tmp_path):
    (tmp_path / "train.jsonl").write_text(json.dumps({"text": "once"}) + "\n")
    with pytest.raises(DataError, match="should have the columns question or messages, found text"):
        capture(parse_recipe(own))
    with pytest.raises(RecipeError, match="give its cache instead of the recipe"):
        plan_cache(parse_recipe(own), Silent())


def test_a_recorded_recipe_can_be_read_again(own):
    recipe = parse_recipe(own)
    assert parse_recipe(recipe.model_dump(mode="json")) == recipe
