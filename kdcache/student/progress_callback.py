"""Progress of a training on the terminal."""

from __future__ import annotations

from typing import Any

import transformers

from kdcache.progress import Progress
from kdcache.student.trainer import DIVERGENCE_KEYS


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

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        """Say what an evaluation in between found."""
        if metrics and "eval_perplexity" in metrics:
            self._progress.message(
                f"step {state.global_step}: validation perplexity {metrics['eval_perplexity']:.3f}, "
                f"KL to teacher {metrics['eval_kl']:.4f}"
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """One optimizer step further."""
        self._progress.advance(state.global_step - self._reported, self._note)
        self._reported = state.global_step
        if state.global_step >= state.max_steps:
            control.should_log = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The task is over."""
        self._progress.end()
