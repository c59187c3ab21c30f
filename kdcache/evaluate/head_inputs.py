"""The hidden states that a model's head is given, for those who look at a forward pass from outside."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from kdcache.student.collate import IGNORED


class HeadInputs:
    """Holds what the head of ``model`` was given last, until it is taken.

    Args:
        model: a causal language model.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._hidden_BLD: torch.Tensor | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While this lasts, the hidden states of each forward pass are held."""

        def hold(_module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            self._hidden_BLD = inputs[0]

        handle = self._model.get_output_embeddings().register_forward_pre_hook(hold)
        try:
            yield
        finally:
            handle.remove()
            self._hidden_BLD = None

    def take(self, labels_BL: torch.Tensor) -> torch.Tensor:
        """``[N, D]``: the held states of the positions that predict a target; they are held no longer.

        Args:
            labels_BL: the batch's labels, `IGNORED` where nothing is learnt.
        """
        assert self._hidden_BLD is not None
        hidden_ND = self._hidden_BLD[:, :-1][labels_BL[:, 1:] != IGNORED]
        self._hidden_BLD = None
        return hidden_ND
