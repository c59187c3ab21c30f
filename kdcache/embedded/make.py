"""Data set, tokenizer, teacher and student on disk, made once and reused when present.

The teacher is the larger model and learns longer, so that the student has something to take from it.
Both learn from examples that neither the distillation nor the validation split holds.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdcache.cache.files import write_file
from kdcache.data.examples import load_examples
from kdcache.data.tokens import TokenRow, tokenise
from kdcache.embedded.instructions import generate
from kdcache.errors import StorageError
from kdcache.models import quiet_libraries
from kdcache.progress import Progress, Silent
from kdcache.token_maps import load_tokenizer

if TYPE_CHECKING:
    import torch
    import transformers
    from transformers import PreTrainedTokenizerBase

    from kdcache.recipe import EmbeddedSection

_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_PAD, _END = "<|endoftext|>", "<|im_end|>"
_VOCABULARY = 1024
_MAX_LENGTH = 128
# Every width is a multiple of 64, which 4-bit kernels want.
_SHAPES: dict[str, dict[str, Any]] = {
    "teacher": {
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "student": {
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    },
}
_LEARNING_RATES = {"teacher": 2e-3, "student": 2e-3}
_BATCH = 32


def make_embedded(section: EmbeddedSection, progress: Progress | None = None) -> Path:
    """Make what is not there yet in ``section.directory``: train.jsonl, validation.jsonl, teacher/, student/.

    Raises:
        StorageError: the directory cannot be written, or holds what other settings made.
    """
    progress = progress or Silent()
    directory = Path(section.directory)
    settings = directory / "settings.json"
    wanted = json.dumps(section.model_dump(exclude={"directory"}), indent=1, sort_keys=True).encode() + b"\n"
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise StorageError(f"cannot make {directory}: {exc.strerror}") from exc
    if settings.exists() and settings.read_bytes() != wanted:
        raise StorageError(
            f"{directory} holds models made with other settings of the recipe section embedded; give embedded.directory "
            "another folder, or remove this one"
        )
    write_file(settings, wanted)
    _make_data(section, directory)
    tokenizer: PreTrainedTokenizerBase | None = None
    for name, steps in (("teacher", section.teacher_steps), ("student", section.student_steps)):
        if (directory / name / "config.json").exists():
            continue
        tokenizer = tokenizer or _make_tokenizer(directory)
        _make_model(name, steps, section.seed, directory, tokenizer, progress)
    return directory


def _make_data(section: EmbeddedSection, directory: Path) -> None:
    sizes = {
        "train": section.train_examples,
        "validation": section.validation_examples,
        "pretrain": section.pretrain_examples,
    }
    if all((directory / f"{name}.jsonl").exists() for name in sizes):
        return
    # One list of distinct examples, cut in three: no split holds another's example.
    examples = generate(sum(sizes.values()), seed=section.seed)
    start = 0
    for name, size in sizes.items():
        lines = [json.dumps(e, ensure_ascii=False) + "\n" for e in examples[start : start + size]]
        write_file(directory / f"{name}.jsonl", "".join(lines).encode())
        start += size


def _make_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """Byte-level BPE with a ChatML template, learnt from the pretraining examples."""
    import tokenizers
    import transformers

    examples = [json.loads(line) for line in (directory / "pretrain.jsonl").read_text().splitlines()]
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        # Single digits, so that arithmetic is not a table of two-digit tokens.
        tokenizers.pre_tokenizers.Digits(individual_digits=True),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
    ])  # fmt: skip
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=[_PAD, "<|im_start|>", _END],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((text for e in examples for text in e.values()), trainer)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=_END, pad_token=_PAD, model_max_length=_MAX_LENGTH
    )
    fast.chat_template = _CHAT_TEMPLATE
    # Loaded back beside a configuration, as everyone else will load it: the architecture decides which
    # tokenizer class reads the file, and that class may split text differently.
    with tempfile.TemporaryDirectory(dir=directory) as folder:
        fast.save_pretrained(folder)
        _config("teacher", fast).save_pretrained(folder)
        return load_tokenizer(folder)


def _config(name: str, tokenizer: PreTrainedTokenizerBase) -> transformers.Qwen2Config:
    import transformers

    return transformers.Qwen2Config(
        vocab_size=len(tokenizer),
        max_position_embeddings=_MAX_LENGTH * 4,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        use_cache=False,
        **_SHAPES[name],
    )


def _make_model(
    name: str, steps: int, seed: int, directory: Path, tokenizer: PreTrainedTokenizerBase, progress: Progress
) -> None:
    import transformers

    from kdcache.student.progress_callback import ProgressCallback

    quiet_libraries()
    transformers.set_seed(seed)
    model = transformers.Qwen2ForCausalLM(_config(name, tokenizer))
    examples = load_examples(str(directory / "pretrain.jsonl"))
    rows = tokenise(examples, tokenizer, max_length=_MAX_LENGTH).rows
    working = directory / f".making-{name}"
    arguments = transformers.TrainingArguments(
        output_dir=str(working),
        per_device_train_batch_size=_BATCH,
        max_steps=steps,
        learning_rate=_LEARNING_RATES[name],
        lr_scheduler_type="cosine",
        warmup_steps=max(1, steps // 20),
        weight_decay=0.01,
        adam_beta2=0.98,
        logging_steps=10,
        save_strategy="no",
        seed=seed,
        use_cpu=True,
        bf16=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=[_features(r) for r in rows],
        data_collator=_Pad(int(tokenizer.pad_token_id)),
        callbacks=[ProgressCallback(progress, f"make {name}")],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    progress.message(f"making the embedded {name} ({sum(p.numel() for p in model.parameters()):,} parameters)")
    trainer.train()
    model.bfloat16().save_pretrained(working)
    tokenizer.save_pretrained(working)
    target = directory / name
    shutil.rmtree(target, ignore_errors=True)
    working.rename(target)


def _features(row: TokenRow) -> dict[str, list[int]]:
    labels = [int(t) if learnt else -100 for t, learnt in zip(row.ids, row.targets, strict=True)]
    return {"input_ids": row.ids.tolist(), "labels": labels}


class _Pad:
    def __init__(self, pad_id: int) -> None:
        self._pad_id = pad_id

    def __call__(self, features: list[dict[str, list[int]]]) -> dict[str, Any]:
        import torch

        def pad(key: str, value: int) -> torch.Tensor:
            rows = [torch.tensor(f[key]) for f in features]
            return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

        ids = pad("input_ids", self._pad_id)
        lengths = torch.tensor([len(f["input_ids"]) for f in features])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        return {"input_ids": ids, "attention_mask": mask, "labels": pad("labels", -100)}
