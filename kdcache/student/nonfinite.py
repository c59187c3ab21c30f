"""What happens when a loss or a gradient is not finite: the run stops and names the sequences, or leaves the step out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers

from kdcache.errors import TrainingError
from kdcache.student.loss import LossSums

# The scaler halves its scale each time: from 65,536 to less than 1.
_OVERFLOWS = 20
_WAY_OUT = "lower training.learning_rate, or use training.precision bf16 or fp32"


class NonFiniteGuard(transformers.TrainerCallback):
    """Looks at every step's loss and gradient before the optimizer takes it.

    A step that is left out changes no weight and no state of the optimizer; the schedule goes on, and the training state
    remembers it, so that a run that is resumed goes on counting.

    Args:
        allowed: steps that may be left out before the training stops.
        tell: given every step that is left out, in words.
    """

    def __init__(self, allowed: int = 0, tell: Callable[[str], None] | None = None) -> None:
        self._allowed = allowed
        self._tell = tell
        self.skipped = 0
        self._seen: list[torch.Tensor] = []
        self._bad: str | None = None
        self._overflows = 0

    def seen(self, inputs: dict[str, Any]) -> None:
        """Note the sequences of a micro-batch of this step."""
        self._seen.append(inputs["sequence_index"])

    def loss_not_finite(self, sequences: str, state: Any) -> None:
        """A micro-batch's loss is not finite.

        Raises:
            TrainingError: no more steps may be left out.
        """
        self._bad = sequences
        # Of several processes all stop together, before the optimizer's step.
        if self.skipped >= self._allowed and not torch.distributed.is_initialized():
            raise self._error("loss", sequences, state)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count what was left out before the run was resumed."""
        self.skipped = skipped_in(state)
        self._seen, self._bad, self._overflows = [], None, 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The gradient is there, summed over micro-batches and processes: every process sees the same one.

        Raises:
            TrainingError: it is not finite, and no more steps may be left out.
        """
        seen, bad = self._seen, self._bad
        self._seen, self._bad = [], None
        parameters = [p for p in kwargs["model"].parameters() if p.grad is not None]
        # Half precision overflows by design: the loss scaler leaves such steps out itself.
        fine = bad is None and (args.fp16 or _all_finite([p.grad for p in parameters if p.grad is not None]))
        if args.world_size > 1:
            # Where the loss alone is infinite, only one process knows.
            worst = torch.tensor(float(not fine), device=args.device)
            torch.distributed.all_reduce(worst, op=torch.distributed.ReduceOp.MAX)
            fine = not worst.item()
        if fine:
            return
        named = bad if bad is not None else _listed(torch.cat(seen)) if seen else "of other processes"
        if self.skipped >= self._allowed:
            raise self._error("gradient", named, state)
        self.skipped += 1
        for parameter in parameters:
            if args.fp16:
                parameter.grad.zero_()  # the scaler insists on gradients
            else:
                parameter.grad = None
        state.log_history.append({"skipped_step": state.global_step + 1, "sequences": named, "step": state.global_step})
        if self._tell is not None:
            self._tell(
                f"step {state.global_step + 1} is left out, its {'gradient' if bad is None else 'loss'} is not finite "
                f"(sequences {named}); {self._allowed - self.skipped} more may be"
            )

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count the steps that the loss scaler of half precision has left out one after the other.

        Raises:
            TrainingError: so many that the scale is not to blame.
        """
        left_out = args.fp16 and getattr(kwargs["optimizer"], "step_was_skipped", False)
        self._overflows = self._overflows + 1 if left_out else 0
        if self._overflows >= _OVERFLOWS:
            raise TrainingError(
                f"the gradient was not finite in {_OVERFLOWS} steps in a row, up to step {state.global_step + 1}, at ever smaller "
                f"loss scales; {_WAY_OUT}"
            )

    def _error(self, what: str, sequences: str, state: Any) -> TrainingError:
        after = f" after {self.skipped} steps left out" if self.skipped else ""
        return TrainingError(
            f"the {what} is not finite at step {state.global_step + 1}{after}, in the sequences {sequences} of the train "
            f"split; {_WAY_OUT}"
        )


def skipped_in(state: Any) -> int:
    """Steps of a training, as its state remembers them, that were left out."""
    return sum("skipped_step" in line for line in state.log_history)


def named_sequences(sums: LossSums, inputs: dict[str, Any]) -> str:
    """Indices in the split of the sequences with a row that is not finite, or of the whole batch."""
    owner = torch.repeat_interleave(inputs["sequence_index"], inputs["sequence_targets"])
    bad = ~torch.isfinite(sums.ce_N + sums.divergence_N)
    found = owner[bad]
    return _listed(found if len(found) else inputs["sequence_index"])


def _listed(indices: torch.Tensor) -> str:
    return ", ".join(map(str, indices[indices >= 0].unique().tolist()))


def _all_finite(grads: list[torch.Tensor]) -> bool:
    # A sum of finite numbers may overflow, a norm of them in float32 hardly; both are reasons to stop.
    if not grads:
        return True
    norm: Any = torch.nn.utils.get_total_norm(grads)
    return bool(torch.isfinite(norm.full_tensor() if hasattr(norm, "full_tensor") else norm))
