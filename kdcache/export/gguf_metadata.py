"""What a GGUF file says of a model beside its weights: architecture, rope, tokenizer.

Key names and their meaning are those of the GGUF specification, written through pip's ``gguf``. llama.cpp cuts text into
words by a rule that it knows by name (``tokenizer.ggml.pre``); the name is found by the tokenizer's own regular expression.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kdcache.errors import ModelError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

# transformers' model types and the names of the same architectures in GGUF.
ARCHITECTURES = {"qwen2": "qwen2", "llama": "llama"}
# Rope parameters beside type and base that each type has, and that are written; and values of others that readers take anyway.
_ROPE_KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings"),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
}
_ROPE_IMPLIED: dict[str, tuple[Any, ...]] = {
    "partial_rotary_factor": (1,), "beta_fast": (32,), "beta_slow": (1,),
}  # fmt: skip
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REMAINDER = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_PRE_TOKENIZERS = {
    _CONTRACTIONS + r"\p{N}" + _REMAINDER: "qwen2",
    _CONTRACTIONS + r"\p{N}{1,3}" + _REMAINDER: "llama-bpe",
}
# What byte-level BPE does without an expression of its own.
_GPT2 = "gpt-2"
UNKNOWN_PRE = "default"
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5


@dataclass(frozen=True)
class TokenizerTable:
    """A byte-level BPE tokenizer as GGUF writes it: ``types`` are GGUF's token types, ``merges`` pairs joined by a space."""

    tokens: list[str]
    types: list[int]
    merges: list[str]
    pre: str
    special: dict[str, int]
    add_bos: bool
    chat_template: str | None


def require_gguf() -> Any:
    """The package ``gguf``.

    Raises:
        ModelError: it is not installed.
    """
    try:
        import gguf
    except ImportError as exc:
        raise ModelError("GGUF files need a package that is not installed; pip install 'kdcache[gguf]'") from exc
    return gguf


def refuse_unmapped(config: PreTrainedConfig, name: str) -> None:
    """Whether GGUF, as it is written here, can say all that a model is; nothing is loaded.

    Raises:
        ModelError: another architecture, or a part of it that the file could not state.
    """
    if config.model_type not in ARCHITECTURES:
        raise ModelError(
            f"{name} is of type {config.model_type}; GGUF is written for {' and '.join(ARCHITECTURES)} models. Export it --to "
            "merged, and convert that with llama.cpp's own script"
        )
    rope = _rope(config)
    kind = rope.get("rope_type", "default")
    if kind not in _ROPE_KEYS:
        raise ModelError(
            f"{name} has rope parameters of type {kind}, which are not written to GGUF; export it --to merged"
        )
    rope.setdefault("partial_rotary_factor", getattr(config, "partial_rotary_factor", None))
    written = {"rope_type", "rope_theta", *_ROPE_KEYS[kind]}
    implied = {"type": (kind,), **_ROPE_IMPLIED}
    foreign = [k for k, v in rope.items() if k not in written and v is not None and v not in implied.get(k, ())]
    if foreign:
        said = ", ".join(f"{key} = {rope[key]!r}" for key in sorted(foreign))
        raise ModelError(
            f"{name} has rope parameters that are not written to GGUF ({said}, of type {kind}); export it --to merged"
        )
    activation = getattr(config, "hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ModelError(
            f"{name} has the activation {activation}; GGUF readers take silu for {config.model_type} models; export it --to merged"
        )
    sliding = getattr(config, "use_sliding_window", False) or set(getattr(config, "layer_types", None) or ()) - {
        "full_attention"
    }
    if sliding or getattr(config, "mlp_bias", False):
        raise ModelError(
            f"{name} uses a sliding window or biases in its MLP, which GGUF readers of this architecture ignore; export it --to merged"
        )


