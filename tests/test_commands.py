"""The commands as a user runs them: the whole spine at toy size, kills and resumes, and every bad input."""

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from kdcache.cli import main

ROOT = Path(__file__).parent.parent


@pytest.fixture
def recipe(values, tmp_path):
    """Path of a recipe file with this test's values; call it again after changing them."""

    def write():
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(values))
        return str(path)

    return write


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a command in this process: (exit code, stdout, stderr)."""

    def call(*argv):
        monkeypatch.setattr(sys, "argv", ["kdcache", *map(str, argv)])
        with pytest.raises(SystemExit) as exited:
            main()
        out, err = capsys.readouterr()
        return exited.value.code or 0, out, err

    return call


def files(directory):
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(Path(directory).rglob("*")) if p.is_file()}


def test_the_whole_spine(run, recipe, values):
    path = recipe()
    code, out, _ = run("teacher-cache", path, "--dry-run")
    assert code == 0
    assert "bytes per position" in out
    assert not Path(values["cache"]["directory"]).exists()
    code, out, err = run("teacher-cache", path)
    assert (code, err) == (0, "")
    assert "48 of 48 examples" in out
    assert "cache id" in out
    before = files(values["cache"]["directory"])
    code, out, _ = run("teacher-cache", path)
    assert "complete already" in out
    assert files(values["cache"]["directory"]) == before
    assert run("teacher-cache", path, "--if-incomplete")[0] == 0

    code, out, err = run("train-student", path)
    assert (code, err) == (0, "")
    for expected in ("student before", "student after", "teacher", "perplexity", "run.json"):
        assert expected in out
    directory = Path(values["output"])
    record = json.loads((directory / "run.json").read_text())
    assert set(record["scores"]) == {"student before", "student after", "teacher"}
    assert record["cache_id"]
    assert record["versions"]["torch"]
    for name in ("log.csv", "loss.png", "table.md", "model/adapter_model.safetensors", "model/tokenizer.json"):
        assert (directory / name).stat().st_size > 0, name
    assert (directory / "loss.png").read_bytes()[:4] == b"\x89PNG"

    code, out, _ = run("evaluate", directory)
    assert code == 0
    assert f"{record['scores']['student after']['loss']:.4f}" in out
    assert f"{record['scores']['student before']['loss']:.4f}" in out

    code, out, _ = run("inspect", values["cache"]["directory"])
    assert code == 0
    assert "Qwen2ForCausalLM" in out
    code, out, _ = run("verify", values["cache"]["directory"])
    assert code == 0
    assert "is whole" in out
    shard = Path(values["cache"]["directory"]) / "shards" / "00001.safetensors.zst"
    shard.write_bytes(shard.read_bytes()[:-1])
    code, out, _ = run("verify", values["cache"]["directory"])
    assert code == 1
    assert "00001.safetensors.zst" in out


def kdcache(*argv, **options):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    # Tests started in the background of a shell inherit an ignored Ctrl-C, and would hand it on.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(
            [sys.executable, "-m", "kdcache", *map(str, argv)], env=environment, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, **options,
        )  # fmt: skip
    finally:
        signal.signal(signal.SIGINT, before)


def wait_for(condition, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None or condition(), process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_killed_teacher_run_goes_on_and_ends_in_the_same_bytes(recipe, values, shared_cache):
    directory = Path(values["cache"]["directory"])
    path = recipe()
    for shards in (1, 3):
        process = kdcache("teacher-cache", path)
        wait_for(lambda n=shards: len(list((directory / "shards").glob("0*"))) >= n, process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    # What a kill in the middle of a write leaves behind.
    (directory / "shards" / ".tmp-00009.safetensors.zst-dead").write_bytes(b"half")
    process = kdcache("teacher-cache", path)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert "are there already" in out or "complete already" in out
    assert files(directory) == files(shared_cache)


def test_a_killed_training_goes_on_and_ends_in_the_same_student(recipe, values, shared_cache, run):
    values["cache"]["directory"] = str(shared_cache)
    values["training"] |= {"save_steps": 2, "epochs": 2, "logging_steps": 1}
    assert run("train-student", recipe())[0] == 0
    whole = Path(values["output"])
    values["output"] += "-killed"
    killed = Path(values["output"])
    path = recipe()
    for step in (2, 10):
        process = kdcache("train-student", path, "--resume")
        wait_for(lambda n=step: (killed / "checkpoints" / f"checkpoint-{n}" / "trainer_state.json").exists(), process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    # A checkpoint that the kill cut short is passed over.
    newest = max((killed / "checkpoints").glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]))
    shutil.copytree(newest, killed / "checkpoints" / "checkpoint-23")
    state = killed / "checkpoints" / "checkpoint-23" / "optimizer.pt"
    state.write_bytes(state.read_bytes()[:100])
    process = kdcache("train-student", path, "--resume")
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert "checkpoint-23 is not whole" in out
    assert "going on from checkpoint-" in out
    same = "model/adapter_model.safetensors"
    assert (killed / same).read_bytes() == (whole / same).read_bytes()
    steps = [row.split(",")[0] for row in (killed / "log.csv").read_text().splitlines()]
    assert steps == [row.split(",")[0] for row in (whole / "log.csv").read_text().splitlines()]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_a_term_signal_say_how_to_go_on(recipe, values, number):
    # A shard for every sequence: the run is long enough for the signal to come in between on a busy machine, too.
    values["cache"]["positions_per_shard"] = 1
    process = kdcache("teacher-cache", recipe())
    wait_for(lambda: list((Path(values["cache"]["directory"]) / "shards").glob("0*")), process)
    process.send_signal(number)
    _, err = process.communicate()
    assert process.returncode == 130
    assert err.count("\n") == 1
    assert "run the same command again" in err


def test_a_failing_writer_stops_the_run_at_once(run, recipe, values, monkeypatch):
    path = recipe()
    real = os.fsync
    calls = []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > 8:
            raise OSError(28, "No space left on device")
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        code, _, err = run("teacher-cache", path)
    assert code == 2
    assert err.count("\n") == 1
    assert "No space left on device" in err
    assert "free some space and run the same command again" in err
    shards = Path(values["cache"]["directory"]) / "shards"
    assert 0 < len(list(shards.glob("0*"))) < 6
    assert not list(shards.glob(".tmp-*"))
    code, out, _ = run("teacher-cache", path)
    assert code == 0
    assert "are there already" in out


def set_key(values, key, value):
    *path, last = key.split(".")
    for name in path:
        values = values[name]
    values[last] = value


BAD_TEACHER = {
    "unknown key": ({"loss.temprature": 1}, "did you mean loss.temperature"),
    "out of range": ({"loss.temperature": -2}, "recipe key loss.temperature"),
    "data missing": ({"data.train.path": "/nowhere/data.jsonl"}, "does not exist"),
    "data empty": ({"data.train.path": "EMPTY"}, "is empty"),
    "data columns": ({"data.train.path": "COLUMNS"}, "should have the columns"),
    "data encoding": ({"data.train.path": "LATIN"}, "not UTF-8"),
    "no target left": ({"data.max_length": 3}, "no example has a response token"),
    "model missing": ({"teacher.model": "/nowhere/model"}, "does not exist"),
    "no tokenizer": ({"teacher.model": "BARE"}, "no usable tokenizer"),
    "no network": ({"teacher.model": "nobody/has-this"}, "the Hub cannot be reached"),
    "no end token": ({"teacher.model": "ENDLESS"}, "no end-of-sequence token"),
    "no weights": ({"teacher.model": "WEIGHTLESS"}, "has no weights"),
    "k above V": ({"selection": {"method": "top_k", "k": 60000}}, "selection.k is 60000, but the vocabulary"),
    "budget below the text": ({"selection.bytes_per_position": 8}, "selection.bytes_per_position 8 is too small"),
    "no cuda": ({"teacher.device": "cuda"}, "no CUDA device"),
    "not a cache": ({"cache.directory": "OCCUPIED"}, "neither empty nor a cache"),
    "no data section": ({"data": None}, "needs the recipe section data"),
}


@pytest.fixture
def bad_paths(tmp_path, models):
    """Files and folders that are wrong in one way each."""
    empty, columns, latin = tmp_path / "e.jsonl", tmp_path / "c.jsonl", tmp_path / "l.jsonl"
    empty.write_bytes(b"")
    columns.write_text('{"question": "q"}\n')
    latin.write_bytes('{"instruction": "caf\u00e9", "output": "x"}\n'.encode("latin-1"))
    bare, endless, weightless, occupied = (tmp_path / n for n in ("bare", "endless", "weightless", "occupied"))
    shutil.copytree(models / "teacher", bare)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bare / name).unlink()
    shutil.copytree(models / "teacher", endless)
    config = json.loads((endless / "tokenizer_config.json").read_text())
    config["eos_token"] = None
    (endless / "tokenizer_config.json").write_text(json.dumps(config))
    shutil.copytree(models / "teacher", weightless)
    (weightless / "model.safetensors").unlink()
    occupied.mkdir()
    (occupied / "thesis.tex").write_text("x")
    return {
        "EMPTY": empty, "COLUMNS": columns, "LATIN": latin, "BARE": bare, "ENDLESS": endless, "WEIGHTLESS": weightless,
        "OCCUPIED": occupied,
    }  # fmt: skip


@pytest.mark.parametrize("case", sorted(BAD_TEACHER))
def test_bad_input_to_teacher_cache_is_one_line_and_exit_2(case, run, recipe, values, bad_paths, tmp_path):
    changes, message = BAD_TEACHER[case]
    values["loss"] = {}
    for key, value in changes.items():
        set_key(values, key, str(bad_paths[value]) if isinstance(value, str) and value in bad_paths else value)
    code, _, err = run("teacher-cache", recipe())
    assert code == 2, err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert not list(tmp_path.glob("cache/shards/0*"))


def test_bad_input_to_train_student_is_one_line_and_exit_2(run, recipe, values, shared_cache, models, tmp_path):
    whole = copy.deepcopy(values)

    def refused(message, **changes):
        values.clear()
        values.update(copy.deepcopy(whole))
        for key, value in changes.items():
            set_key(values, key.replace("__", "."), value)
        code, _, err = run("train-student", recipe())
        assert code == 2, err
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert message in err

    refused("is not a cache")
    incomplete = tmp_path / "incomplete"
    shutil.copytree(shared_cache, incomplete)
    (incomplete / "shards" / "00002.safetensors.zst").unlink()
    refused("shards are missing: 00002.safetensors.zst", cache__directory=str(incomplete))
    for name, change in (
        ("truncated", lambda data: data[:-10]),
        ("flipped", lambda data: data[:-1] + bytes([data[-1] ^ 1])),
        ("foreign", lambda data: b"not a shard"),
    ):
        broken = tmp_path / name
        shutil.copytree(shared_cache, broken)
        for path in (broken / "shards").iterdir():
            path.write_bytes(change(path.read_bytes()))
        refused("is damaged", cache__directory=str(broken))
    refused("does not exist", cache__directory=str(shared_cache), student__model="/nowhere/model")
    refused("no CUDA device", cache__directory=str(shared_cache), student__device="cuda")
    refused(
        "selection.bytes_per_position is 49.0, in the cache 48.0",
        cache__directory=str(shared_cache),
        selection__bytes_per_position=49,
    )
    refused(
        "selection.floors is (0.1, 0.1), in the cache",
        cache__directory=str(shared_cache),
        selection={"floors": [0.1, 0.1]},
    )
    other = tmp_path / "other-tokens"
    shutil.copytree(models / "student", other)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (other / name).write_text((other / name).read_text().replace("<|im_start|>", "<|turn|>"))
    refused("differs from the cache's in 1 of", cache__directory=str(shared_cache), student__model=str(other))
    # Nothing of this has started a run, so the repaired recipe needs no flag.
    assert not Path(whole["output"]).exists()


def test_a_cache_of_another_plan_is_refused_naming_the_fields(run, recipe, values, shared_cache, tmp_path):
    values["cache"]["directory"] = str(shutil.copytree(shared_cache, tmp_path / "copy"))
    values["selection"]["bytes_per_position"] = 49
    code, _, err = run("teacher-cache", recipe())
    assert (code, err.count("\n")) == (2, 1)
    assert "selection.bytes_per_position: 49.0 against 48.0" in err
    assert files(values["cache"]["directory"]) == files(shared_cache)


def test_an_error_from_a_real_process_has_no_traceback(tmp_path):
    process = kdcache("train-student", tmp_path / "none.yaml")
    out, err = process.communicate()
    assert (process.returncode, out) == (2, "")
    assert err == f"error: no recipe at {tmp_path / 'none.yaml'}; recipes/embedded.yaml is the one to start from\n"
