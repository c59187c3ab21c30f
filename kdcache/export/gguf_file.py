"""A merged model folder -> one GGUF file, tensor by tensor; and the file read back and held against the folder.

Norms, biases and rope factors are float32. Matrices are of the file's type, embeddings and head Q8_0 in a Q4_0 file
(where llama.cpp takes a 6-bit type that pip's ``gguf`` does not write), and half precision where rows are no multiple of 32.
Llama's query and key rows are laid in llama.cpp's order: both halves of a head interleaved.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kdcache.errors import ModelError, StorageError
from kdcache.export.gguf_metadata import (
    ARCHITECTURES,
    TokenizerTable,
    add_architecture,
    add_tokenizer,
    require_gguf,
    rope_factors,
    stated_architecture,
)
from kdcache.progress import Progress, Silent

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Array = NDArray[Any]
_BLOCK = 32
_HALF_LIMIT = 65504.0
_FILE_TYPES = {"F16": "MOSTLY_F16", "Q8_0": "MOSTLY_Q8_0", "Q4_0": "MOSTLY_Q4_0"}
_EMBEDDINGS = ("token_embd.weight", "output.weight")
_ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True)
class ReadBack:
    """A GGUF file against the weights it was made from: tensors, and the root mean square error over that of the weights."""

    tensors: int
    relative_error: float


def write_gguf(
    path: Path, folder: Path, kind: str, table: TokenizerTable, *, name: str, progress: Progress | None = None
) -> None:
    """Write the model in ``folder`` to the GGUF file ``path``.

    Args:
        path: replaced where it is there.
        folder: a merged model folder with safetensors.
        kind: ``F16``, ``Q8_0`` or ``Q4_0``.
        table: its tokenizer.
        name: of the model, for people.
        progress: told of tensors.

    Raises:
        ModelError: a tensor that the architecture has no name for in GGUF, or a weight beyond half precision.
        StorageError: it cannot be written.
    """
    gguf, config, progress = require_gguf(), _config(folder), progress or Silent()
    tensors = dict(_names(config, folder))
    writer = gguf.GGUFWriter(path, ARCHITECTURES[config.model_type])
    progress.begin(f"write {path.name}", len(tensors), "tensors")
    try:
        writer.add_name(name)
        writer.add_file_type(getattr(gguf.LlamaFileType, _FILE_TYPES[kind]))
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        add_architecture(writer, config)
        add_tokenizer(writer, table)
        for target, (_, shape) in tensors.items():
            stored = _type_of(gguf, target, shape, kind)
            size = gguf.quant_shape_to_byte_shape(shape, stored) if _packed(gguf, stored) else shape
            dtype = np.dtype(np.uint8 if _packed(gguf, stored) else np.float16 if stored.name == "F16" else np.float32)
            writer.add_tensor_info(target, size, dtype, int(np.prod(size)) * dtype.itemsize, stored)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for target, values in _values(config, folder, tensors):
            writer.write_tensor_data(_stored(gguf, values, _type_of(gguf, target, values.shape, kind), target))
            progress.advance(1)
        writer.close()
    except OSError as exc:
        raise StorageError(f"cannot write {path}: {exc.strerror or exc}") from exc
    finally:
        with suppress(OSError):
            writer.close()
        progress.end()


def read_back(path: Path, folder: Path) -> ReadBack:
    """Read a GGUF file with ``gguf``'s reader, unpack every tensor and hold it and the keys against the folder it was made from.

    Raises:
        StorageError: a key is missing or says something else, or a tensor is missing, of another shape, or off by more than its
            type rounds.
    """
    gguf, config = require_gguf(), _config(folder)
    reader = gguf.GGUFReader(path)
    _check_keys(path, config, {name: field.contents() for name, field in reader.fields.items()})
    found = {tensor.name: tensor for tensor in reader.tensors}
    wanted = dict(_names(config, folder))
    if found.keys() != wanted.keys():
        differing = ", ".join(sorted(found.keys() ^ wanted.keys())[:4])
        raise StorageError(f"{path} reads back with other tensors than were written ({differing}); export it again")
    squares = [0.0, 0.0]
    for target, values in _values(config, folder, wanted):
        stored = found[target]
        got = gguf.quants.dequantize(stored.data, stored.tensor_type).reshape(values.shape)
        error = np.abs(got.astype(np.float64) - values)
        if (error > _rounding(values, stored.tensor_type.name)).any() or not np.isfinite(got).all():
            raise StorageError(
                f"{target} in {path} reads back other than it was written; look after the disk, and export again"
            )
        squares[0] += float((error**2).sum())
        squares[1] += float((values.astype(np.float64) ** 2).sum())
    return ReadBack(len(found), (squares[0] / max(squares[1], 1e-300)) ** 0.5)


def _check_keys(path: Path, config: PreTrainedConfig, found: dict[str, Any]) -> None:
    """Hold what a file says of its model against the configuration; numbers with a fraction are float32 there."""
    wanted = stated_architecture(config)
    prefix = f"{wanted['general.architecture']}."
    present = {key: value for key, value in found.items() if key in wanted or key.startswith(prefix)}
    rounded = {key: float(np.float32(v)) if isinstance(v, float) else v for key, v in wanted.items()}
    wrong = sorted(k for k in present.keys() | rounded.keys() if present.get(k) != rounded.get(k))
    if len(found.get("tokenizer.ggml.tokens", ())) != config.vocab_size:
        wrong.append("tokenizer.ggml.tokens")
    if wrong:
        said = ", ".join(f"{key} is {present.get(key)!r}, not {rounded.get(key)!r}" for key in wrong[:4])
        raise StorageError(f"{path} does not say what its model is ({said}); export it again, or --to merged")


def interleaved(values: Array, heads: int) -> Array:
    """Rows ``[heads * 2 * half, ...]`` with the two halves of each head's rows taken in turn: llama.cpp's rotary order."""
    shape = values.shape
    return values.reshape(heads, 2, shape[0] // heads // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)


def _config(folder: Path) -> PreTrainedConfig:
    import transformers

    config: PreTrainedConfig = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    return config


def _names(config: PreTrainedConfig, folder: Path) -> Iterator[tuple[str, tuple[str, tuple[int, ...]]]]:
    """GGUF names of a folder's tensors, with their own names and shapes; the rope factors have no name of their own."""
    import safetensors

    gguf = require_gguf()
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[ARCHITECTURES[config.model_type]], config.num_hidden_layers)
    factors = rope_factors(config)
    if factors is not None:
        yield _ROPE_FACTORS, ("", factors.shape)
    for file in _files(folder):
        with safetensors.safe_open(file, framework="np") as tensors:
            for own in tensors.keys():  # noqa: SIM118 - no mapping
                target = names.get_name(own, try_suffixes=(".weight", ".bias"))
                if target is None:
                    raise ModelError(
                        f"GGUF has no name for the tensor {own} of a {config.model_type} model; export it --to merged"
                    )
                yield target, (own, tuple(tensors.get_slice(own).get_shape()))


