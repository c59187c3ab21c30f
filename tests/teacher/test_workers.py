"""Who makes which shards, and that any number of workers ends in the bytes of one."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from kdcache.cache import layout
from kdcache.cache.writer import CacheWriter
from kdcache.cli import main
from kdcache.errors import PlanMismatchError, RecipeError
from kdcache.progress import Silent
from kdcache.recipe import parse_recipe
from kdcache.teacher import capture as capturing
from kdcache.teacher.capture import CaptureResult, ShareResult, capture, capture_share
from kdcache.teacher.workers import ALONE, Worker, which_worker
from tests.crash.small_run import files

ROOT = Path(__file__).parent.parent.parent
TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "none"}
ARRAY = {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "1",
         "SLURM_ARRAY_TASK_MAX": "10", "SLURM_ARRAY_TASK_STEP": "3"}  # fmt: skip
STEP = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0"}


@pytest.mark.parametrize(
    ("option", "environment", "expected"),
    [
        (None, {}, ALONE),
        ("2/3", {}, Worker(2, 3)),
        (None, TORCHRUN, Worker(5, 8, 1)),
        (None, ARRAY, Worker(2, 4)),
        (None, STEP, Worker(1, 2, 0)),
        (None, {**ARRAY, **STEP}, Worker(5, 8, 0)),
        (None, {**ARRAY, **STEP, **TORCHRUN}, Worker(5, 8, 1)),
        ("0/1", {**ARRAY, **STEP, **TORCHRUN}, Worker(0, 1, 1)),
        # The script of a batch job runs once, whatever number of tasks was asked for.
        (None, {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, Worker(0, 1, 0)),
        # One task of an array that is run again makes all that is missing.
        (
            None,
            {**ARRAY, "SLURM_ARRAY_TASK_COUNT": "1", "SLURM_ARRAY_TASK_MIN": "7", "SLURM_ARRAY_TASK_MAX": "7"},
            ALONE,
        ),
        (None, {"RANK": "", "WORLD_SIZE": ""}, ALONE),
    ],
)
def test_a_worker_is_told_by_the_option_then_torchrun_then_slurm(option, environment, expected):
    assert which_worker(option, environment) == expected


@pytest.mark.parametrize(
    ("option", "environment", "message"),
    [
        ("3/3", {}, "no worker 3 of 3"),
        ("0/0", {}, "no worker 0 of 0"),
        ("1", {}, "should be i/n"),
        ("-1/2", {}, "should be i/n"),
        ("a/b", {}, "should be i/n"),
        (None, {"RANK": "1"}, "RANK and WORLD_SIZE"),
        (None, {"WORLD_SIZE": "2"}, "RANK and WORLD_SIZE"),
        (None, {"RANK": "2", "WORLD_SIZE": "2"}, "no worker 2 of 2"),
        (None, {"RANK": "one", "WORLD_SIZE": "2"}, "RANK should be a number, found 'one'"),
        (None, {**TORCHRUN, "LOCAL_RANK": "-1"}, "LOCAL_RANK should be a number"),
        (None, {"SLURM_ARRAY_TASK_ID": "7"}, "SLURM_ARRAY_TASK_COUNT"),
        (None, {**ARRAY, "SLURM_ARRAY_TASK_STEP": "0"}, "is 0"),
        (None, {**ARRAY, "SLURM_ARRAY_TASK_ID": "6"}, "list with gaps"),
        (None, {**ARRAY, "SLURM_ARRAY_TASK_ID": "13"}, "list with gaps"),
        (None, {**ARRAY, "SLURM_ARRAY_TASK_MAX": "40"}, "list with gaps"),
        (None, {**STEP, "SLURM_PROCID": "2"}, "no worker 2 of 2"),
    ],
)
def test_values_that_make_no_sense_are_refused_with_a_way_out(option, environment, message):
    with pytest.raises(RecipeError, match=message) as caught:
        which_worker(option, environment)
    assert "--worker i/n" in str(caught.value)


def test_shares_cover_every_shard_once():
    for total in (0, 1, 7, 12):
        for count in (1, 2, 5, 20):
            shares = [number for index in range(count) for number in Worker(index, count).shards(total)]
            assert sorted(shares) == list(range(total))


def test_workers_of_a_machine_take_a_gpu_each_where_it_has_several(monkeypatch):
    def places(gpus, *devices):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        return [Worker(5, 8, local=5).device(device) for device in devices]

    assert places(4, "auto", "cuda", "cpu") == ["cuda:1", "cuda:1", "cpu"]
    assert places(1, "auto", "cuda") == ["auto", "cuda"]
    assert places(0, "auto", "cuda") == ["auto", "cuda"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert Worker(1, 2).device("auto") == "auto"


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_three_workers_one_after_another_make_the_bytes_of_one(values, shared_cache, order):
    recipe = parse_recipe(values)
    results = [capture_share(recipe, Worker(index, 3)) for index in order]
    assert [type(r) for r in results] == [ShareResult, ShareResult, CaptureResult]
    assert set(results[0].unfinished) == {
        n for i in order[1:] for n in Worker(i, 3).shards(len(results[0].plan.shards))
    }
    assert set(results[1].unfinished) == set(Worker(order[2], 3).shards(len(results[0].plan.shards)))
    assert sum(r.shards_made for r in results) == len(results[0].plan.shards)
    assert files(results[0].directory) == files(shared_cache)
    # Again: each reads its own shards, nothing is made and nothing changes.
    again = [capture_share(recipe, Worker(index, 3)) for index in order]
    assert [(type(r), r.shards_made) for r in again] == [(CaptureResult, 0)] * 3
    assert files(results[0].directory) == files(shared_cache)


def test_a_lone_run_makes_what_a_lost_worker_left(values, shared_cache):
    recipe = parse_recipe(values)
    assert isinstance(capture_share(recipe, Worker(1, 4)), ShareResult)
    result = capture(recipe)
    assert 0 < result.shards_made < len(result.plan.shards)
    assert files(result.directory) == files(shared_cache)


def test_more_workers_than_shards_is_no_error(values, shared_cache):
    recipe = parse_recipe(values)
    capture(recipe)
    result = capture_share(recipe, Worker(998, 999))
    assert (type(result), result.shards_made) == (CaptureResult, 0)
    assert files(result.directory) == files(shared_cache)


def test_a_broken_shard_of_another_worker_is_left_to_it(values, shared_cache):
    recipe = parse_recipe(values)
    directory = capture(recipe).directory
    shard = directory / layout.SHARD_DIRECTORY / layout.shard_name(1)
    shard.write_bytes(shard.read_bytes()[:-1])
    first = capture_share(recipe, Worker(0, 2))
    assert (type(first), first.unfinished) == (ShareResult, (1,))
    second = capture_share(recipe, Worker(1, 2))
    assert (type(second), second.shards_made) == (CaptureResult, 1)
    assert files(directory) == files(shared_cache)


def test_who_comes_second_with_other_floors_takes_those_that_are_there(values, shared_cache, monkeypatch):
    """Another worker writes its plan after this one has looked for one, and another machine found other floors."""
    recipe, real = parse_recipe(values), capturing.find_floors
    winner = []

    def late(planned, sample, *, progress):
        found = real(planned, sample, progress=progress)
        winner.append(found)
        CacheWriter(values["cache"]["directory"], found.plan, found.tokens.tokens)
        return found.with_floors(tuple(floor * 2 for floor in found.plan.selection.floors))

    monkeypatch.setattr(capturing, "find_floors", late)
    result = capture(recipe)
    assert result.plan == winner[0].plan
    assert files(result.directory) == files(shared_cache)


def test_who_comes_second_with_another_plan_is_refused(values, monkeypatch):
    real = capturing.find_floors

    def late(planned, sample, *, progress):
        found = real(planned, sample, progress=progress)
        teacher = found.plan.teacher.model_copy(update={"dtype": "bfloat16"})
        other = found.plan.model_copy(update={"teacher": teacher})
        CacheWriter(values["cache"]["directory"], other, found.tokens.tokens)
        return found

    monkeypatch.setattr(capturing, "find_floors", late)
    with pytest.raises(PlanMismatchError, match=r"teacher\.dtype: 'float32' against 'bfloat16'"):
        capture(parse_recipe(values), Silent())


def started(*argv):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", *map(str, argv)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def recipe(values, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_torchrun_starts_workers_that_make_the_bytes_of_one(recipe, values, shared_cache):
    process = started(
        "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0", "-m", "kdcache", "teacher-cache", recipe
    )
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert "worker 0 of 2" in out
    assert "worker 1 of 2" in out
    assert out.count("cache id") >= 1
    assert files(Path(values["cache"]["directory"])) == files(shared_cache)


def test_a_worker_that_is_killed_beside_another_costs_no_byte(values, tmp_path, monkeypatch, capsys):
    # Many small shards, so that the kill comes before the last.
    values["cache"]["positions_per_shard"] = 12
    whole = capture(
        parse_recipe({**values, "cache": {**values["cache"], "directory": str(tmp_path / "whole")}})
    ).directory
    directory, path = Path(values["cache"]["directory"]), tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    processes = [started("kdcache", "teacher-cache", path, "--worker", f"{index}/2") for index in range(2)]
    deadline = time.monotonic() + 120
    while not (directory / layout.SHARD_DIRECTORY / layout.shard_name(1)).exists():
        assert time.monotonic() < deadline
        time.sleep(0.002)
    processes[1].send_signal(signal.SIGKILL)
    out, err = processes[0].communicate()
    processes[1].communicate()
    assert (processes[0].returncode, processes[1].returncode) == (0, -signal.SIGKILL), err
    assert "worker 0 of 2" in out
    assert "still to come from other workers" in out
    monkeypatch.setattr(sys, "argv", ["kdcache", "teacher-cache", str(path)])
    with pytest.raises(SystemExit) as exited:
        main()
    assert not exited.value.code
    assert "are there already" in capsys.readouterr().out
    assert files(directory) == files(whole)


@pytest.mark.parametrize(("option", "message"), [("2/2", "no worker 2 of 2"), ("0/2", "kdcache embedded")])
def test_what_workers_cannot_do_is_one_line_and_exit_2(values, tmp_path, monkeypatch, capsys, option, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**values, "embedded": {"directory": str(tmp_path / "none")}}))
    monkeypatch.setattr(sys, "argv", ["kdcache", "teacher-cache", str(path), "--worker", option])
    with pytest.raises(SystemExit) as exited:
        main()
    err = capsys.readouterr().err
    assert (exited.value.code, err.count("\n")) == (2, 1)
    assert message in err
    assert not (tmp_path / "none").exists()
