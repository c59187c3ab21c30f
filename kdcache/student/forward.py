"""A batch -> the student's hidden states at the positions that count, and its loss sums."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from kdcache.models import head_of
from kdcache.student.collate import IGNORED
from kdcache.student.divergence import Divergence
from kdcache.student.loss import LossSums, SparseTeacher, distillation_loss

if TYPE_CHECKING:
    from kdcache.student.hidden import HiddenTerm


def loss_sums(
    model: Any,
    base: Any,
    batch: Mapping[str, torch.Tensor],
    *,
    vocab_size: int,
    temperature: float,
    ce_weight: float,
    kd_weight: float,
    divergence: Divergence = "forward_kl",
    beta: float = 0.5,
    control_variate: bool = False,
    hidden: HiddenTerm | None = None,
) -> LossSums:
    """Loss sums of a batch made by `Collator`.

    Args:
        model: the model as its engine wraps it (DDP, FSDP, DeepSpeed, `torch.compile`): calling it, and no part of it,
            keeps autocast and the engine's hooks in force. Where it is sharded, every process calls this.
        base: the same model unwrapped. Its head computes the loss in the place of logits: at no other time are the
            head's weights sure to be whole.
        batch: as `Collator` returns it, on the model's device.
        vocab_size: the cache's vocabulary; head columns beyond are padding.
        temperature: T, at which the batch was collated.
        ce_weight: lambda_CE.
        kd_weight: lambda_KD.
        divergence: as `distillation_loss` takes it.
        beta: of the generalised JSD.
        control_variate: as `distillation_loss` takes it.
        hidden: a term on hidden states, added to the total.
    """
    following = batch["labels"][:, 1:]
    counts = following != IGNORED
    teacher = SparseTeacher(
        batch["teacher_ids"], batch["teacher_log_probs"], batch["teacher_log_tail"], batch.get("teacher_log_weights")
    )
    sums: list[LossSums] = []

    # Traced, the loss would be compiled again for every batch that it closes over.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def loss_for_logits(hidden_BLD: torch.Tensor) -> torch.Tensor:
        weight_VD, bias_V = head_of(base)
        rows_RLD = hidden_BLD.reshape(*batch["labels"].shape, -1)
        found = distillation_loss(
            rows_RLD[:, :-1][counts],
            weight_VD,
            following[counts],
            teacher,
            temperature=temperature,
            ce_weight=ce_weight,
            kd_weight=kd_weight,
            divergence=divergence,
            beta=beta,
            bias_V=bias_V,
            vocab_size=vocab_size,
            control_variate=control_variate,
        )
        sums.append(found)
        return hidden_BLD[:, :0]

    with _forward_of(base.get_output_embeddings(), loss_for_logits):
        asked = {} if hidden is None else {"output_hidden_states": hidden.wanted}
        output = model(**model_inputs(base, batch), use_cache=False, **asked)
    # A sum of nothing, which ties the loss to the output that engines watch to know when the backward pass begins.
    total = sums[0].total + output.logits.sum()
    return replace(sums[0], total=total if hidden is None else total + hidden(output.hidden_states, batch, counts))


def model_inputs(base: Any, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the model takes of a batch. Where the attention is FlashAttention, packed rows are laid end to end as one."""
    if "position_ids" not in batch:
        return {name: batch[name] for name in ("input_ids", "attention_mask")}
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
    if "flash" in str(base.config.get_text_config()._attn_implementation):
        # It looks for the borders of sequences in batches of one row, and nowhere else.
        inputs = {name: tensor.reshape(1, -1) for name, tensor in inputs.items()}
    return inputs


@contextmanager
def _forward_of(module: torch.nn.Module, forward: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Another ``forward`` of a module; its hooks stay, and with them whoever gathers its weights."""
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
