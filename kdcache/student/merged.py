"""A student as one ordinary model folder: its adapter folded into the weights.

A quantised base is unpacked first: an adapter folded into packed weights is rounded with them once more, and one folded
into the weights from before they were packed was trained for others.
"""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from kdcache.errors import StorageError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# In a folder that `save_whole` has not finished.
_OURS = ".kdcache-partial"


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
    beside = None
    try:
        beside = _fresh_beside(folder)
        model.save_pretrained(beside)
        if tokenizer is not None:
            tokenizer.save_pretrained(beside)
        (beside / _OURS).unlink()
        shutil.rmtree(folder, ignore_errors=True)
        beside.rename(folder)
    except (OSError, SafetensorError) as exc:
        # Weights are written by a library that reports a full disk in an exception of its own.
        if beside is not None:
            shutil.rmtree(beside, ignore_errors=True)
        raise StorageError(f"cannot write the model folder {folder}: {getattr(exc, 'strerror', None) or exc}") from exc


def _fresh_beside(folder: Path) -> Path:
    """A new empty folder ``NAME.partial``, or ``NAME.partial.1`` and so on where somebody else has one of that name.

    What a saving that was killed left is known by a file in it, and goes.
    """
    for number in itertools.count():
        beside = folder.with_name(f"{folder.name}.partial{f'.{number}' if number else ''}")
        if (beside / _OURS).is_file():
            shutil.rmtree(beside, ignore_errors=True)
        try:
            beside.mkdir(parents=True)
        except FileExistsError:
            continue
        (beside / _OURS).touch()
        return beside
    raise AssertionError("numbers do not end")
