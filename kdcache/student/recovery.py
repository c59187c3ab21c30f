"""Train to the end: from a checkpoint, and past an out-of-memory error with smaller forward passes."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError

from kdcache.errors import StorageError, TrainingError
from kdcache.models import first_line
from kdcache.progress import Progress
from kdcache.student.checkpoints import best_checkpoint
from kdcache.student.stopping import stop_on_request
from kdcache.student.trainer import DistillationTrainer


def train_to_end(trainer: DistillationTrainer, checkpoint: Path | None, progress: Progress) -> None:
    """Train, halving the forward pass and doubling the accumulation as often as memory demands.

    The global batches stay what they are. Weights and optimizer are those of the last whole step: nothing is lost but the
    step in flight. Of one process, Ctrl-C or SIGTERM ends the step, saves a checkpoint and stops; of several, which would not
    all hear of it within the same step, at once.

    Raises:
        KeyboardInterrupt: it was stopped.
        TrainingError: out of memory with one sequence per forward pass, in the optimizer itself, or in one of several
            processes.
    """
    if trainer.args.world_size > 1:
        _to_end(trainer, checkpoint, progress)
        return
    with stop_on_request(progress) as stop:
        trainer.add_callback(stop)
        _to_end(trainer, checkpoint, progress)


def _to_end(trainer: DistillationTrainer, checkpoint: Path | None, progress: Progress) -> None:
    watch = _OptimizerWatch()
    trainer.add_callback(watch)
    while True:
        try:
            _train(trainer, checkpoint)
            return
        except torch.OutOfMemoryError as exc:
            refused = _refusal(trainer, watch)
            if refused is not None:
                raise refused from exc
            # The frames of the failed step hold the tensors that memory was full of.
            traceback.clear_frames(exc.__traceback__)
        checkpoint = _smaller(trainer, progress)


def _refusal(trainer: DistillationTrainer, watch: _OptimizerWatch) -> TrainingError | None:
    args = trainer.args
    tried = f"out of memory with {args.per_device_train_batch_size} sequences per forward pass"
    if watch.inside:
        return TrainingError(
            f"{tried}, in the optimizer's own step; a smaller batch would not help: use training.optimizer="
            "paged_adamw_8bit, a smaller student.lora.r, or a student.quantization"
        )
    if args.world_size > 1:
        return TrainingError(
            f"{tried} in process {args.process_index} of {args.world_size}; halve training.batch_size, double "
            "training.accumulation and go on by --resume"
        )
    if args.per_device_train_batch_size == 1:
        return TrainingError(
            f"{tried}; use training.max_length, training.gradient_checkpointing=true or a student.quantization"
        )
    return None


def _smaller(trainer: DistillationTrainer, progress: Progress) -> Path:
    """Halve the forward pass and keep the training as it stands in a checkpoint to go on from."""
    args, model = trainer.args, trainer.model
    assert model is not None
    assert args.output_dir is not None
    before = args.per_device_train_batch_size
    # The largest that fits into the same global batch: half of it, where that is a whole number.
    after = next(b for b in range(before // 2, 0, -1) if before % b == 0)
    args.per_device_train_batch_size = after
    args.gradient_accumulation_steps *= before // after
    trainer._train_batch_size = args.train_batch_size
    progress.end()
    progress.warning(
        f"out of memory at step {trainer.state.global_step + 1} with {before} sequences per forward pass: going on with {after} "
        f"and training.accumulation {args.gradient_accumulation_steps}, the global batches stay the same"
    )
    model.zero_grad(set_to_none=True)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    trainer._save_checkpoint(model, None)
    return Path(args.output_dir) / f"checkpoint-{trainer.state.global_step}"


def _train(trainer: DistillationTrainer, checkpoint: Path | None) -> None:
    """Train to the end, from a checkpoint where there is one; one that stands at the end is only loaded."""
    if checkpoint is not None:
        state = transformers.TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        # Given such a checkpoint, the trainer would take one more step before it looks.
        if state.global_step >= state.max_steps or _stopped_early(state):
            best = (
                best_checkpoint(checkpoint.parent, state.best_global_step)
                if trainer.args.load_best_model_at_end
                else None
            )
            trainer._load_from_checkpoint(best or str(checkpoint))
            trainer.state = state
            return
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))


def _stopped_early(state: transformers.TrainerState) -> bool:
    callbacks: Any = state.stateful_callbacks or {}
    return bool(callbacks.get("TrainerControl", {}).get("args", {}).get("should_training_stop"))


class _OptimizerWatch(transformers.TrainerCallback):
    """Knows whether the optimizer is at work: what it has half done cannot be gone on from."""

    inside = False

    def on_pre_optimizer_step(self, *args: object, **kwargs: object) -> None:
        """The optimizer's step begins."""
        self.inside = True

    def on_optimizer_step(self, *args: object, **kwargs: object) -> None:
        """It is over."""
        self.inside = False


@contextmanager
def translated(path: Path, batch_size: int) -> Iterator[None]:
    """Foreign errors of training and saving in our terms."""
    try:
        yield
    except torch.OutOfMemoryError as exc:
        raise TrainingError(
            f"out of memory with training.batch_size {batch_size} outside the training itself; halve it and double "
            "training.accumulation"
        ) from exc
    except (OSError, SafetensorError, RuntimeError) as exc:
        # torch.save reports a full disk as a RuntimeError of its archive writer.
        if (
            isinstance(exc, RuntimeError)
            and "inline_container" not in str(exc)
            and "PytorchStreamWriter" not in str(exc)
        ):
            raise
        raise StorageError(f"cannot write to {path}: {first_line(exc)}; free some space and go on by --resume") from exc
