"""transformers.Trainer with our loss, our order of samples, and CE and KL in its log."""

from __future__ import annotations

import math
from typing import Any

import torch
import transformers
from torch.utils.data import Dataset

from kdcache.cache.codec import CachedSequence
from kdcache.cache.reader import Split
from kdcache.errors import TrainingError
from kdcache.progress import Progress
from kdcache.student.collate import IGNORED
from kdcache.student.divergence import Divergence
from kdcache.student.forward import loss_sums
from kdcache.student.loss import LossSums
from kdcache.student.sampler import ShardSampler

# Forward KL is what a reader expects under "kl"; the others go by their own names.
LOGGED_AS = {"forward_kl": "kl"}
DIVERGENCE_KEYS = ("kl", "soft_ce", "reverse_kl", "jsd")


class SplitDataset(Dataset[tuple[int, CachedSequence]]):
    """A split of a cache as a map-style data set of ``(index, sequence)``."""

    def __init__(self, split: Split) -> None:
        self.split = split

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[int, CachedSequence]:
        return index, self.split[index]


class CachedDistillation:
    """What turns a transformers.Trainer, or any trainer built on it, into one that distils from a cache.

    A mixin: ``class Mine(CachedDistillation, trl.SFTTrainer)``. Give the trainer a `SplitDataset`, a `Collator`,
    arguments with ``remove_unused_columns=False`` and ``label_names=["labels"]``, and call `set_distillation` before
    ``train()``.
    """

    def set_distillation(
        self,
        *,
        vocab_size: int,
        temperature: float,
        ce_weight: float,
        kd_weight: float,
        reduction: str = "mean",
        divergence: Divergence = "forward_kl",
        beta: float = 0.5,
        kept_share: float = 1.0,
        order_seed: int = 0,
    ) -> None:
        """Choose the loss.

        Args:
            vocab_size: the cache's vocabulary.
            temperature: T, the collator's.
            ce_weight: lambda_CE.
            kd_weight: lambda_KD.
            reduction: ``mean`` per valid token of the whole accumulation window, over all processes, or
                ``sum`` over tokens averaged over micro-batches.
            divergence: as `distillation_loss` takes it.
            beta: of the generalised JSD.
            kept_share: share of the positions that have a teacher row, where the cache selects positions; with ``mean`` the
                KD term is averaged over these, the cross-entropy over all.
            order_seed: seed of the order of samples.
        """
        self._loss_options: dict[str, Any] = {
            "vocab_size": vocab_size,
            "temperature": temperature,
            "ce_weight": ce_weight,
            "kd_weight": kd_weight / kept_share if reduction == "mean" else kd_weight,
            "divergence": divergence,
            "beta": beta,
        }
        self._reduction = reduction
        self._kept_share = kept_share
        self._order_seed = order_seed
        # Makes the trainer count targets over the accumulation window and leave our scaling alone.
        self.model_accepts_loss_kwargs = True
        self._window = torch.zeros(3, dtype=torch.float64)

    def compute_loss(
        self: Any,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Loss of a micro-batch, scaled so that the accumulated gradient is that of the whole window.

        Raises:
            TrainingError: the loss is not finite; the sequences at fault are named.
        """
        sums = loss_sums(model, self.accelerator.unwrap_model(model), inputs, **self._loss_options)
        # One wait for the device, and not one for each number.
        total, ce, divergence = torch.stack([sums.total.detach(), sums.ce, sums.divergence]).double().tolist()
        if not math.isfinite(total):
            raise TrainingError(
                f"the loss is not finite at step {self.state.global_step + 1}, in the sequences "
                f"{_not_finite(sums, inputs)} of the train split; lower training.learning_rate, or use "
                "training.precision bf16 or fp32"
            )
        tokens = len(sums.ce_N)
        if model.training:  # an evaluation in between is no part of the training log
            self._window += torch.tensor([ce, divergence, tokens], dtype=torch.float64)
        if self._reduction == "sum":
            loss = sums.total / self.args.gradient_accumulation_steps
        else:
            loss = sums.total / (tokens if num_items_in_batch is None else num_items_in_batch)
            # A count over all processes meets gradients that are averaged over them.
            if num_items_in_batch is not None and self.args.average_tokens_across_devices:
                loss = loss * self.accelerator.num_processes
        return (loss, {}) if return_outputs else loss

    def log(self: Any, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add CE and divergence per token since the last log line, over all processes."""
        if "loss" in logs:
            window = self._window.to(torch.float32).to(self.args.device)
            ce, divergence, tokens = self.accelerator.reduce(window, "sum").tolist()
            self._window.zero_()
            if tokens:
                name = self._loss_options["divergence"]
                logs = {**logs, "ce": ce / tokens, LOGGED_AS.get(name, name): divergence / (tokens * self._kept_share)}
        super().log(logs, start_time)  # type: ignore[misc]

    def _get_train_sampler(self: Any, train_dataset: Any = None) -> ShardSampler:
        dataset = train_dataset if train_dataset is not None else self.train_dataset
        assert isinstance(dataset, SplitDataset)
        split = dataset.split
        sizes = [split.cache.plan.shards[i].sequences for i in split.shards]
        return ShardSampler(sizes, cache_id=split.cache.id, seed=self._order_seed, upcoming=split.read_ahead)


class DistillationTrainer(CachedDistillation, transformers.Trainer):
    """transformers.Trainer that distils; ``distillation`` are the arguments of `set_distillation`."""

    def __init__(self, *, distillation: dict[str, Any], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.set_distillation(**distillation)


def _not_finite(sums: LossSums, inputs: dict[str, torch.Tensor]) -> str:
    """Indices of the sequences with a row that is not finite, or of the whole batch."""
    per_sequence = (inputs["labels"][:, 1:] != IGNORED).sum(dim=1)
    owner = torch.repeat_interleave(inputs["sequence_index"], per_sequence)
    bad = ~torch.isfinite(sums.ce_N + sums.divergence_N)
    named = owner[bad].unique().tolist() or inputs["sequence_index"].tolist()
    return ", ".join(map(str, named))


class ProgressCallback(transformers.TrainerCallback):
    """Tells a `Progress` about steps and losses."""

    def __init__(self, progress: Progress, task: str = "train student") -> None:
        self._progress = progress
        self._task = task
        self._note = ""
        self._reported = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A task of all remaining steps."""
        self._progress.begin(self._task, state.max_steps - state.global_step, "steps")
        self._reported = state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Keep the newest losses for the next advance."""
        if logs and "loss" in logs:
            parts = [f"{key} {logs[key]:.4f}" for key in ("loss", "ce", *DIVERGENCE_KEYS) if key in logs]
            self._note = "  ".join(parts)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """One optimizer step further."""
        self._progress.advance(state.global_step - self._reported, self._note)
        self._reported = state.global_step
        if state.global_step >= state.max_steps:
            control.should_log = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The task is over."""
        self._progress.end()
