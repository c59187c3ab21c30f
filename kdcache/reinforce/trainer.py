"""The reinforcement itself: TRL's GRPOTrainer (Shao et al. 2024, https://arxiv.org/abs/2402.03300) with our rewards, log and stop.

Each step samples ``num_generations`` completions of every one of its questions, compares their rewards within the question,
and makes one update on them (strictly on policy). Dropout is off, so that policy and reference differ by their weights alone.
"""

from __future__ import annotations

import csv
import importlib
import io
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import transformers

from kdcache.cache.files import write_file
from kdcache.devices import resolve_device
from kdcache.errors import KdcacheError, RecipeError, TrainingError
from kdcache.models import first_line
from kdcache.progress import Progress
from kdcache.recipe_reinforce import ReinforceRecipe
from kdcache.reinforce.questions import Question, conversation
from kdcache.reinforce.rewards import reward_functions
from kdcache.reinforce.student import REFERENCE, adapter_weights, put_back, refuse_other_reference
from kdcache.run_record import read_log
from kdcache.student.arguments import optimisation, refuse_absent_precision
from kdcache.student.checkpoints import saved_whole
from kdcache.student.progress_callback import ProgressCallback
from kdcache.student.stopping import stop_on_request

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Our column -> what TRL logs it as.
COLUMNS = {
    "reward": "reward",
    "reward_format": "rewards/format/mean",
    "reward_correct": "rewards/correct/mean",
    "reward_length": "rewards/length/mean",
    "reward_std": "reward_std",
    "kl": "kl",
    "length": "completions/mean_length",
    "cut_off": "completions/clipped_ratio",
    "entropy": "entropy",
    "same_reward": "frac_reward_zero_std",
    "loss": "loss",
    "learning_rate": "learning_rate",
    "grad_norm": "grad_norm",
}


def need_trl() -> Any:
    """The package trl.

    Raises:
        KdcacheError: it is not installed, or cannot be loaded.
    """
    try:
        trl: Any = importlib.import_module("trl")
        _ = trl.GRPOConfig, trl.GRPOTrainer  # loaded when they are asked for
    except (ImportError, RuntimeError) as exc:
        raise KdcacheError(
            f"kdcache reinforce needs the package trl: pip install 'kdcache[rl]' ({first_line(exc)})"
        ) from exc
    return trl


def reinforce_arguments(recipe: ReinforceRecipe, *, device: str, checkpoints: Path, tell: Any, date: str) -> Any:
    """TRL's GRPOConfig of a recipe.

    Raises:
        DeviceError: the precision is not to be had on the device.
        RecipeError: trl or transformers refuses a value.
    """
    trl, training = need_trl(), recipe.training
    place = resolve_device(device)
    refuse_absent_precision(training.precision, place)
    try:
        arguments = trl.GRPOConfig(
            output_dir=str(checkpoints),
            max_steps=training.steps,
            per_device_train_batch_size=training.batch_size,
            gradient_accumulation_steps=training.completions // training.batch_size,
            num_generations=training.num_generations,
            max_completion_length=training.max_completion_length,
            temperature=training.temperature,
            top_p=training.top_p,
            # Students are loaded to be trained, without the cache of keys and values; sampling without it is many times slower.
            generation_kwargs={"use_cache": True},
            chat_template_kwargs={"date_string": date} if recipe.prompt.shape == "chat" else None,
            beta=training.beta,
            loss_type=training.loss_type,
            scale_rewards=training.scale_rewards,
            epsilon=training.epsilon,
            epsilon_high=training.epsilon_high,
            mask_truncated_completions=training.mask_truncated_completions,
            reward_weights=[weight for _, weight in reward_functions(recipe)],
            disable_dropout=True,
            use_vllm=False,
            log_completions=False,
            gradient_checkpointing=training.gradient_checkpointing,
            report_to=training.report_to or "none",
            **optimisation(training, place=place, seed=recipe.seed, tell=tell),
        )
        arguments._n_gpu = min(1, arguments.n_gpu)
    except (ValueError, TypeError, ImportError, RuntimeError) as exc:
        raise RecipeError(f"trl refuses the training section: {first_line(exc)}") from exc
    return arguments