def _values(
    config: PreTrainedConfig, folder: Path, tensors: dict[str, tuple[str, tuple[int, ...]]]
) -> Iterator[tuple[str, Array]]:
    """The tensors as float32 in GGUF's order of rows, one in memory at a time, in the order of ``tensors``."""
    import safetensors

    targets = {own: target for target, (own, _) in tensors.items()}
    factors = rope_factors(config)
    if factors is not None:
        yield _ROPE_FACTORS, factors
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads or config.num_attention_heads}
    for file in _files(folder):
        with safetensors.safe_open(file, framework="pt") as opened:
            for own in opened.keys():  # noqa: SIM118 - no mapping
                values, target = opened.get_tensor(own).float().numpy(), targets[own]
                part = target.split(".")[-2]
                if config.model_type == "llama" and part in heads:
                    values = interleaved(values, heads[part])
                yield target, values


def _files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return [folder / "model.safetensors"]
    return [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]


def _type_of(gguf: Any, name: str, shape: tuple[int, ...], kind: str) -> Any:
    types = gguf.GGMLQuantizationType
    if len(shape) < 2:
        return types.F32
    if kind == "F16" or shape[-1] % _BLOCK:
        return types.F16
    return types.Q8_0 if name in _EMBEDDINGS else types[kind]


def _packed(gguf: Any, stored: Any) -> bool:
    return stored in (gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_0)


def _stored(gguf: Any, values: Array, stored: Any, name: str) -> Array:
    if stored.name != "F32" and not float(np.abs(values).max()) <= _HALF_LIMIT:
        raise ModelError(f"{name} holds a weight beyond half precision ({_HALF_LIMIT:g}), which GGUF cannot store")
    packed: Array = gguf.quants.quantize(np.ascontiguousarray(values), stored)
    return packed


def _rounding(values: Array, stored: str) -> Array:
    """What each number may be off by: a step of its block (Q4_0, whose range has one step more on one side), or half of one
    (Q8_0), with the half-precision rounding of the step."""
    if stored == "F32":
        return np.zeros_like(values)
    if stored == "F16":
        return np.abs(values) * 2.0**-11 + 2.0**-25
    largest = np.abs(values.reshape(-1, _BLOCK)).max(axis=1, keepdims=True)
    # The step is a half-precision number, below 2^-14 a coarse one; it is multiplied by 127 or 8 at most.
    step = largest * 0.6 / 127 + 127 * 2.0**-25 if stored == "Q8_0" else largest * 1.05 / 8 + 8 * 2.0**-25
    return np.broadcast_to(step, (step.size, _BLOCK)).reshape(values.shape)
