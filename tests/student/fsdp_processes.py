"""Run by torchrun: two optimizer steps over sixteen sequences under an engine, for each way of training."""

import json
import os
import sys
from pathlib import Path

import torch
import transformers
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from kdcache.cache.reader import open_cache
from kdcache.evaluate.perplexity import student_score
from kdcache.models import attach_lora, load_model
from kdcache.student.batches import SplitDataset
from kdcache.student.collate import Collator
from kdcache.student.trainer import DistillationTrainer

ROOT = Path(__file__).parent.parent.parent
ENGINES = {
    "none": {},
    "fsdp": {"fsdp": True, "fsdp_config": {"version": 2, "reshard_after_forward": True}},
    "zero2": {"deepspeed": str(ROOT / "recipes/distributed/zero2.json")},
    "zero3": {"deepspeed": str(ROOT / "recipes/distributed/zero3.json")},
}
torch.set_num_threads(1)
cache_directory, student, engine, batch, folder = sys.argv[1:]
cache = open_cache(cache_directory)
if engine == "fsdp":
    os.environ["ACCELERATE_USE_FSDP"] = "true"  # as `accelerate launch` says it


def loaded(kind):
    quantization = "nf4" if kind == "nf4" else "none"
    model = load_model(student, quantization=quantization, dtype="float32", device="cpu")
    torch.manual_seed(0)
    if kind == "full":
        return model.requires_grad_(True)
    return attach_lora(model, r=4, alpha=8, dropout=0.0, targets="all-linear", quantized=kind == "nf4")


def trained(kind, model, checkpoint=None):
    output = Path(folder) / kind
    # What is stopped and resumed needs an optimizer that has something to remember.
    optimizer = (
        {"optim": "adamw_torch", "learning_rate": 1e-3}
        if kind in ("whole", "resumed")
        else {"optim": "sgd", "learning_rate": 1.0}
    )
    AcceleratorState._reset_state()
    arguments = transformers.TrainingArguments(
        output_dir=str(output / "run"), per_device_train_batch_size=int(batch), max_steps=2,
        lr_scheduler_type="constant", max_grad_norm=0.0, use_cpu=True, dataloader_pin_memory=False,
        remove_unused_columns=False, label_names=["labels"], save_steps=1, report_to=[], disable_tqdm=True,
        gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}, logging_steps=1,
        save_strategy="steps" if kind == "whole" else "no", **optimizer, **ENGINES[engine],
    )  # fmt: skip
    if engine == "fsdp":
        assert arguments.device.type == "cpu"
        # accelerate shards on accelerators alone: told that the processes have some, it does what it does there.
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU
    trainer = DistillationTrainer(
        model=model,
        args=arguments,
        train_dataset=SplitDataset(cache.split("train")),
        data_collator=Collator(cache.plan.tokenizer.pad_id, 2.0),
        distillation={"vocab_size": cache.vocab_size, "temperature": 2.0, "ce_weight": 0.5, "kd_weight": 0.5},
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    score = student_score(trainer.model, cache.split("validation"), batch_size=4)
    trainer.save_model(str(output / "model"))
    record = {
        "losses": [line["loss"] for line in trainer.state.log_history if "loss" in line],
        "ce_sum": score.ce_sum,
        "engine": str(trainer.accelerator.distributed_type.value),
        "sharded": [n for n, p in trainer.model.named_parameters() if isinstance(p, torch.distributed.tensor.DTensor)],
        "partitioned": [n for n, p in trainer.model.named_parameters() if p.numel() == 0],
    }
    if trainer.is_world_process_zero():
        (output / "record.json").write_text(json.dumps(record))


kinds = ["full", "lora", "nf4", *(["whole", "resumed"] if engine == "fsdp" else [])]
# Loaded first: once there are arguments for ZeRO-3, transformers would partition models while it loads them.
for kind, model in [(kind, loaded(kind)) for kind in kinds]:
    trained(kind, model, f"{folder}/whole/run/checkpoint-1" if kind == "resumed" else None)
if torch.distributed.is_initialized():
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
