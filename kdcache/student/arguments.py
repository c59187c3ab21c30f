"""The recipe's training section in the terms of transformers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import transformers

from kdcache.errors import DeviceError, RecipeError, TrainingError
from kdcache.models import resolve_device
from kdcache.recipe import TrainingSection


def training_arguments(
    training: TrainingSection, *, device: str, seed: int, checkpoints: Path
) -> transformers.TrainingArguments:
    """Arguments for one process.

    Raises:
        DeviceError: the precision is not to be had on the device.
        RecipeError: transformers knows no such optimizer, schedule or logger.
        TrainingError: several processes were started.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise TrainingError(
            "train-student runs in one process in this version, found WORLD_SIZE "
            f"{os.environ['WORLD_SIZE']}; start it without torchrun or accelerate launch"
        )
    place = resolve_device(device)
    if training.precision == "fp16" and place == "cpu":
        raise DeviceError("training.precision fp16 needs a CUDA device; on the CPU use bf16 or fp32")
    if training.precision == "bf16" and place == "cuda" and not torch.cuda.is_bf16_supported(False):
        raise DeviceError("this GPU has no bfloat16 arithmetic; use training.precision=fp16")
    fields = transformers.TrainingArguments.__dataclass_fields__
    # The key was renamed; older releases only know the second name.
    checkpointing = "activation_checkpointing" if "activation_checkpointing" in fields else "gradient_checkpointing"
    options: dict[str, Any] = {
        checkpointing: training.gradient_checkpointing,
        f"{checkpointing}_kwargs": {"use_reentrant": False} if training.gradient_checkpointing else None,
    }
    try:
        arguments = transformers.TrainingArguments(
            output_dir=str(checkpoints),
            per_device_train_batch_size=training.batch_size,
            gradient_accumulation_steps=training.accumulation,
            num_train_epochs=training.epochs,
            max_steps=training.max_steps,
            learning_rate=training.learning_rate,
            lr_scheduler_type=training.schedule,
            warmup_steps=training.warmup,
            optim=training.optimizer,
            weight_decay=training.weight_decay,
            max_grad_norm=training.clip or 0.0,
            bf16=training.precision == "bf16",
            fp16=training.precision == "fp16",
            logging_steps=training.logging_steps,
            logging_nan_inf_filter=False,
            save_steps=training.save_steps,
            save_total_limit=training.keep_checkpoints,
            seed=seed,
            use_cpu=place == "cpu",
            dataloader_pin_memory=place == "cuda",
            remove_unused_columns=False,
            label_names=["labels"],
            report_to=training.report_to,
            disable_tqdm=True,
            average_tokens_across_devices=True,
            **options,
        )
    except ValueError as exc:
        raise RecipeError(f"transformers refuses the training section: {' '.join(str(exc).split())[:300]}") from exc
    # Several visible GPUs would be driven by DataParallel, which multiplies the batch behind the recipe's back.
    _ = arguments.n_gpu
    arguments._n_gpu = min(1, arguments._n_gpu)
    return arguments