def make_trainer(
    recipe: ReinforceRecipe,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: list[Question],
    arguments: Any,
    log: Path,
    progress: Progress,
) -> Any:
    """TRL's trainer, whose reference is ``model`` as it comes in.

    Raises:
        TrainingError: trl cannot set it up, or would measure the KL against another model.
    """
    trl = need_trl()

    class Trainer(trl.GRPOTrainer):  # type: ignore[misc,name-defined]
        def create_model_card(self, *args: Any, **kwargs: Any) -> None:
            """The run directory says what it is."""

        def _save_checkpoint(self, model: Any, trial: Any) -> None:
            """An ordinary adapter, which appears under its name once it is whole; the reference never changes."""
            with saved_whole(self):
                super()._save_checkpoint(model, trial)
                shutil.rmtree(
                    Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}" / REFERENCE, ignore_errors=True
                )

    rows = [{"prompt": conversation(recipe, q), "reference": q.reference} for q in questions]
    weights = adapter_weights(model)
    tokenizer.padding_side = "left"
    try:
        trainer = Trainer(
            model=model,
            reward_funcs=[function for function, _ in reward_functions(recipe)],
            args=arguments,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[_Told(progress, "reinforce"), CsvLog(log)],
        )
    except (ValueError, TypeError, ImportError, RuntimeError) as exc:
        raise TrainingError(f"trl cannot set up the reinforcement: {first_line(exc)}") from exc
    trainer.remove_callback(transformers.PrinterCallback)
    put_back(trainer.model, weights)
    if recipe.training.beta:
        refuse_other_reference(trainer.model)
    return trainer


def train_to_end(trainer: Any, checkpoint: Path | None, progress: Progress) -> None:
    """Train from a checkpoint, or from the beginning. Ctrl-C, or SIGTERM, ends the step, saves a checkpoint and stops; a second
    one stops at once.

    Raises:
        KeyboardInterrupt: it was stopped.
        TrainingError: out of memory.
    """
    import torch

    if checkpoint is not None:
        state = transformers.TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        # Given a checkpoint of the end, the trainer would take one more step before it looks.
        if state.global_step >= trainer.args.max_steps:
            trainer._load_from_checkpoint(str(checkpoint))
            trainer.state = state
            return
    with stop_on_request(progress) as stop:
        trainer.add_callback(stop)
        try:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        except torch.OutOfMemoryError as exc:
            raise TrainingError(
                f"out of memory with training.batch_size {trainer.args.per_device_train_batch_size} completions per forward pass; "
                "lower it, training.prompts or training.max_completion_length, and go on by --resume"
            ) from exc


class _Told(ProgressCallback):
    """Progress with reward, length and KL."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Keep the newest figures for the next advance."""
        if logs and "reward" in logs:
            parts = [("reward", ".3f", "reward"), ("completions/mean_length", ".0f", "tokens"), ("kl", ".4f", "KL")]
            self._note = "  ".join(
                f"{name} {logs[key]:{form}}" for key, form, name in parts if logs.get(key) is not None
            )


class CsvLog(transformers.TrainerCallback):
    """Appends every logged step to a CSV file; a resumed run first drops what lies after its checkpoint."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the lines up to the step that training goes on from."""
        kept = [row for row in read_log(self._path) if row["step"] <= state.global_step] if self._path.exists() else []
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, ["step", *COLUMNS])
        writer.writeheader()
        writer.writerows({**row, "step": int(row["step"])} for row in kept)
        write_file(self._path, text.getvalue().encode())

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Append one line."""
        if not logs or "reward" not in logs:
            return
        row = {"step": state.global_step, **{name: logs.get(key) for name, key in COLUMNS.items()}}
        with self._path.open("a", newline="") as f:
            csv.DictWriter(f, ["step", *COLUMNS]).writerow(row)
