"""A student on the bench: what a pass through its first layers takes, in seconds and in bytes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from kdcache.evaluate.perplexity import AUTOCAST
from kdcache.recipe_training import TrainingSection
from kdcache.student.batches import Batch
from kdcache.student.forward import loss_sums
from kdcache.student.loss import CHUNK_BYTES


class Bench:
    """A student that trains with its first ``depth`` layers.

    Args:
        model: with its adapter, on its device.
        optimizer: of its trained parameters.
        training: precision, checkpointing and clipping.
        loss: keyword arguments of `loss_sums`.
    """

    def __init__(
        self, model: Any, optimizer: torch.optim.Optimizer, training: TrainingSection, loss: dict[str, Any]
    ) -> None:
        self.device: torch.device = model.device
        self._model = model
        self._optimizer = optimizer
        self._training = training
        self._loss = loss
        self._trained = [p for p in model.parameters() if p.requires_grad]
        text = model.config.get_text_config()
        found = layers_of(model, text.num_hidden_layers)
        assert found is not None
        self._parent, self._name = found
        self._layers = getattr(self._parent, self._name)
        self._checkpointing(self._training.gradient_checkpointing)

    def train_pass(self, batch: Batch, depth: int) -> float:
        """Seconds of a forward and backward pass."""
        self._model.train()
        with self._cut(depth):
            return self._seconds(lambda: self._sums(batch).total.backward())

    def score_pass(self, batch: Batch, depth: int) -> float:
        """Seconds of a forward pass in evaluation."""
        self._model.eval()
        with self._cut(depth), torch.inference_mode():
            return self._seconds(lambda: self._sums(batch))

    def update(self) -> float:
        """Seconds of a step of the optimizer on the gradients that are there, which are forgotten."""

        def step() -> None:
            if self._training.clip is not None:
                torch.nn.utils.clip_grad_norm_(self._trained, self._training.clip)
            self._optimizer.step()
            self._optimizer.zero_grad()

        return self._seconds(step)

    def saved(self, batch: Batch, depth: int) -> int:
        """Bytes kept for the backward pass; with checkpointing also those of the one layer that is being recomputed."""
        kept = self._kept(batch, depth)
        if not self._training.gradient_checkpointing:
            return kept
        self._checkpointing(False)
        try:
            layer = self._kept(batch, 2) - self._kept(batch, 1) if len(self._layers) > 1 else self._kept(batch, 1)
        finally:
            self._checkpointing(True)
        return kept + layer

    def peak(self, batch: Batch, depth: int) -> int:
        """Bytes that a pass needs for a while beside weights, gradients and the optimizer's state, on CUDA."""
        self.train_pass(batch, depth)  # leaves gradients behind, as they lie there from the second forward pass on
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        self.train_pass(batch, depth)
        needed = torch.cuda.max_memory_allocated(self.device) - before
        self._optimizer.zero_grad()
        return needed

    def loss_bytes(self, batch: Batch) -> int:
        """The loss's buffers: a chunk of logits, gradients by hidden states and by a trained head, a float32 head."""
        head = self._model.get_output_embeddings().weight
        rows, width = len(batch["teacher_ids"]), self._loss["vocab_size"]
        chunk = min(rows, max(1, CHUNK_BYTES // (4 * width))) * width * 4
        copied = 0 if head.dtype == torch.float32 else width * head.shape[1] * 4
        return int(chunk + 4 * rows * head.shape[1] + copied + (4 * head.numel() if head.requires_grad else 0))

    def _kept(self, batch: Batch, depth: int) -> int:
        own = {t.untyped_storage().data_ptr() for t in (*self._model.parameters(), *self._model.buffers())}
        found: dict[int, int] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                found[storage.data_ptr()] = storage.nbytes()
            return tensor

        self._model.train()
        with self._cut(depth), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            # Held, so that no memory is given away and counted under the same address again.
            graph = self._sums(batch)
        del graph
        return sum(found.values())

    def _sums(self, batch: Batch) -> Any:
        placed = {k: v.to(self.device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        precision = self._training.precision
        with torch.autocast(self.device.type, AUTOCAST[precision], enabled=precision != "fp32"):
            return loss_sums(self._model, self._model, placed, **self._loss)

    def _seconds(self, work: Callable[[], object]) -> float:
        started = time.perf_counter()
        work()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - started

    @contextmanager
    def _cut(self, depth: int) -> Iterator[None]:
        setattr(self._parent, self._name, self._layers[:depth])
        try:
            yield
        finally:
            setattr(self._parent, self._name, self._layers)

    def _checkpointing(self, on: bool) -> None:
        # The method was renamed; older releases only know the second name.
        kind = "activation" if hasattr(self._model, "activation_checkpointing_enable") else "gradient"
        if on:
            getattr(self._model, f"{kind}_checkpointing_enable")(
                **{f"{kind}_checkpointing_kwargs": {"use_reentrant": False}}
            )
        else:
            getattr(self._model, f"{kind}_checkpointing_disable")()


def layers_of(model: Any, count: int) -> tuple[torch.nn.Module, str] | None:
    """The module, and the name in it, of the decoder's only list of ``count`` modules."""
    found = [
        (parent, name)
        for parent in model.get_decoder().modules()
        for name, child in parent.named_children()
        if isinstance(child, torch.nn.ModuleList) and len(child) == count
    ]
    return found[0] if len(found) == 1 else None


def padded_tokens(batch: Batch) -> int:
    """Tokens of a micro-batch with what fills its rows."""
    return int(batch["input_ids"].numel())
