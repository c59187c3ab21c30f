"""PHASE TWO on one screen: a cache and a student become a run directory.

open the cache -> load the student, hold its tokens against the cache's -> score it -> attach LoRA, train
-> score it again -> adapter, tokenizer, run.json, log.csv, result table.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from safetensors import SafetensorError

from kdcache.cache.reader import Cache, open_cache
from kdcache.errors import DeviceError, PlanMismatchError, RecipeError, StorageError, TrainingError
from kdcache.evaluate.perplexity import Score, student_score, teacher_score
from kdcache.models import (
    attach_lora,
    effective_vocabulary,
    load_model,
    load_tokenizer,
    refuse_other_tokens,
    resolve_device,
    token_map,
)
from kdcache.progress import Progress, Silent
from kdcache.recipe import Recipe, StudentSection
from kdcache.student.collate import Collator
from kdcache.student.record import CsvLog, RunDirectory, RunRecord, run_record
from kdcache.student.trainer import DistillationTrainer, ProgressCallback, SplitDataset

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TRAIN, VALIDATION = "train", "validation"


def distill(
    recipe: Recipe, *, resume: bool = False, overwrite: bool = False, progress: Progress | None = None
) -> RunRecord:
    """Train the recipe's student from its cache.

    Args:
        recipe: needs ``student``; ``data`` and ``teacher`` only have to agree with the cache.
        resume: go on from the newest whole checkpoint; a finished run is returned as it is.
        overwrite: forget an earlier run in the same directory.
        progress: told about long work.

    Raises:
        KdcacheError: bad input, an incomplete or damaged cache, a student with other tokens, a run
            directory that holds another run.
    """
    progress = progress or Silent()
    started = time.monotonic()
    student = _student_section(recipe)
    cache = open_cache(recipe.cache.directory)
    refuse_other_selection(recipe, cache)
    run = RunDirectory(Path(recipe.output))
    finished = run.prepare(recipe, cache.id, resume=resume, overwrite=overwrite)
    if finished is not None:
        progress.message(f"{run.path} holds this run, finished")
        return finished
    arguments = training_arguments(recipe, run.checkpoints)
    transformers.set_seed(recipe.seed)
    tokenizer = load_tokenizer(student.model, student.revision)
    refuse_other_tokens(token_map(tokenizer), cache.vocabulary(), student.model)
    model = load_model(
        student.model,
        revision=student.revision,
        quantization=student.quantization,
        dtype=student.dtype,
        device=student.device,
    )
    effective_vocabulary(model, cache.vocab_size, student.model)
    validation = cache.split(VALIDATION)
    batch = recipe.training.batch_size
    before = student_score(model, validation, batch_size=batch, what="student before", progress=progress)
    model = with_adapter(model, student)
    trainer = _trainer(recipe, cache, model, arguments, run, progress)
    run.begin(recipe, cache.id)
    checkpoint = run.newest_checkpoint(progress) if resume else None
    if checkpoint is not None:
        progress.message(f"going on from {checkpoint.name}")
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except torch.OutOfMemoryError as exc:
        raise TrainingError(
            f"out of memory with training.batch_size {batch}; halve it and double training.accumulation, or use "
            "training.gradient_checkpointing"
        ) from exc
    except (OSError, SafetensorError) as exc:
        raise StorageError(f"cannot write to {run.path}: {exc}; free some space and go on by --resume") from exc
    finally:
        progress.end()
    scores: dict[str, Score] = {
        "student before": before,
        "student after": student_score(model, validation, batch_size=batch, what="student after", progress=progress),
        "teacher": teacher_score(validation),
    }
    model.save_pretrained(str(run.model))
    tokenizer.save_pretrained(str(run.model))
    record = run_record(recipe, cache, model, scores, trainer.state.global_step, time.monotonic() - started)
    run.finish(record)
    return record


def refuse_other_selection(recipe: Recipe, cache: Cache) -> None:
    """A recipe that says what its cache holds must say what the cache holds.

    Raises:
        PlanMismatchError: naming the keys that differ.
    """
    plan = cache.plan
    pairs: list[tuple[str, Any, Any]] = []
    if "selection" in recipe.model_fields_set:
        chosen = recipe.selection
        pairs += [
            (f"selection.{key}", getattr(chosen, key), getattr(plan.selection, key))
            for key in type(chosen).model_fields
        ]
    if recipe.teacher is not None:
        pairs.append(("teacher.model", Path(recipe.teacher.model).name, Path(plan.teacher.name).name))
        pairs.append(("teacher.quantization", recipe.teacher.quantization, plan.teacher.quantization))
        pairs.append(("teacher.dtype", recipe.teacher.dtype, plan.teacher.dtype))
    if recipe.data is not None:
        pairs.append(("data.max_length", recipe.data.max_length, plan.data.max_length))
        pairs.append(("data.prompt", recipe.data.prompt, plan.data.prompt))
        for name, source in ((TRAIN, recipe.data.train), (VALIDATION, recipe.data.validation)):
            number = plan.split_index(name)
            if number is not None:
                pairs.append((f"data.{name}.split", source.split, plan.data.splits[number].selected))
    differing = [f"{key} is {asked!r}, in the cache {found!r}" for key, asked, found in pairs if asked != found]
    if differing:
        raise PlanMismatchError(
            f"the cache {cache.directory} was made from another recipe: {'; '.join(differing)}. Make it again in another "
            "directory with kdcache teacher-cache, or put these keys back"
        )


def with_adapter(model: PreTrainedModel, student: StudentSection) -> PreTrainedModel:
    """The model with the recipe's LoRA, or with every weight trainable."""
    if student.lora is None:
        return model.requires_grad_(True)
    return attach_lora(
        model,
        r=student.lora.r,
        alpha=student.lora.alpha,
        dropout=student.lora.dropout,
        targets=student.lora.targets,
        quantized=student.quantization != "none",
    )


