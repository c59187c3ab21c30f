"""The loss in other people's hands: plain loops, TRL's SFTTrainer, and two processes instead of one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kdcache.cache.reader import open_cache
from kdcache.models import head_of, load_model
from kdcache.student.collate import IGNORED, Collator
from kdcache.student.loss import DistillationLoss, SparseTeacher
from kdcache.student.trainer import CachedDistillation, SplitDataset

ROOT = Path(__file__).parent.parent.parent
DISTILLATION = {"temperature": 2.0, "ce_weight": 0.5, "kd_weight": 0.5}


def test_a_plain_loop_with_the_module_learns(models, shared_cache):
    cache = open_cache(shared_cache)
    split = cache.split("train")
    batch = Collator(cache.plan.tokenizer.pad_id, 2.0)([(i, split[i]) for i in range(8)])
    model = load_model(str(models / "student"), dtype="float32", device="cpu").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    loss = DistillationLoss(**DISTILLATION, vocab_size=cache.vocab_size)
    following = batch["labels"][:, 1:]
    counts = following != IGNORED
    teacher = SparseTeacher(
        batch["teacher_ids"], batch["teacher_log_probs"], batch["teacher_log_tail"], batch["teacher_log_weights"]
    )
    history = []
    for _ in range(12):
        states = model.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        sums = loss(states[:, :-1][counts], head_of(model)[0], following[counts], teacher)
        (sums.total / counts.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(float(sums.total.detach()))
    assert history[-1] < 0.8 * history[0]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
def test_trls_sft_trainer_distils(models, shared_cache, tmp_path):
    trl = pytest.importorskip("trl", reason="TRL is not installed; its SFTTrainer is not tested")
    import datasets
    import peft
    import transformers

    from kdcache.token_maps import load_tokenizer

    class DistillingSFTTrainer(CachedDistillation, trl.SFTTrainer):
        pass

    cache = open_cache(shared_cache)
    transformers.set_seed(0)  # of the first values of LoRA, which peft draws
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=4, max_steps=6, learning_rate=3e-3, use_cpu=True, bf16=False,
        dataloader_pin_memory=False, remove_unused_columns=False, label_names=["labels"], logging_steps=1,
        save_strategy="no", report_to=[], disable_tqdm=True, gradient_checkpointing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
    )  # fmt: skip
    trainer = DistillingSFTTrainer(
        model=load_model(str(models / "student"), dtype="float32", device="cpu"),
        args=arguments,
        # SFTTrainer looks at columns while it is set up; what it trains on is put in below.
        train_dataset=datasets.Dataset.from_dict({"input_ids": [[1, 2]], "labels": [[1, 2]]}),
        data_collator=Collator(cache.plan.tokenizer.pad_id, 2.0),
        processing_class=load_tokenizer(str(models / "student")),
        peft_config=peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train_dataset = SplitDataset(cache.split("train"))
    trainer.set_distillation(**DISTILLATION, vocab_size=cache.vocab_size)
    before = trainer.evaluate(trainer.train_dataset)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "ce" in line]
    assert len(lines) == 6
    for line in lines:
        assert line["loss"] == pytest.approx(0.5 * line["ce"] + 0.5 * 4 * line["kl"], rel=1e-3)
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] < before["eval_loss"]


@pytest.mark.parametrize(("quantization", "tolerance"), [("none", 1e-5), ("nf4", 2e-3)])
def test_two_processes_are_one(models, shared_cache, tmp_path, quantization, tolerance):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}

    def gradients(name, processes, batch, accumulation):
        output = tmp_path / name
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
            str(ROOT / "tests/student/two_processes.py"), str(shared_cache), str(models / "student"), str(batch),
            str(accumulation), quantization, str(output),
        ]  # fmt: skip
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stderr
        return torch.load(output, weights_only=True)

    one = gradients("one", 1, 4, 2)
    two = gradients("two", 2, 2, 2)
    scale = max(float(g.abs().max()) for g in one.values())
    assert scale > 0
    for name, gradient in one.items():
        assert float((two[name] - gradient).abs().max()) < tolerance * scale, name
