"""Run by torchrun: one optimizer step over eight sequences, the gradient of the first process saved."""

import sys
from pathlib import Path

import torch
import transformers

from kdcache.cache.reader import open_cache
from kdcache.models import attach_lora, load_model
from kdcache.student.collate import Collator
from kdcache.student.trainer import DistillationTrainer, SplitDataset

torch.set_num_threads(1)
cache_directory, student, batch, accumulation, quantization, output = sys.argv[1:]
cache = open_cache(cache_directory)
model = load_model(student, quantization=quantization, dtype="float32", device="cpu")
torch.manual_seed(0)
model = attach_lora(model, r=4, alpha=8, dropout=0.0, targets="all-linear", quantized=quantization != "none")
arguments = transformers.TrainingArguments(
    output_dir=f"{output}.run", per_device_train_batch_size=int(batch), gradient_accumulation_steps=int(accumulation),
    max_steps=1, learning_rate=1.0, optim="sgd", lr_scheduler_type="constant", max_grad_norm=0.0, use_cpu=True,
    dataloader_pin_memory=False, remove_unused_columns=False, label_names=["labels"], save_strategy="no", report_to=[],
    disable_tqdm=True,
)  # fmt: skip
trainer = DistillationTrainer(
    model=model,
    args=arguments,
    train_dataset=SplitDataset(cache.split("train")),
    data_collator=Collator(cache.plan.tokenizer.pad_id, 2.0),
    distillation={"vocab_size": cache.vocab_size, "temperature": 2.0, "ce_weight": 0.5, "kd_weight": 0.5},
)
before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
trainer.train()
if trainer.is_world_process_zero():
    after = dict(model.named_parameters())
    torch.save({n: p - after[n].detach() for n, p in before.items()}, Path(output))
# Left to the interpreter's exit, a gloo thread that still runs aborts the process now and then.
if torch.distributed.is_initialized():
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
