"""Loss and perplexity by token sums. The teacher's come from the cache alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import count, islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kdcache.cache.mixture import Mixture
from kdcache.cache.reader import Cache, Split
from kdcache.errors import TrainingError
from kdcache.progress import Progress, Silent
from kdcache.student.collate import Collator, Tail, uses_draws
from kdcache.student.forward import loss_sums
from kdcache.student.loss import LossSums

if TYPE_CHECKING:
    from transformers import PreTrainedModel


AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.bfloat16}


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


def teacher_score(split: Split, *, max_length: int | None = None) -> Score:
    """The teacher on the labels of a split: the manifest's totals, or the rows of what is left at ``max_length``; of a
    mixture the mixed probabilities of the labels, from its rows.

    Raises:
        TrainingError: no sequence has a target within ``max_length`` tokens.
    """
    if max_length is None and not isinstance(split.cache, Mixture):
        return Score(split.summary.teacher_nll, 0.0, split.summary.positions, kl_temperature(split.cache))
    nll, tokens = 0.0, 0
    for sequence in split:
        rows = sequence.cut(max_length).rows
        nll, tokens = nll - float(rows.label_log_prob.sum(dtype=np.float64)), tokens + len(rows)
    _refuse_nothing(tokens, split, max_length)
    return Score(nll, 0.0, tokens, kl_temperature(split.cache))


def kl_temperature(cache: Cache) -> float:
    """The temperature at which students are compared with the teacher."""
    return 1.0 if 1.0 in cache.temperatures else min(cache.temperatures)


def score_tail(cache: Cache) -> Tail:
    """What stands for the mass outside when students are scored. Of a mixture one bucket: drawn entries would add what its
    teachers disagree by (`kdcache.student.mixed_teacher`)."""
    return "lumped" if isinstance(cache, Mixture) else "auto"


def student_score(
    model: PreTrainedModel,
    split: Split,
    *,
    batch_size: int,
    share: tuple[int, int] = (0, 1),
    progress: Progress | None = None,
    **options: Any,
) -> Score:
    """`score_in_batches`, in batches of half the size where memory runs out, and again; several processes do not."""
    while True:
        try:
            return score_in_batches(model, split, batch_size=batch_size, share=share, progress=progress, **options)
        except torch.OutOfMemoryError:
            if batch_size == 1 or share[1] > 1:
                raise
            batch_size //= 2
        if progress is not None:
            progress.warning(f"out of memory: scoring goes on with {batch_size} sequences per forward pass")


@torch.inference_mode()
def score_in_batches(
    model: PreTrainedModel,
    split: Split,
    *,
    batch_size: int,
    max_length: int | None = None,
    precision: str = "fp32",
    what: str = "student",
    share: tuple[int, int] = (0, 1),
    observe: Callable[[Mapping[str, torch.Tensor], LossSums], None] | None = None,
    progress: Progress | None = None,
) -> Score:
    """A student on a split, under the autocast of ``precision``; leaves the model in the mode it was in.

    Sequences are cut to ``max_length`` tokens, and those left without a target are passed over: batches and score are
    those of a cache that was made at this length. With a ``share`` of ``(rank, world)`` the processes take turns, and all of
    them get the whole score. ``observe`` is called with every batch and its sums.

    Raises:
        TrainingError: no sequence has a target within ``max_length`` tokens.
    """
    progress = progress or Silent()
    cache = split.cache
    temperature = kl_temperature(cache)
    tail = score_tail(cache)
    collate = Collator(cache.plan.tokenizer.pad_id, temperature, tail, max_length=max_length)
    was_training = model.training
    model.eval()
    scores = torch.zeros(3, dtype=torch.float64)
    passed = 0
    progress.begin(f"evaluate {what}", split.summary.positions, "tokens")
    try:
        scored = ((i, s) for i, s in enumerate(split) if s.targets[:max_length].any())
        for number in count():
            pairs = list(islice(scored, batch_size))
            if not pairs:
                break
            # Of the whole sequences: what is left of them is known only once all are read.
            done = sum(len(s.rows) for _, s in pairs)
            if number % share[1] != share[0]:
                progress.advance(done)
                passed += done
                continue
            batch = {k: v.to(model.device) for k, v in collate(pairs).items()}
            with torch.autocast(model.device.type, AUTOCAST[precision], enabled=precision != "fp32"):
                sums = loss_sums(
                    model,
                    model,
                    batch,
                    vocab_size=cache.vocab_size,
                    temperature=temperature,
                    ce_weight=1.0,
                    kd_weight=1.0,
                )
            if observe is not None:
                observe(batch, sums)
            scores = scores + torch.tensor(
                [sums.ce, sums.divergence, len(batch["teacher_log_tail"])], dtype=torch.float64
            )
            # Of several processes none knows the perplexity before the end.
            note = f"perplexity {math.exp(min(float(scores[0] / scores[2]), 700.0)):.3f}" if share[1] == 1 else ""
            progress.advance(done, note)
            passed += done
        # Sequences that were cut to nothing are done as well.
        progress.advance(split.summary.positions - passed)
    finally:
        progress.end()
        model.train(was_training)
    if share[1] > 1:
        scores = scores.to(model.device)
        torch.distributed.all_reduce(scores)
    ce, kl, tokens = scores.tolist()
    _refuse_nothing(int(tokens), split, max_length)
    drawn = tail == "auto" and uses_draws(cache.plan.design(split.number), temperature)
    return Score(ce, kl, int(tokens), temperature, not drawn)


def _refuse_nothing(tokens: int, split: Split, max_length: int | None) -> None:
    if not tokens:
        raise TrainingError(
            f"no sequence of split {split.name} has a target within its first {max_length} tokens; raise training.max_length"
        )
