"""Loss and perplexity by token sums. The teacher's come from the cache alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from kdcache.cache.reader import Cache, Split
from kdcache.progress import Progress, Silent
from kdcache.student.collate import Collator, uses_draws
from kdcache.student.forward import loss_sums

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.bfloat16}


@dataclass(frozen=True)
class Score:
    """Token-summed cross-entropy and KL(teacher || student) over a split, in nats.

    The KL is taken at T = 1 where the cache declares that, otherwise at its smallest temperature (``kl_temperature``).

    ``kl`` is an unbiased estimate of the full KL where the cache holds drawn entries; otherwise the mass outside its
    entries counts as one bucket, and it is a lower bound.
    """

    ce_sum: float
    kl_sum: float
    tokens: int
    kl_temperature: float = 1.0
    kl_is_bound: bool = False

    @property
    def loss(self) -> float:
        """Cross-entropy per token, nats."""
        return self.ce_sum / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(min(self.loss, 700.0))

    @property
    def kl(self) -> float:
        """KL to the teacher per token, nats."""
        return self.kl_sum / self.tokens

    def as_record(self) -> dict[str, float]:
        """What run.json keeps."""
        return {
            "loss": self.loss,
            "perplexity": self.perplexity,
            "kl_to_teacher": self.kl,
            "kl_temperature": self.kl_temperature,
            "kl_is_bound": self.kl_is_bound,
            "tokens": self.tokens,
        }


def teacher_score(split: Split) -> Score:
    """The teacher on the labels of a split, from the manifest's totals."""
    return Score(split.summary.teacher_nll, 0.0, split.summary.positions, kl_temperature(split.cache))


def kl_temperature(cache: Cache) -> float:
    """The temperature at which students are compared with the teacher."""
    return 1.0 if 1.0 in cache.temperatures else min(cache.temperatures)


@torch.inference_mode()
def student_score(
    model: PreTrainedModel,
    split: Split,
    *,
    batch_size: int,
    precision: str = "fp32",
    what: str = "student",
    progress: Progress | None = None,
) -> Score:
    """A student on a split, under the autocast of ``precision``; leaves the model in the mode it was in."""
    progress = progress or Silent()
    cache = split.cache
    temperature = kl_temperature(cache)
    collate = Collator(cache.plan.tokenizer.pad_id, temperature)
    was_training = model.training
    model.eval()
    ce = kl = 0.0
    tokens = 0
    progress.begin(f"evaluate {what}", split.summary.positions, "tokens")
    try:
        for start in range(0, len(split), batch_size):
            pairs = [(i, split[i]) for i in range(start, min(start + batch_size, len(split)))]
            batch: dict[str, Any] = {k: v.to(model.device) for k, v in collate(pairs).items()}
            with torch.autocast(model.device.type, _AUTOCAST[precision], enabled=precision != "fp32"):
                sums = loss_sums(
                    model,
                    model,
                    batch,
                    vocab_size=cache.vocab_size,
                    temperature=temperature,
                    ce_weight=1.0,
                    kd_weight=1.0,
                )
            count = len(batch["teacher_log_tail"])
            ce, kl, tokens = ce + float(sums.ce), kl + float(sums.divergence), tokens + count
            progress.advance(count, f"perplexity {math.exp(min(ce / tokens, 700.0)):.3f}")
    finally:
        progress.end()
        model.train(was_training)
    return Score(ce, kl, tokens, temperature, not uses_draws(cache.plan.design(split.number), temperature))
