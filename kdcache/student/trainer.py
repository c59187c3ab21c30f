"""transformers.Trainer with our loss, our order of samples, and CE and KL in its log."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch.utils.data import Dataset

from kdcache.cache.codec import CachedSequence
from kdcache.cache.reader import Split
from kdcache.errors import TrainingError
from kdcache.progress import Progress
from kdcache.student.forward import loss_sums
from kdcache.student.sampler import ShardSampler


class SplitDataset(Dataset[tuple[int, CachedSequence]]):
    """A split of a cache as a map-style data set of ``(index, sequence)``."""

    def __init__(self, split: Split) -> None:
        self.split = split

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[int, CachedSequence]:
        return index, self.split[index]


class DistillationTrainer(transformers.Trainer):
    """Trains on a `SplitDataset` with a `Collator`.

    Args:
        vocab_size: the cache's vocabulary.
        temperature: T, the collator's.
        ce_weight: lambda_CE.
        kd_weight: lambda_KD.
        reduction: ``mean`` per valid token of the whole accumulation window, over all processes, or
            ``sum`` over tokens averaged over micro-batches.
        tail: ``lumped`` or ``renormalised``.
        order_seed: seed of the order of samples.
        **kwargs: of transformers.Trainer.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        temperature: float,
        ce_weight: float,
        kd_weight: float,
        reduction: str,
        tail: str,
        order_seed: int,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self._loss_options: dict[str, Any] = {
            "vocab_size": vocab_size,
            "temperature": temperature,
            "ce_weight": ce_weight,
            "kd_weight": kd_weight,
            "tail": tail,
        }
        self._reduction = reduction
        self._order_seed = order_seed
        # Makes the trainer count targets over the accumulation window and leave our scaling alone.
        self.model_accepts_loss_kwargs = True
        self._window = torch.zeros(3, dtype=torch.float64)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Loss of a micro-batch, scaled so that the accumulated gradient is that of the whole window."""
        base = self.accelerator.unwrap_model(model)
        sums = loss_sums(model, base, inputs, **self._loss_options)
        tokens = int((inputs["labels"][:, 1:] != -100).sum())
        if not torch.isfinite(sums.total):
            named = ", ".join(map(str, inputs["sequence_index"].tolist()))
            raise TrainingError(
                f"the loss is not finite at step {self.state.global_step + 1}, in a batch of the sequences {named} of the "
                "train split; lower training.learning_rate, or use training.precision bf16 or fp32"
            )
        self._window += torch.tensor([float(sums.ce), float(sums.kl), tokens], dtype=torch.float64)
        if self._reduction == "sum":
            loss = sums.total / self.args.gradient_accumulation_steps
        else:
            count = tokens if num_items_in_batch is None else num_items_in_batch
            loss = sums.total / count * self.accelerator.num_processes
        return (loss, None) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add CE and KL per token since the last log line, over all processes."""
        if "loss" in logs:
            ce, kl, tokens = self.accelerator.reduce(self._window.to(self.args.device), "sum").tolist()
            self._window.zero_()
            if tokens:
                logs = {**logs, "ce": ce / tokens, "kl": kl / tokens}
        super().log(logs, start_time)

    def _get_train_sampler(self, train_dataset: Any = None) -> ShardSampler:
        dataset = train_dataset if train_dataset is not None else self.train_dataset
        assert isinstance(dataset, SplitDataset)
        split = dataset.split
        sizes = [split.cache.plan.shards[i].sequences for i in split.shards]
        return ShardSampler(sizes, cache_id=split.cache.id, seed=self._order_seed)


class ProgressCallback(transformers.TrainerCallback):
    """Tells a `Progress` about steps and losses."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._note = ""
        self._reported = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A task of all remaining steps."""
        self._progress.begin("train student", state.max_steps - state.global_step, "steps")
        self._reported = state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Keep the newest losses for the next advance."""
        if logs and "loss" in logs:
            parts = [f"{key} {logs[key]:.4f}" for key in ("loss", "ce", "kl") if key in logs]
            self._note = "  ".join(parts)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """One optimizer step further."""
        self._progress.advance(state.global_step - self._reported, self._note)
        self._reported = state.global_step

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The task is over."""
        self._progress.end()
