"""A batch -> the student's hidden states at the positions that count, and its loss sums."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from kdcache.models import head_of
from kdcache.student.collate import IGNORED
from kdcache.student.divergence import Divergence
from kdcache.student.loss import LossSums, SparseTeacher, distillation_loss


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
) -> LossSums:
    """Loss sums of a batch made by `Collator`.

    Args:
        model: the model as the trainer wraps it: calling it (and not its decoder) keeps autocast and the
            hooks of DDP in force.
        base: the same model unwrapped, whose head is taken; engines that shard it (FSDP, ZeRO-3) are not supported.
        batch: as `Collator` returns it, on the model's device.
        vocab_size: the cache's vocabulary; head columns beyond are padding.
        temperature: T, at which the batch was collated.
        ce_weight: lambda_CE.
        kd_weight: lambda_KD.
        divergence: as `distillation_loss` takes it.
        beta: of the generalised JSD.
    """
    last: list[torch.Tensor] = []
    # A hook, and not output_hidden_states: that would keep every layer's states until the loss is done.
    hook = base.get_decoder().register_forward_hook(lambda module, args, output: last.append(output.last_hidden_state))
    try:
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], logits_to_keep=1, use_cache=False)
    finally:
        hook.remove()
    following = batch["labels"][:, 1:]
    counts = following != IGNORED
    teacher = SparseTeacher(
        batch["teacher_ids"], batch["teacher_log_probs"], batch["teacher_log_tail"], batch.get("teacher_log_weights")
    )
    head, bias = head_of(base)
    return distillation_loss(
        last[0][:, :-1][counts],
        head,
        following[counts],
        teacher,
        temperature=temperature,
        ce_weight=ce_weight,
        kd_weight=kd_weight,
        divergence=divergence,
        beta=beta,
        bias_V=bias,
        vocab_size=vocab_size,
    )
