"""The recipe's training section in the terms of transformers."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers.integrations.integration_utils import get_reporting_integration_callbacks

from kdcache.devices import resolve_device
from kdcache.errors import DeviceError, RecipeError
from kdcache.models import first_line
from kdcache.recipe_training import TrainingSection
from kdcache.student.processes import launched

if TYPE_CHECKING:
    from kdcache.recipe_reinforce import ReinforceTrainingSection


def training_arguments(
    training: TrainingSection,
    *,
    device: str,
    seed: int,
    checkpoints: Path,
    tell: Callable[[str], None] = lambda text: None,
) -> transformers.TrainingArguments:
    """Arguments for this process, of one or of several; ``tell`` is given what is not to be had and what is taken instead.

    Raises:
        DeviceError: the precision is not to be had on the device.
        RecipeError: transformers knows no such optimizer, schedule or logger.
    """
    place = resolve_device(device)
    refuse_absent_precision(training.precision, place)
    if training.tf32 and (place == "cpu" or torch.cuda.get_device_capability()[0] < 8):
        raise DeviceError("training.tf32 needs an NVIDIA GPU of the Ampere generation or newer; leave it out")
    fields = transformers.TrainingArguments.__dataclass_fields__
    # The key was renamed; older releases only know the second name.
    checkpointing = "activation_checkpointing" if "activation_checkpointing" in fields else "gradient_checkpointing"
    options: dict[str, Any] = {
        checkpointing: training.gradient_checkpointing,
        f"{checkpointing}_kwargs": {"use_reentrant": False} if training.gradient_checkpointing else None,
    }
    if training.tf32:
        options["tf32"] = True
    if training.eval_steps is not None:
        options |= {
            "eval_strategy": "steps",
            "eval_steps": training.eval_steps,
            "metric_for_best_model": "eval_loss",
            "greater_is_better": False,
            "load_best_model_at_end": training.keep_best,
        }
    several = launched() > 1
    if training.skip_nonfinite and os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        raise RecipeError(
            "training.skip_nonfinite is not to be had with DeepSpeed, which makes its step before the gradient can be looked at; "
            "leave it out, or use DDP or FSDP"
        )
    try:
        arguments = transformers.TrainingArguments(
            output_dir=str(checkpoints),
            per_device_train_batch_size=training.batch_size,
            per_device_eval_batch_size=training.batch_size,
            gradient_accumulation_steps=training.accumulation,
            num_train_epochs=training.epochs,
            max_steps=training.max_steps,
            # The loss of a step that is left out should not hide the others'.
            logging_nan_inf_filter=training.skip_nonfinite > 0,
            restore_callback_states_from_checkpoint=True,
            ddp_backend="gloo" if place == "cpu" and several else None,
            ddp_find_unused_parameters=False,
            torch_compile=training.compile,
            dataloader_num_workers=training.workers,
            label_names=["labels"],
            report_to=training.report_to,
            average_tokens_across_devices=True,
            **optimisation(training, place=place, seed=seed, tell=tell),
            **options,
        )
        _try_out(arguments)
    except (ValueError, TypeError, ImportError, RuntimeError) as exc:
        raise RecipeError(f"transformers refuses the training section: {first_line(exc)}") from exc
    # Several visible GPUs would be driven by DataParallel, which multiplies the batch behind the recipe's back.
    _ = arguments.n_gpu
    arguments._n_gpu = min(1, arguments._n_gpu)
    return arguments


def _try_out(arguments: transformers.TrainingArguments) -> None:
    """Make what transformers makes of three names only after hours of loading: schedule, optimizer, loggers."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    steps = 10
    transformers.get_scheduler(
        arguments.lr_scheduler_type,
        torch.optim.SGD([parameter], lr=0.1),
        num_warmup_steps=1,
        num_training_steps=steps,
    )
    transformers.Trainer.get_optimizer_cls_and_kwargs(arguments, torch.nn.Linear(1, 1))  # type: ignore[arg-type]
    for logger in get_reporting_integration_callbacks(arguments.report_to):
        logger()


def optimisation(
    training: TrainingSection | ReinforceTrainingSection,
    *,
    place: str,
    seed: int,
    tell: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """What `transformers.TrainingArguments` and those made from it take, from a training section; ``place``: cuda or cpu."""
    return {
        "learning_rate": training.learning_rate,
        "lr_scheduler_type": training.schedule,
        "warmup_steps": training.warmup,
        "optim": optimizer_for(training.optimizer, place, tell),
        "weight_decay": training.weight_decay,
        "max_grad_norm": training.clip or 0.0,
        "bf16": training.precision == "bf16",
        "fp16": training.precision == "fp16",
        "logging_steps": training.logging_steps,
        "save_steps": training.save_steps,
        "save_total_limit": training.keep_checkpoints,
        "seed": seed,
        "use_cpu": place == "cpu",
        "dataloader_pin_memory": place == "cuda",
        "remove_unused_columns": False,
        "disable_tqdm": True,
    }


def refuse_absent_precision(precision: str, place: str) -> None:
    """Not every device has every arithmetic; ``place``: cuda or cpu.

    Raises:
        DeviceError: this one has not.
    """
    if precision == "fp16" and place == "cpu":
        raise DeviceError("training.precision fp16 needs a CUDA device; on the CPU use bf16 or fp32")
    if precision == "bf16" and place == "cuda" and not torch.cuda.is_bf16_supported(False):
        raise DeviceError("this GPU has no bfloat16 arithmetic; use training.precision=fp16")


def optimizer_for(name: str, place: str, tell: Callable[[str], None]) -> str:
    """The optimizer, or the nearest one where its kind is not to be had; what is done instead is told in words."""
    if "8bit" not in name and not name.startswith("paged_"):
        return name
    problem = _problem_of_bitsandbytes(place)
    if problem is not None:
        fallback = "rmsprop" if "rmsprop" in name else "adamw_torch"
        tell(
            f"{name} needs bitsandbytes' optimizers, which fail on this {place} ({problem}); {fallback} is used instead"
        )
        return fallback
    if name.startswith("paged_") and place == "cpu":
        tell(f"{name} pages its state to host memory; on the CPU that is where it lies anyway")
    return name


def _problem_of_bitsandbytes(place: str) -> str | None:
    """Why its 8-bit optimizers cannot make a step here, or None."""
    try:
        import bitsandbytes

        # Smaller tensors keep their state in 32 bits, and would prove nothing.
        parameter = torch.nn.Parameter(torch.zeros(8192, device=place))
        parameter.grad = torch.ones_like(parameter)
        bitsandbytes.optim.AdamW8bit([parameter]).step()
    except (ImportError, RuntimeError, NotImplementedError, AttributeError) as exc:
        return first_line(exc)
    return None
