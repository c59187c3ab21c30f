"""Sharded students: two processes under FSDP2, and under DeepSpeed's ZeRO where it is installed, are one process.

Steps of plain SGD with a learning rate of 1: equal weights are equal gradients.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent.parent
KINDS = ("full", "lora", "nf4")


def train(shared_cache, models, engine, processes, folder):
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
        "DS_ACCELERATOR": "cpu",
    }
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
        str(ROOT / "tests/student/fsdp_processes.py"), str(shared_cache), str(models / "student"), engine,
        str(8 // processes), str(folder),
    ]  # fmt: skip
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-4000:]
    return folder


def outcome(folder, kind):
    """The record of a training, and the weights it saved; a tied head may be saved under both of its names."""
    (weights,) = (folder / kind / "model").glob("*.safetensors")
    tensors = {k: v for k, v in load_file(weights).items() if k != "lm_head.weight"}
    return json.loads((folder / kind / "record.json").read_text()), tensors


def assert_same(found, expected):
    (record, weights), (one, reference) = found, expected
    assert record["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert record["ce_sum"] == pytest.approx(one["ce_sum"], rel=1e-5)
    assert weights.keys() == reference.keys()
    assert all(float((weights[n] - w).abs().max()) < 2e-6 for n, w in reference.items())


@pytest.fixture(scope="module")
def one_process(shared_cache, models, tmp_path_factory):
    return train(shared_cache, models, "none", 1, tmp_path_factory.mktemp("one"))


def test_fsdp_is_one_process_and_resumes(shared_cache, models, one_process, tmp_path):
    start = load_file(models / "student/model.safetensors")
    moved = outcome(one_process, "full")[1]
    assert max(float((moved[n] - w).abs().max()) for n, w in start.items() if n in moved) > 1e-2

    found = train(shared_cache, models, "fsdp", 2, tmp_path)
    for kind in KINDS:
        record, weights = outcome(found, kind)
        assert record["engine"] == "FSDP"
        assert_same((record, weights), outcome(one_process, kind))
    # The embeddings, which are the head as well, and what 4 bits are kept in: all of it is cut in two.
    for kind, name in (("full", "embed_tokens.weight"), ("nf4", "q_proj.base_layer.weight")):
        assert any(n.endswith(name) for n in outcome(found, kind)[0]["sharded"]), kind
    assert_same(outcome(found, "resumed"), outcome(found, "whole"))


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_zero_is_one_process(shared_cache, models, one_process, tmp_path, engine):
    found = train(shared_cache, models, engine, 2, tmp_path)
    for kind in KINDS:
        record, weights = outcome(found, kind)
        assert record["engine"] == "DEEPSPEED"
        assert bool(record["partitioned"]) == (engine == "zero3")
        assert_same((record, weights), outcome(one_process, kind))
