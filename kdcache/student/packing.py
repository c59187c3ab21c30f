"""Packing that cannot leak: a trial, on the loaded model, before anything is learnt from packed rows.

A packed row holds several sequences, told apart by ``position_ids`` alone, which start again at each. With no attention
mask given, transformers makes a mask of them that keeps every sequence to itself (eager, sdpa, flex), or hands
FlashAttention their borders. That is a matter of the model's own code: a family with a state that runs along the row
(Mamba, linear attention, short convolutions), or one that counts positions by itself, takes the same input and mixes the
sequences without a word. So nothing is trusted, and no list of families is kept. The trial costs three forward passes
over some 50 tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kdcache.errors import ModelError
from kdcache.models import first_line
from kdcache.student.forward import model_inputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LENGTHS = (11, 13)
# Of the size of a token's logits. The same shapes are rounded the same way: other tokens elsewhere change nothing at all.
# Another shape may move logits by a few percent where 16-bit numbers go through many layers; being packed is one, so that
# comparing with the sequence alone would miss a weak leak.
_SAME_SHAPE, _OTHER_SHAPE = 1e-6, 0.05
# Some arithmetic looks at all tokens of a batch (LLM.int8()'s outliers, the load of experts). What that changes is seen
# where nothing can leak: in a row's first sequence.
_MARGIN = 8.0


@torch.inference_mode()
def refuse_leaks(model: PreTrainedModel) -> None:
    """Two short random sequences packed, in both orders, with other tokens in one of them, and alone.

    Args:
        model: as it will be trained, adapter and all, but not wrapped; left in the mode it was in.

    Raises:
        ModelError: a sequence's logits depend on the sequence before it, or differ from those it has alone.
    """
    was_training = model.training
    model.eval()
    try:
        leak, shift = _trial(model)
    except (TypeError, ValueError) as exc:
        raise ModelError(
            f"{_named(model)} does not run on packed rows ({first_line(exc)}); use training.packing=false"
        ) from exc
    finally:
        model.train(was_training)
    if not leak <= 1:
        raise ModelError(
            f"{_named(model)} lets a sequence see the one packed before it: its logits change with the other's tokens, "
            f"{leak:.0f} times more than rounding would; use training.packing=false"
        )
    if not shift <= 1:
        raise ModelError(
            f"{_named(model)} treats a packed sequence otherwise than the same sequence alone: its logits are off by "
            f"{shift:.0f} times what rounding would do; use training.packing=false"
        )


def _trial(model: PreTrainedModel) -> tuple[float, float]:
    """How much a sequence depends on the one before it, and on being packed at all, in units of what is allowed."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = int(model.config.get_text_config().vocab_size)
    ahead, other, judged = (
        torch.randint(vocabulary, (length,), generator=generator) for length in (_LENGTHS[0], *_LENGTHS)
    )
    first, second = slice(0, len(judged)), slice(len(ahead), None)

    def packed(neighbour: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # Two rows: some implementations tell sequences apart in a single one only.
        pairs = ((judged, neighbour), (neighbour, judged))
        rows = torch.stack([torch.cat(pair) for pair in pairs])
        positions = torch.stack([torch.cat([torch.arange(len(part)) for part in pair]) for pair in pairs])
        logits = _logits(model, {"input_ids": rows, "position_ids": positions})
        return logits[0, first], logits[1, second]

    before, after = packed(ahead)
    before_other, after_other = packed(other)
    alone = _logits(model, {"input_ids": judged[None], "attention_mask": torch.ones_like(judged[None])})[0]
    leak = _apart(after, after_other).max() / max(_SAME_SHAPE, _MARGIN * float(_apart(before, before_other).max()))
    shift = _apart(after, alone).mean() / max(_OTHER_SHAPE, _MARGIN * float(_apart(before, alone).mean()))
    return float(leak), float(shift)


def _logits(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """float32 ``[R, L, V]``, in the rows that the batch has."""
    inputs = model_inputs(model, {name: tensor.to(model.device) for name, tensor in batch.items()})
    logits: torch.Tensor = model(**inputs, use_cache=False).logits.float()
    return logits.reshape(*batch["input_ids"].shape, -1)


def _apart(logits: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Distance of logits ``[L, V]`` by token, as a share of their size."""
    apart: torch.Tensor = (logits - others).norm(dim=1) / others.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
    return apart


def _named(model: PreTrainedModel) -> str:
    config = model.config
    return f"a model of type {config.model_type} with attention {config.get_text_config()._attn_implementation}"
