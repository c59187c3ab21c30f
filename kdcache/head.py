"""Products with a model's output head whose results are float32 whatever the weights are.

Logits rounded to bfloat16 are off by 29 % of a position's gradient (up to 0.06 at a logit of 16). CUDA multiplies
half-precision factors straight into a float32 result; elsewhere one float32 copy of the weight is made.
"""

from __future__ import annotations

import torch

_COLUMNS = 4096


class Head:
    """Weight ``[V, D]`` and bias ``[V]`` or None, detached; ``compute`` is the dtype of results.

    Axes: ``C`` rows, ``D`` hidden, ``V`` vocabulary.
    """

    def __init__(
        self, weight_VD: torch.Tensor, bias_V: torch.Tensor | None, compute: torch.dtype = torch.float32
    ) -> None:
        weight = weight_VD.detach()
        if weight.is_cuda and torch.is_autocast_enabled("cuda"):
            # As the model's own head would be multiplied; QLoRA's preparation has made it float32.
            weight = weight.to(torch.get_autocast_dtype("cuda"))
        self.native = weight.is_cuda and weight.dtype in (torch.bfloat16, torch.float16)
        self._weight_VD = weight if self.native else weight.to(compute)
        self._bias_V = None if bias_V is None else bias_V.detach().to(compute)
        self.compute = compute
        self.width = weight.shape[0]

    def logits(self, hidden_CD: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """``[C, V]`` logits of hidden states, in the memory of ``out`` where it is given and the device can."""
        hidden = hidden_CD.to(self._weight_VD.dtype)
        if self.native:
            logits = torch.mm(hidden, self._weight_VD.T, out_dtype=torch.float32)
        else:
            logits = torch.mm(hidden, self._weight_VD.T, out=out)
        return logits if self._bias_V is None else logits.add_(self._bias_V)

    def back(self, grad_CV: torch.Tensor) -> torch.Tensor:
        """``[C, D]`` gradient by the hidden states of a gradient by the logits."""
        if self.native:
            return torch.mm(grad_CV.to(self._weight_VD.dtype), self._weight_VD, out_dtype=torch.float32)
        if grad_CV.is_cuda:
            return grad_CV @ self._weight_VD
        # Summed in blocks of columns: over 150,000 of them some CPU kernels add up in one chain, and lose a digit.
        result = grad_CV.new_zeros(len(grad_CV), self._weight_VD.shape[1])
        for start in range(0, self.width, _COLUMNS):
            # Not addmm: it would go on adding to the same chain.
            result += grad_CV[:, start : start + _COLUMNS] @ self._weight_VD[start : start + _COLUMNS]
        return result
