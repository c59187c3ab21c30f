"""transformers.Trainer with our loss, our order of samples, token-summed evaluation, and CE and KL in its log."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils.data import DataLoader

from kdcache.evaluate.perplexity import student_score
from kdcache.student.batches import Batch, MicroBatches, OrderOptions, SplitDataset, as_tensors, micro_batch_loader
from kdcache.student.checkpoints import best_checkpoint, saved_whole
from kdcache.student.divergence import Divergence
from kdcache.student.forward import loss_sums
from kdcache.student.hidden import HiddenTerm, detach_projection, without_projection
from kdcache.student.nonfinite import NonFiniteGuard, named_sequences, skipped_in
from kdcache.student.processes import turns
from kdcache.student.sampler import BatchPlan, MicroBatchNumbers

# Forward KL is what a reader expects under "kl"; the others go by their own names.
LOGGED_AS = {"forward_kl": "kl"}
DIVERGENCE_KEYS = ("kl", "soft_ce", "reverse_kl", "jsd")
# A constant, or a function of the share of the training that is done, 0 to 1.
Scheduled = float | Callable[[float], float]


class CachedDistillation:
    """What turns a transformers.Trainer, or any trainer built on it, into one that distils from a cache.

    A mixin: ``class Mine(CachedDistillation, trl.SFTTrainer)``. Give the trainer a `SplitDataset`, a `Collator`,
    arguments with ``remove_unused_columns=False`` and ``label_names=["labels"]``, and call `set_distillation` before
    ``train()``. Batches come from `MicroBatches`, the same global batches for any number of processes.
    """

    def set_distillation(
        self: Any,
        *,
        vocab_size: int,
        temperature: Scheduled,
        ce_weight: Scheduled,
        kd_weight: Scheduled,
        reduction: str = "mean",
        divergence: Divergence = "forward_kl",
        beta: float = 0.5,
        control_variate: bool = False,
        kept_share: float = 1.0,
        order: OrderOptions | None = None,
        skip_nonfinite: int = 0,
        tell: Callable[[str], None] | None = None,
        hidden: HiddenTerm | None = None,
    ) -> None:
        """Choose the loss and the order of samples.

        Args:
            vocab_size: the cache's vocabulary.
            temperature: T, constant or scheduled; the collator's own is not used in training.
            ce_weight: lambda_CE, constant or scheduled.
            kd_weight: lambda_KD, constant or scheduled.
            reduction: ``mean`` per valid token of the whole accumulation window, over all processes, or
                ``sum`` over tokens averaged over micro-batches.
            divergence: as `distillation_loss` takes it.
            beta: of the generalised JSD.
            control_variate: as `distillation_loss` takes it.
            kept_share: share of the positions that have a teacher row, where the cache selects positions; with ``mean`` the
                KD term is averaged over these, the cross-entropy over all.
            order: seed and manner of the order of samples.
            skip_nonfinite: steps with a loss or gradient that is not finite to leave out before the training stops.
            tell: given every warning in words.
            hidden: a term on hidden states, its projection attached to the model already.
        """
        self._scheduled = {"temperature": temperature, "ce_weight": ce_weight, "kd_weight": kd_weight}
        self._loss_options: dict[str, Any] = {
            "vocab_size": vocab_size, "divergence": divergence, "beta": beta, "control_variate": control_variate,
        }  # fmt: skip
        self._reduction = reduction
        self._kept_share = kept_share
        self._order = order or OrderOptions()
        # The sum variant is averaged over micro-batches as they were asked for, not as memory allowed them.
        self._sum_over = self.args.per_device_train_batch_size
        # Makes the trainer count targets over the accumulation window and leave our scaling alone.
        self.model_accepts_loss_kwargs = True
        self._hidden = hidden
        # CE, divergence, hidden states and tokens since the last log line, and those of the step in flight.
        self._window, self._pending = torch.zeros(2, 4, dtype=torch.float64)
        self._guard = NonFiniteGuard(skip_nonfinite, tell)
        self._numbers: MicroBatchNumbers | None = None
        self._total_steps = 1  # until there is a loader
        self.add_callback(self._guard)
        self.add_callback(_Upkeep(self))

    @property
    def batch_plan(self: Any) -> BatchPlan:
        """How this process shares in the global batches."""
        args = self.args
        return BatchPlan(
            len(self.train_dataset), args.per_device_train_batch_size, args.gradient_accumulation_steps, args.world_size,
            args.process_index,
        )  # fmt: skip

    @property
    def total_steps(self: Any) -> int:
        """Optimizer steps of the whole training."""
        args = self.args
        return int(args.max_steps) if args.max_steps > 0 else math.ceil(args.num_train_epochs * self.batch_plan.steps)

    @property
    def skipped_steps(self: Any) -> int:
        """Steps left out because their loss or gradient was not finite."""
        return skipped_in(self.state)

    def get_train_dataloader(self: Any) -> DataLoader[Batch]:
        """This process's micro-batches; not accelerate's sharding, which repeats sequences to even out an epoch's end."""
        dataset, args = self.train_dataset, self.args
        assert isinstance(dataset, SplitDataset)
        plan = self.batch_plan
        self._total_steps = self.total_steps
        temperature_at = partial(_value_at_step, self._scheduled["temperature"], self._total_steps)
        self._numbers = MicroBatchNumbers(plan)
        return micro_batch_loader(
            MicroBatches(dataset.split, plan, self._order, self.data_collator, temperature_at),
            self._numbers,
            workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
        )

    def get_batch_samples(self: Any, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device) -> Any:
        """The micro-batches of a step, and the number of their targets over all processes."""
        return super().get_batch_samples(map(as_tensors, epoch_iterator), num_batches, device)  # type: ignore[misc]

    def compute_loss(
        self: Any,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Loss of a micro-batch, scaled so that the accumulated gradient is that of the whole window.

        Raises:
            TrainingError: the loss is not finite and no more such steps may be left out; the sequences at fault are named.
        """
        base, term = self.accelerator.unwrap_model(model), self._hidden
        sums = loss_sums(model, base, inputs, **self._loss_options, **self._weights(inputs), hidden=term)
        apart = torch.zeros_like(sums.ce) if term is None else term.last
        # One wait for the device, and not one for each number.
        total, ce, divergence, hidden = torch.stack([sums.total.detach(), sums.ce, sums.divergence, apart]).tolist()
        tokens = len(sums.ce_N)
        if not math.isfinite(total):
            self._guard.loss_not_finite(named_sequences(sums, inputs), self.state)
        elif model.training:  # an evaluation in between is no part of the training log
            self._pending += torch.tensor([ce, divergence, hidden, tokens], dtype=torch.float64)
            self._guard.seen(inputs)
        if self._reduction == "sum":
            loss = sums.total * (self.args.world_size * self._sum_over / self._numbers.plan.global_batch)
        else:
            counted = tokens if num_items_in_batch is None else num_items_in_batch
            # Cut short, a whole window may have nothing to learn.
            loss = sums.total / (counted.clamp(min=1) if isinstance(counted, torch.Tensor) else max(1, counted))
            # A count over all processes meets gradients that are averaged over them.
            if num_items_in_batch is not None and self.args.average_tokens_across_devices:
                loss = loss * self.accelerator.num_processes
        return (loss, {}) if return_outputs else loss

    def evaluate(
        self: Any, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Loss, perplexity and KL to the teacher on a `SplitDataset`, by token sums over all processes."""
        dataset = eval_dataset if eval_dataset is not None else self.eval_dataset
        assert isinstance(dataset, SplitDataset)
        score = student_score(
            self.model,
            dataset.split,
            batch_size=self.args.per_device_eval_batch_size,
            precision="bf16" if self.args.bf16 else "fp16" if self.args.fp16 else "fp32",
            max_length=self._order.max_length,
            share=turns(self.args),
        )
        metrics = {
            f"{metric_key_prefix}_loss": score.loss,
            f"{metric_key_prefix}_perplexity": score.perplexity,
            f"{metric_key_prefix}_kl": score.kl,
        }
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self: Any, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add CE and divergence per token since the last log line, over all processes, and what is scheduled."""
        if "loss" in logs:
            window = self._window.to(torch.float32).to(self.args.device)
            ce, divergence, hidden, tokens = self.accelerator.reduce(window, "sum").tolist()
            self._window.zero_()
            if tokens:
                name = self._loss_options["divergence"]
                logs = {**logs, "ce": ce / tokens, LOGGED_AS.get(name, name): divergence / (tokens * self._kept_share)}
                logs |= {} if self._hidden is None else {"hidden": hidden / tokens}
            # Of the step that was just made.
            step = max(0, self.state.global_step - 1)
            moving = {k: _value_at_step(v, self._total_steps, step) for k, v in self._scheduled.items() if callable(v)}
            logs = {**logs, **moving}
        super().log(logs, start_time)  # type: ignore[misc]

    def _weights(self: Any, inputs: dict[str, Any]) -> dict[str, float]:
        """Temperature, which the batch was made at, and weights at this step."""
        values = {k: _value_at_step(v, self._total_steps, self.state.global_step) for k, v in self._scheduled.items()}
        values["temperature"] = inputs.get("temperature", values["temperature"])
        if self._reduction == "mean":
            values["kd_weight"] /= self._kept_share
        return values

    def _save_checkpoint(self: Any, model: Any, trial: Any) -> None:
        """A checkpoint appears under its name once it is whole."""
        with saved_whole(self):
            super()._save_checkpoint(model, trial)  # type: ignore[misc]
            if self._hidden is not None and self.args.should_save:
                self._hidden.save(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}")

    def _save(self: Any, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """The student alone: what trains with it has a file of its own."""
        with without_projection(self.model):
            super()._save(output_dir, state_dict)  # type: ignore[misc]

    def _load_from_checkpoint(self: Any, resume_from_checkpoint: str, model: Any = None) -> None:
        """A checkpoint's weights, and what of the training is no part of the student."""
        super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
        if self._hidden is not None:
            self._hidden.load(Path(resume_from_checkpoint))

    def end_hidden(self: Any) -> None:
        """The training is over: let the teacher go, and take the projection off the student."""
        if self._hidden is not None:
            detach_projection(self.model)
            self._hidden = None


class DistillationTrainer(CachedDistillation, transformers.Trainer):
    """transformers.Trainer that distils; ``distillation`` are the arguments of `set_distillation`."""

    def __init__(self, *, distillation: dict[str, Any], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.set_distillation(**distillation)


class _Upkeep(transformers.TrainerCallback):
    """Tells the sampler its epoch, and keeps the checkpoint of the best evaluation findable."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The run directory may lie elsewhere than when the state was saved, and how often to log or save have changed."""
        state.compute_steps(args, state.max_steps)
        self._trainer._pending.zero_()
        state.best_model_checkpoint = best_checkpoint(Path(args.output_dir), state.best_global_step)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The next iteration of the loader is of this epoch: by steps, since a fraction of epochs may be off by rounding."""
        numbers = self._trainer._numbers
        numbers.epoch = state.global_step // numbers.plan.steps

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The step is made, and belongs to the log."""
        self._trainer._window += self._trainer._pending
        self._trainer._pending.zero_()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The best so far can only be kept if it is saved."""
        best = math.inf if state.best_metric is None else state.best_metric
        if args.load_best_model_at_end and kwargs["metrics"].get("eval_loss", math.inf) < best:
            control.should_save = True


def _value_at_step(scheduled: Scheduled, total_steps: int, step: int) -> float:
    if not callable(scheduled):
        return scheduled
    return scheduled(min(1.0, step / max(1, total_steps - 1)))


__all__ = ["DIVERGENCE_KEYS", "CachedDistillation", "DistillationTrainer", "OrderOptions", "SplitDataset"]