def tokenizer_table(tokenizer: PreTrainedTokenizerBase, rows: int) -> TokenizerTable:
    """The table of a tokenizer, filled up to the ``rows`` of the embedding with unused tokens.

    Raises:
        ModelError: not byte-level BPE, or more tokens than rows.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = {} if backend is None else json.loads(backend.to_str())
    model = state.get("model") or {}
    if model.get("type") != "BPE" or model.get("byte_fallback") or "ByteLevel" not in json.dumps(state.get("decoder")):
        raise ModelError(
            f"the tokenizer is {model.get('type', type(tokenizer).__name__)} and not byte-level BPE, the kind that is written to GGUF; "
            "export --to merged, and convert that with llama.cpp's own script"
        )
    tokens, types = [f"[PAD{i}]" for i in range(rows)], [_UNUSED] * rows
    for token, number in tokenizer.get_vocab().items():
        if number >= rows:
            raise ModelError(f"the tokenizer has a token {token!r} with id {number}, the model only {rows} embeddings")
        tokens[number], types[number] = token, _NORMAL
    for added in state.get("added_tokens", []):
        if added["id"] < rows:
            types[added["id"]] = _CONTROL if added["special"] else _USER_DEFINED
    special = {}
    for kind in ("bos", "eos", "unk", "pad"):
        number = getattr(tokenizer, f"{kind}_token_id")
        if number is not None:
            special[kind] = int(number)
    template = tokenizer.chat_template
    return TokenizerTable(
        tokens=tokens,
        types=types,
        merges=[_merge(m) for m in model["merges"]],
        pre=_pre_tokenizer(state.get("pre_tokenizer")),
        special=special,
        add_bos=tokenizer("a")["input_ids"][:1] == [special.get("bos")],
        chat_template=template if isinstance(template, str) else None,
    )


def add_tokenizer(writer: Any, table: TokenizerTable) -> None:
    """Write a tokenizer's table into a GGUF file's keys."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(table.pre)
    writer.add_token_list(table.tokens)
    writer.add_token_types(table.types)
    writer.add_token_merges(table.merges)
    for kind, number in table.special.items():
        getattr(writer, f"add_{kind}_token_id")(number)
    writer.add_add_bos_token(table.add_bos)
    if table.chat_template is not None:
        writer.add_chat_template(table.chat_template)


def add_architecture(writer: Any, config: PreTrainedConfig) -> None:
    """Write the shape of a model into a GGUF file's keys."""
    heads, rope = config.num_attention_heads, _rope(config)
    width = head_width(config)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads or heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if width * heads != config.hidden_size:
        writer.add_key_length(width)
        writer.add_value_length(width)
    if rope.get("rope_type") in ("linear", "yarn"):
        gguf = require_gguf()
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if rope.get("rope_type") == "yarn":
        original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        writer.add_rope_scaling_orig_ctx_len(int(original))


def stated_architecture(config: PreTrainedConfig) -> dict[str, Any]:
    """Keys of the file that say what a model is, with their values, as the GGUF specification names them."""
    heads, rope, name = config.num_attention_heads, _rope(config), ARCHITECTURES[config.model_type]
    width, kind = head_width(config), rope.get("rope_type", "default")
    keys: dict[str, Any] = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": heads,
        "attention.head_count_kv": config.num_key_value_heads or heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "vocab_size": config.vocab_size,
        "rope.dimension_count": width,
        "rope.freq_base": float(rope["rope_theta"]),
    }
    if width * heads != config.hidden_size:
        keys |= {"attention.key_length": width, "attention.value_length": width}
    if kind in ("linear", "yarn"):
        keys |= {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
    if kind == "yarn":
        original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        keys["rope.scaling.original_context_length"] = int(original)
    return {"general.architecture": name, **{f"{name}.{key}": value for key, value in keys.items()}}


def rope_factors(config: PreTrainedConfig) -> NDArray[np.float32] | None:
    """float32 ``[head width / 2]``: what each rotary frequency is divided by, where a model has factors of its own (Llama 3).

    Taken from transformers' own frequencies, so that both are the same model.
    """
    import numpy as np
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = _rope(config)
    if rope.get("rope_type") != "llama3":
        return None
    width = head_width(config)
    plain = 1.0 / float(rope["rope_theta"]) ** (np.arange(0, width, 2, dtype=np.float64) / width)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    factors: NDArray[np.float32] = (plain / scaled.double().numpy()).astype(np.float32)
    return factors


def head_width(config: PreTrainedConfig) -> int:
    """Numbers in one attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _rope(config: PreTrainedConfig) -> dict[str, Any]:
    found = getattr(config, "rope_parameters", None) or {}
    return {"rope_theta": getattr(config, "rope_theta", 10000.0), **found}


def _merge(pair: str | list[str]) -> str:
    """A merge as one string; a space inside a part is written as byte-level BPE writes it."""
    if isinstance(pair, str):
        return pair
    return " ".join(part.replace(" ", "\u0120") for part in pair)


def _pre_tokenizer(state: dict[str, Any] | None) -> str:
    """llama.cpp's name of the rule that cuts text into words, or `UNKNOWN_PRE`."""
    steps = [] if state is None else state.get("pretokenizers", [state])
    expressions = [s["pattern"].get("Regex", "") for s in steps if s.get("type") == "Split"]
    if not expressions and [s.get("type") for s in steps] == ["ByteLevel"] and steps[0].get("use_regex", True):
        return _GPT2
    return _PRE_TOKENIZERS.get(expressions[0], UNKNOWN_PRE) if len(expressions) == 1 else UNKNOWN_PRE
