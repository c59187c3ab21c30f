"""What a student consists of, and what that weighs in training, from its configuration alone.

The model is built on the ``meta`` device, where tensors have shapes and no values, and LoRA is attached to it as to the
real one. Weights of quantised linear layers are counted as what they stand for, not as the bytes they are packed into.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import transformers
from transformers.pytorch_utils import Conv1D

from kdcache.errors import ModelError
from kdcache.models import effective_dtype, first_line
from kdcache.recipe_student import StudentSection
from kdcache.student.assembly import with_adapter
from kdcache.student.initial import made_config, read_source

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# NF4 stores 4 bits per weight, 8 bits per block of 64 for its scale, and 32 bits per 256 of these scales.
_NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
# Optimizer -> states per parameter and their bits; 0: the parameter's own precision. 8-bit ones keep small tensors in 32.
_OPTIMIZERS = {
    "adamw_torch": (2, 0),
    "adamw_torch_fused": (2, 0),
    "adamw_8bit": (2, 8),
    "adamw_bnb_8bit": (2, 8),
    "paged_adamw_8bit": (2, 8),
    "paged_adamw_32bit": (2, 32),
    "lion_8bit": (1, 8),
    "paged_lion_8bit": (1, 8),
    "lion_32bit": (1, 32),
    "paged_lion_32bit": (1, 32),
    "rmsprop": (1, 0),
    "adagrad": (1, 0),
    "sgd": (0, 0),
}
_SMALLEST_8BIT, _BLOCK_8BIT = 4096, 256


@dataclass(frozen=True)
class Parameters:
    """Parameters by kind, and the bytes they and their training take.

    Attributes:
        quantised: frozen weights of linear layers that are stored in 4 or 8 bits.
        quantised_layers: number of those layers.
        frozen: every other weight that is not trained.
        trained: LoRA's, or all of them.
        base_bytes: the base model's weights, trained or not.
        adapter_bytes: LoRA's weights.
        gradient_bytes: of what is trained.
        state_bytes: of the optimizer; None where that optimizer's state is not known here.
    """

    quantised: int
    quantised_layers: int
    frozen: int
    trained: int
    base_bytes: int
    adapter_bytes: int
    gradient_bytes: int
    state_bytes: int | None

    @property
    def total(self) -> int:
        """All parameters."""
        return self.quantised + self.frozen + self.trained


def read_config(student: StudentSection) -> PreTrainedConfig:
    """The student's configuration, as it is or as it will be made.

    Raises:
        ModelError: it cannot be read, or the student not be made from it.
    """
    return made_config(read_source(student), student)


def outline(config: PreTrainedConfig, student: StudentSection) -> PreTrainedModel:
    """The base model without values.

    Raises:
        ModelError: transformers cannot build it.
    """
    dtype: torch.dtype = getattr(torch, effective_dtype(student.quantization, student.dtype))
    try:
        with torch.device("meta"):
            model: PreTrainedModel = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    except Exception as exc:
        raise ModelError(f"cannot build {student.model} from its configuration: {first_line(exc)}") from exc
    return model


def refuse_other_targets(student: StudentSection) -> None:
    """Whether LoRA finds the modules it is to be attached to, seen from the model's configuration.

    Raises:
        ModelError: a target fits no module, or the model cannot be built from its configuration.
    """
    if student.lora is not None and student.lora.targets != "all-linear":
        base = outline(read_config(student), student)
        with_adapter(base, student.model_copy(update={"quantization": "none"}))


def count_parameters(base: PreTrainedModel, student: StudentSection, optimizer: str) -> Parameters:
    """Count what `outline` made; LoRA is attached to it.

    Raises:
        ModelError: LoRA does not fit the model.
    """
    head = base.get_output_embeddings()
    linear = [m for m in base.modules() if type(m) in (torch.nn.Linear, Conv1D) and m is not head]
    packed = {id(m.weight) for m in linear} if student.quantization != "none" else set()
    own = {id(p) for p in base.parameters()}
    # A weight that shares its memory with another is one parameter, and was counted as such already.
    embeddings = {id(m.weight) for m in base.modules() if isinstance(m, torch.nn.Embedding)}
    model = with_adapter(base, student.model_copy(update={"quantization": "none"}))
    quantised = frozen = base_bytes = 0
    trained: list[torch.nn.Parameter] = []
    for parameter in model.parameters():
        size = parameter.numel()
        if id(parameter) in packed:
            quantised += size
            base_bytes += _packed_bytes(parameter, student.quantization)
            continue
        if parameter.requires_grad:
            trained.append(parameter)
        else:
            frozen += size
        if id(parameter) in own:
            # Preparing a quantised model for training takes the rest of it to float32.
            base_bytes += size * (4 if packed else parameter.element_size())
    sizes = {id(p): p.numel() * p.element_size() for p in trained}
    return Parameters(
        quantised=quantised,
        quantised_layers=len(packed),
        frozen=frozen,
        trained=sum(p.numel() for p in trained),
        base_bytes=base_bytes,
        adapter_bytes=sum(size for key, size in sizes.items() if key not in own),
        gradient_bytes=sum(sizes.values()),
        state_bytes=optimizer_bytes(optimizer, trained, embeddings),
    )


def untrained_bytes(model: StudentSection) -> int:
    """Bytes of a model's weights that is only looked at, such as a teacher: what is not quantised stays in its own precision.

    Args:
        model: how it is loaded; a section ``lora`` does not count.

    Raises:
        ModelError: as `read_config` and `outline`.
    """
    frozen = model.model_copy(update={"lora": StudentSection(model="-").lora})
    p = count_parameters(outline(read_config(frozen), frozen), frozen, "sgd")
    size = getattr(torch, effective_dtype(model.quantization, model.dtype)).itemsize
    # Counted as a student's: preparing that for training takes what is not quantised to float32.
    return p.base_bytes - (p.frozen * (4 - size) if p.quantised else 0)


def optimizer_bytes(name: str, parameters: Iterable[torch.nn.Parameter], embeddings: Iterable[int] = ()) -> int | None:
    """Bytes of an optimizer's state, None for one that is not known here.

    Args:
        name: as transformers' ``optim`` has it.
        parameters: that are trained.
        embeddings: ``id`` of those that are embeddings: transformers keeps 8-bit optimizers away from them.
    """
    apart = frozenset(embeddings)
    if name == "adafactor":  # row and column means of matrices, everything of vectors, in float32
        return sum(4 * (p.numel() if p.dim() < 2 else _factored(p.shape)) for p in parameters)
    if name not in _OPTIMIZERS:
        return None
    states, bits = _OPTIMIZERS[name]
    total = 0
    for p in parameters:
        if bits == 8 and p.numel() >= _SMALLEST_8BIT and id(p) not in apart:
            total += states * (p.numel() + 4 * math.ceil(p.numel() / _BLOCK_8BIT))
        else:
            total += states * p.numel() * (4 if bits else p.element_size())
    return total


def _factored(shape: torch.Size) -> int:
    rest = math.prod(shape[:-2])
    return int(rest * (shape[-2] + shape[-1]))


def _packed_bytes(weight: torch.nn.Parameter, quantization: str) -> int:
    if quantization == "nf4":
        return math.ceil(weight.numel() * _NF4_BYTES)
    return weight.numel() + 4 * weight.shape[0]
