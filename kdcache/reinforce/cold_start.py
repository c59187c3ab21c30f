"""Supervised steps on worked solutions before reinforcement (the cold start of DeepSeek-R1, https://arxiv.org/abs/2501.12948).

A student that never closes an answer tag earns nothing, and from nothing GRPO learns nothing. Plain cross-entropy on the solution
alone, by transformers' own Trainer, in the adapter that is reinforced afterwards.
"""

from __future__ import annotations

import tempfile
from typing import TYPE_CHECKING, Any

import transformers

from kdcache.data.tokens import TokenRow
from kdcache.devices import resolve_device
from kdcache.errors import TrainingError
from kdcache.progress import Progress
from kdcache.recipe_reinforce import ColdStartSection
from kdcache.student.progress_callback import ProgressCallback

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def cold_start(
    section: ColdStartSection,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[TokenRow],
    *,
    seed: int,
    precision: str,
    device: str,
    progress: Progress,
) -> None:
    """Train ``model`` in place on worked solutions.

    Args:
        section: how long and how fast.
        model: with its adapter trainable.
        tokenizer: fills short rows.
        rows: prompts, with the solutions as targets.
        seed: of the order.
        precision: autocast: bf16, fp16 or fp32.
        device: of the student.
        progress: told about every step.

    Raises:
        TrainingError: out of memory.
    """
    import torch

    place = resolve_device(device)
    data: Any = [
        {
            "input_ids": row.ids.tolist(),
            "labels": [int(t) if learnt else -100 for t, learnt in zip(row.ids, row.targets, strict=True)],
        }
        for row in rows
    ]
    with tempfile.TemporaryDirectory() as nowhere:
        arguments = transformers.TrainingArguments(
            output_dir=nowhere,
            max_steps=section.steps,
            per_device_train_batch_size=section.batch_size,
            learning_rate=section.learning_rate,
            lr_scheduler_type="linear",
            warmup_steps=max(1, section.steps // 20),
            logging_steps=10,
            save_strategy="no",
            seed=seed,
            bf16=precision == "bf16",
            fp16=precision == "fp16",
            use_cpu=place == "cpu",
            dataloader_pin_memory=place == "cuda",
            remove_unused_columns=False,
            report_to=[],
            disable_tqdm=True,
        )
        arguments._n_gpu = min(1, arguments.n_gpu)
        trainer = transformers.Trainer(
            model=model,
            args=arguments,
            train_dataset=data,
            data_collator=transformers.DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100),
            callbacks=[ProgressCallback(progress, "cold start")],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        try:
            trainer.train()
        except torch.OutOfMemoryError as exc:
            raise TrainingError(f"out of memory with cold_start.batch_size {section.batch_size}; lower it") from exc
    model.zero_grad(set_to_none=True)
