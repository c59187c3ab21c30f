"""QLoRA on CUDA through `distill`: bfloat16 with a paged 8-bit optimizer, half precision with a scaler, resume."""

import copy
import math
import shutil

import bitsandbytes
import pytest
import torch
from safetensors.torch import load_file

from kdcache.cache.reader import open_cache
from kdcache.evaluate.perplexity import student_score
from kdcache.models import attach_lora, load_model
from kdcache.recipe import parse_recipe
from kdcache.student.collate import Collator
from kdcache.student.distill import distill
from kdcache.student.forward import loss_sums
from kdcache.student.log import read_log
from kdcache.student.trainer import DistillationTrainer
from tests.gpu.device import DEVICE, cuda_alone, on_gpu, repeatable

pytestmark = on_gpu


@pytest.fixture
def qlora(values, shared_cache):
    """Recipe values of the reference settings in miniature, on the device."""
    values["cache"]["directory"] = str(shared_cache)
    values["student"] |= {
        "quantization": "nf4", "dtype": "bfloat16", "device": DEVICE, "lora": {"r": 8, "alpha": 16, "dropout": 0.05},
    }  # fmt: skip
    values["training"] |= {
        "optimizer": "paged_adamw_8bit", "precision": "bf16", "gradient_checkpointing": True, "learning_rate": 3e-3,
        "max_steps": 24, "logging_steps": 1, "save_steps": 8,
    }  # fmt: skip
    return values


def assert_learnt(record):
    """Every logged number is finite, and the loss fell, on the training data and on the validation split."""
    log = read_log(record.output / "log.csv")
    assert len(log) == record.values["steps"]
    for row in log:
        assert all(math.isfinite(row[key]) for key in ("loss", "ce", "kl")), row
    quarter = len(log) // 4
    assert sum(row["loss"] for row in log[-quarter:]) < sum(row["loss"] for row in log[:quarter])
    assert record.scores["student after"]["loss"] < record.scores["student before"]["loss"]


def test_bfloat16_with_a_paged_optimizer_learns(qlora):
    record = distill(parse_recipe(qlora))
    assert_learnt(record)
    assert record.values["parameters"]["trainable"] < record.values["parameters"]["total"]


def test_int8_students_train(qlora):
    qlora["student"]["quantization"] = "int8"
    qlora["training"]["max_steps"] = 4
    record = distill(parse_recipe(qlora))
    assert all(math.isfinite(row["loss"]) for row in read_log(record.output / "log.csv"))


@cuda_alone
@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_half_precision_scales_its_gradients_and_learns(qlora, quantization, monkeypatch):
    """A scaler that starts too high skips steps until it fits; an overflow of that kind is no error."""
    scales = []
    update = torch.amp.GradScaler.update

    def spy(scaler, *args, **kwargs):
        update(scaler, *args, **kwargs)
        scales.append(scaler.get_scale())

    monkeypatch.setattr(torch.amp.GradScaler, "update", spy)
    qlora["student"] |= {"quantization": quantization, "dtype": "float16" if quantization == "nf4" else "float32"}
    qlora["training"] |= {"precision": "fp16", "max_steps": 32}
    record = distill(parse_recipe(qlora))
    assert_learnt(record)
    assert len(scales) == record.values["steps"]


class StoppedError(Exception):
    """What ends a run in the middle, in the test's own hands."""


@pytest.mark.parametrize("kind", ["qlora", "full"])
def test_a_run_that_was_stopped_ends_in_the_same_student(qlora, monkeypatch, kind):
    """All weights as well: a matrix of LoRA is too small for the optimizer's 8-bit and paged states here."""
    if kind == "full":
        qlora["student"] |= {"quantization": "none", "dtype": "float32", "lora": None}
    whole = copy.deepcopy(qlora)
    whole["output"] += "-whole"
    with repeatable():
        expected = distill(parse_recipe(whole))
        step = DistillationTrainer.training_step

        def stop(trainer, *args, **kwargs):
            if trainer.state.global_step == 11:
                raise StoppedError
            return step(trainer, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(DistillationTrainer, "training_step", stop)
            with pytest.raises(StoppedError):
                distill(parse_recipe(qlora))
        found = distill(parse_recipe(qlora), resume=True)
    assert found.values["resumed_at"] == 8
    if kind == "full" and DEVICE == "cuda":
        assert bitsandbytes.functional.GlobalPageManager.get_instance().paged_tensors
    there, here = (load_file(next((r.output / "model").glob("*.safetensors"))) for r in (expected, found))
    assert there.keys() == here.keys()
    for name, weight in there.items():
        assert torch.equal(weight, here[name]), name
    assert found.scores == expected.scores
    shutil.rmtree(expected.output)


@cuda_alone
def test_out_of_memory_halves_the_forward_pass_and_goes_on(qlora, monkeypatch):
    """The allocator's own refusal, and not an imitation of it."""
    qlora["training"] |= {"batch_size": 4, "max_steps": 6}
    step, tried = DistillationTrainer.training_step, []

    def greedy(trainer, model, inputs, *args, **kwargs):
        tried.append(len(inputs["input_ids"]))
        if tried[-1] > 2 and trainer.state.global_step == 3:
            torch.empty(4 * torch.cuda.mem_get_info()[1], dtype=torch.uint8, device=DEVICE)
        return step(trainer, model, inputs, *args, **kwargs)

    monkeypatch.setattr(DistillationTrainer, "training_step", greedy)
    record = distill(parse_recipe(qlora))
    assert record.values["steps"] == 6
    assert tried == [4, 4, 4, 4, *[2] * 6]


def test_four_bit_gradients_are_the_same_after_an_evaluation_forward(models, shared_cache):
    cache = open_cache(shared_cache)
    batch = Collator(cache.plan.tokenizer.pad_id, 2.0)([(i, cache["train"][i]) for i in range(4)])
    batch = {name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}

    def gradients(evaluate_first):
        torch.manual_seed(0)
        model = load_model(str(models / "student"), quantization="nf4", dtype="bfloat16", device=DEVICE)
        model = attach_lora(model, r=4, alpha=8, dropout=0.0, targets="all-linear", quantized=True)
        if evaluate_first:
            student_score(model, cache["validation"], batch_size=4, precision="bf16")
        model.train()
        with repeatable(), torch.autocast(DEVICE, torch.bfloat16):
            sums = loss_sums(
                model, model, batch, vocab_size=cache.vocab_size, temperature=2.0, ce_weight=0.5, kd_weight=0.5
            )
        sums.total.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    before, after = gradients(False), gradients(True)
    assert before.keys() == after.keys()
    assert any(float(g.norm()) > 0 for g in before.values())
    for name in before:
        assert torch.equal(before[name], after[name]), name


def test_a_student_scores_on_the_device_as_on_the_cpu(models, shared_cache):
    validation = open_cache(shared_cache)["validation"]
    scores = [
        student_score(load_model(str(models / "student"), dtype="float32", device=device), validation, batch_size=4)
        for device in ("cpu", DEVICE)
    ]
    assert scores[1].loss == pytest.approx(scores[0].loss, rel=1e-4)
    assert scores[1].kl == pytest.approx(scores[0].kl, rel=1e-3, abs=1e-5)
    assert scores[1].tokens == scores[0].tokens
