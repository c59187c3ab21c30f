"""What a training step of a student costs, measured on one and two of its layers with random weights.

A two-layer model of the student's configuration is made, written to a temporary folder and loaded as the student would be:
quantised, with LoRA, on its device. It trains on real micro-batches, with both layers and with the second taken out;
so embeddings and head are there once. Layers cost the same each, so that both say what any number of them costs.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from kdcache.errors import StorageError, TrainingError
from kdcache.models import first_line
from kdcache.recipe import Recipe
from kdcache.recipe_student import StudentSection
from kdcache.student.assembly import load_student, with_adapter
from kdcache.student.batches import Batch
from kdcache.student.bench import Bench, layers_of, padded_tokens
from kdcache.student.packing import refuse_leaks
from kdcache.student.parameters import outline

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# Sizes of micro-batches that are timed, and how long: all of them at least once, unless that takes too long.
_SIZES, _ENOUGH_SECONDS, _MOST_SECONDS = 6, 5.0, 30.0


@dataclass(frozen=True)
class PerLayer:
    """A quantity measured on models of one and of two layers."""

    one: float
    two: float

    def at(self, layers: int) -> float:
        """What it is on a model of so many."""
        return self.one + (layers - 1) * max(0.0, self.two - self.one)


@dataclass(frozen=True)
class Probe:
    """What was measured: seconds for an average micro-batch, and bytes for the largest.

    Attributes:
        pass_seconds: forward and backward.
        update_seconds: clipping and a step of the optimizer.
        score_seconds: forward in evaluation.
        activation_bytes: kept for the backward pass, or (``whole``) everything that comes and goes in a step.
        loss_bytes: the loss's logits and gradients; 0 where they are in the activations.
        whole: the bytes are the peak that CUDA's allocator saw.
        largest: sequences and tokens of the micro-batch that the bytes are of.
        timed: micro-batches timed.
    """

    pass_seconds: PerLayer
    update_seconds: PerLayer
    score_seconds: PerLayer
    activation_bytes: PerLayer
    loss_bytes: int
    whole: bool
    largest: tuple[int, int]
    timed: int


def shortened(config: PreTrainedConfig, student: StudentSection) -> PreTrainedConfig | None:
    """The configuration with at most two layers; None where the architecture has no such number or no list of layers."""
    short = copy.deepcopy(config)
    text = short.get_text_config()
    count = getattr(text, "num_hidden_layers", None)
    if not isinstance(count, int) or count < 1 or layers_of(outline(config, student), count) is None:
        return None
    kept = min(2, count)
    try:
        # Lists with one item per layer, such as layer_types, must fit the number.
        for name, value in text.to_dict().items():
            if "layer" in name and isinstance(value, list) and len(value) == count:
                setattr(text, name, value[:kept])
        text.num_hidden_layers = kept
        found = layers_of(outline(short, student), kept)
    except Exception:  # whatever an architecture has against it: it is not probed, and that is said
        return None
    return short if found is not None else None


def write_random(short: PreTrainedConfig, student: StudentSection, folder: Path) -> None:
    """Make a shortened student with random weights; before processes of a launcher meet, after which one alone would write.

    Raises:
        StorageError: there is no room for embeddings, head and two layers.
    """
    made = transformers.AutoModelForCausalLM.from_config(short, dtype=getattr(torch, student.dtype))
    try:
        made.save_pretrained(folder)
    except (OSError, RuntimeError) as exc:
        raise StorageError(f"cannot write two layers of random weights to {folder}: {first_line(exc)}") from exc


def probe(
    recipe: Recipe,
    student: StudentSection,
    folder: Path,
    batches: Sequence[Batch],
    loss: dict[str, Any],
    arguments: transformers.TrainingArguments,
) -> Probe:
    """Measure a shortened student.

    Args:
        recipe: for its training section.
        student: how the model is quantised and adapted.
        folder: of `write_random`.
        batches: micro-batches of the training, on the CPU.
        loss: keyword arguments of `loss_sums`.
        arguments: of the training, without evaluation; their output directory is created.

    Raises:
        KdcacheError: as loading the student would.
        TrainingError: transformers cannot make the optimizer.
    """
    model = load_student(student, saved=folder)
    if recipe.training.packing:
        refuse_leaks(model)
    model = with_adapter(model, student)
    try:
        # Makes the optimizer as the training will; nothing else of it is used.
        optimizer = transformers.Trainer(model=model, args=arguments).create_optimizer()
    except (ValueError, ImportError, RuntimeError) as exc:
        raise TrainingError(f"transformers cannot set up the training: {first_line(exc)}") from exc
    bench = Bench(model, optimizer, recipe.training, loss)
    return _measure(bench, sorted(batches, key=padded_tokens), model.config.get_text_config().num_hidden_layers)


def _measure(bench: Bench, by_size: list[Batch], layers: int) -> Probe:
    largest = by_size[-1]
    depths = list(range(1, layers + 1))
    for depth in depths:
        bench.train_pass(largest, depth)
        bench.update()
        bench.score_pass(largest, depth)
    step = max(1, len(by_size) // _SIZES)
    chosen = by_size[step // 2 :: step]
    # From the middle outwards: what is timed first stands best for all, should time run out.
    chosen.sort(key=lambda batch: abs(padded_tokens(batch) - padded_tokens(by_size[len(by_size) // 2])))
    passes: dict[int, list[float]] = {d: [] for d in depths}
    updates: dict[int, list[float]] = {d: [] for d in depths}
    scores: dict[int, list[float]] = {d: [] for d in depths}
    started = time.monotonic()
    for timed, batch in enumerate(cycle(chosen)):
        elapsed = time.monotonic() - started
        if (timed >= len(chosen) and elapsed > _ENOUGH_SECONDS) or (timed >= 2 and elapsed > _MOST_SECONDS):
            break
        for depth in depths:  # one beside the other, so that a busy machine slows both
            passes[depth].append(bench.train_pass(batch, depth) / padded_tokens(batch))
            updates[depth].append(bench.update())
            scores[depth].append(bench.score_pass(batch, depth) / padded_tokens(batch))
    tokens = statistics.fmean(map(padded_tokens, by_size))
    on_cuda = bench.device.type == "cuda"
    return Probe(
        pass_seconds=_extrapolation(passes, tokens),
        update_seconds=_extrapolation(updates, 1.0),
        score_seconds=_extrapolation(scores, tokens),
        activation_bytes=_per_layer([bench.peak(largest, d) if on_cuda else bench.saved(largest, d) for d in depths]),
        loss_bytes=0 if on_cuda else bench.loss_bytes(largest),
        whole=on_cuda,
        largest=(largest["input_ids"].shape[0], largest["input_ids"].shape[1]),
        timed=len(passes[1]),
    )


def _extrapolation(seconds: dict[int, list[float]], scale: float) -> PerLayer:
    """Medians of the first and of what the second layer adds, times ``scale``."""
    one = statistics.median(seconds[1])
    more = statistics.median(b - a for a, b in zip(seconds[1], seconds.get(2, seconds[1]), strict=True))
    return PerLayer(one * scale, (one + more) * scale)


def _per_layer(values: Sequence[int]) -> PerLayer:
    return PerLayer(values[0], values[-1])
