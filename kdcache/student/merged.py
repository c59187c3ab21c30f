"""A student as one ordinary model folder: its adapter folded into the weights.

A quantised base is unpacked first: an adapter folded into packed weights is rounded with them once more, and one folded
into the weights from before they were packed was trained for others.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdcache.errors import StorageError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def fold_adapter(model: PreTrainedModel, adapter: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The base ``model``, quantised or not, with a saved adapter folded in, every weight ``dtype``.

    Raises:
        OSError, ValueError: there is no such adapter, or it does not fit.
    """
    import peft

    plain: Any = model
    if getattr(model, "quantization_method", None) is not None:
        plain = plain.dequantize()
    merged = peft.PeftModel.from_pretrained(plain, str(adapter)).merge_and_unload()
    folded: PreTrainedModel = merged.to(dtype)
    return folded


def save_whole(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> None:
    """Save a model folder that is either whole or not there: written beside it, then renamed. Replaces an older one.

    Raises:
        StorageError: it cannot be written.
    """
    beside = folder.with_name(folder.name + ".partial")
    try:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        model.save_pretrained(beside)
        if tokenizer is not None:
            tokenizer.save_pretrained(beside)
        shutil.rmtree(folder, ignore_errors=True)
        beside.rename(folder)
    except OSError as exc:
        shutil.rmtree(beside, ignore_errors=True)
        raise StorageError(f"cannot write the model folder {folder}: {exc.strerror or exc}") from exc