def training_arguments(recipe: Recipe, checkpoints: Path) -> transformers.TrainingArguments:
    """The recipe's training section in the terms of transformers.

    Raises:
        DeviceError: the precision is not to be had on the device.
        RecipeError: transformers knows no such optimizer, schedule or logger.
    """
    t = recipe.training
    device = resolve_device(_student_section(recipe).device)
    if t.precision == "fp16" and device == "cpu":
        raise DeviceError("training.precision fp16 needs a CUDA device; on the CPU use bf16 or fp32")
    if t.precision == "bf16" and device == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise DeviceError("this GPU has no bfloat16 arithmetic; use training.precision=fp16")
    fields = transformers.TrainingArguments.__dataclass_fields__
    # The key was renamed; releases before 5.20 only know the older name.
    checkpointing = "activation_checkpointing" if "activation_checkpointing" in fields else "gradient_checkpointing"
    options: dict[str, Any] = {
        checkpointing: t.gradient_checkpointing,
        f"{checkpointing}_kwargs": {"use_reentrant": False} if t.gradient_checkpointing else None,
    }
    try:
        return transformers.TrainingArguments(
            output_dir=str(checkpoints),
            per_device_train_batch_size=t.batch_size,
            gradient_accumulation_steps=t.accumulation,
            num_train_epochs=t.epochs,
            max_steps=t.max_steps,
            learning_rate=t.learning_rate,
            lr_scheduler_type=t.schedule,
            warmup_steps=t.warmup,
            optim=t.optimizer,
            weight_decay=t.weight_decay,
            max_grad_norm=t.clip or 0.0,
            bf16=t.precision == "bf16",
            fp16=t.precision == "fp16",
            logging_steps=t.logging_steps,
            logging_nan_inf_filter=False,
            save_steps=t.save_steps,
            save_total_limit=t.keep_checkpoints,
            seed=recipe.seed,
            use_cpu=device == "cpu",
            dataloader_pin_memory=device == "cuda",
            remove_unused_columns=False,
            label_names=["labels"],
            report_to=t.report_to,
            disable_tqdm=True,
            average_tokens_across_devices=True,
            **options,
        )
    except ValueError as exc:
        raise RecipeError(f"transformers refuses the training section: {' '.join(str(exc).split())[:300]}") from exc


def _student_section(recipe: Recipe) -> StudentSection:
    if recipe.student is None:
        raise RecipeError("train-student needs the recipe section student")
    return recipe.student


def _trainer(
    recipe: Recipe,
    cache: Cache,
    model: PreTrainedModel,
    arguments: transformers.TrainingArguments,
    run: RunDirectory,
    progress: Progress,
) -> DistillationTrainer:
    loss = recipe.loss
    if recipe.training.optimizer.startswith("paged_") and arguments.device.type == "cpu":
        progress.message(
            f"{recipe.training.optimizer} pages its state to host memory; on the CPU that is where it lies anyway"
        )
    try:
        trainer = DistillationTrainer(
            model=model,
            args=arguments,
            train_dataset=SplitDataset(cache.split(TRAIN)),
            data_collator=Collator(cache.plan.tokenizer.pad_id, loss.temperature),
            callbacks=[ProgressCallback(progress), CsvLog(run.log)],
            distillation={**loss.model_dump(), "vocab_size": cache.vocab_size, "order_seed": recipe.seed},
        )
    except (ValueError, ImportError) as exc:
        raise TrainingError(f"transformers cannot set up the training: {' '.join(str(exc).split())[:300]}") from exc
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer
