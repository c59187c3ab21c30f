"""Load base models and tokenizers, quantise them, attach LoRA, and say who they are.

Hugging Face ids and local folders alike. Code that ships with a model is never run.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdcache.cache.strict_json import canonical_sha256
from kdcache.errors import DeviceError, ModelError, TokenizerError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_WEIGHTS = ("*.safetensors", "*.bin", "*.index.json")


@dataclass(frozen=True)
class ModelIdentity:
    """Name without a machine's paths, commit where there is one, and a hash of configuration and weights."""

    name: str
    revision: str | None
    fingerprint: str
    architecture: str


@dataclass(frozen=True)
class TokenMap:
    """A tokenizer's map: token strings by id (None where an id has no token), and their hash."""

    tokens: list[str | None]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.tokens)


def quiet_libraries() -> None:
    """Leave only errors of the libraries on the terminal; ours say what a user needs to know."""
    for name in ("bitsandbytes", "huggingface_hub", "accelerate", "peft"):
        logging.getLogger(name).setLevel(logging.ERROR)
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def resolve_device(device: str) -> str:
    """``auto`` becomes cuda where there is one, else cpu.

    Raises:
        DeviceError: CUDA is asked for and absent.
    """
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise DeviceError("device cuda is asked for, but torch sees no CUDA device; use device auto or cpu")
    return device


def load_tokenizer(model: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model.

    Raises:
        ModelError: there is no such folder.
        TokenizerError: the folder has no tokenizer, or it has no end-of-sequence token.
    """
    import transformers

    quiet_libraries()
    _refuse_missing_folder(model)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(model, revision=revision)
    except Exception as exc:
        # Anything from OSError to KeyError, depending on which file is missing or broken.
        raise TokenizerError(f"{model} has no usable tokenizer: {_first_line(exc)}") from exc
    if len(tokenizer.get_vocab()) < 2:
        raise TokenizerError(f"{model} has no usable tokenizer: its vocabulary is empty")
    if tokenizer.eos_token_id is None:
        raise TokenizerError(
            f"the tokenizer of {model} has no end-of-sequence token, which every response should end with; "
            "set eos_token in its tokenizer_config.json"
        )
    return tokenizer


def token_map(tokenizer: PreTrainedTokenizerBase) -> TokenMap:
    """Token strings by id, from id 0 to the largest id that has a token."""
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    tokens: list[str | None] = [None] * (max(vocabulary.values()) + 1)
    # Two spellings of one id: the smaller is kept, so that the map does not depend on dictionary order.
    for token in sorted(vocabulary, reverse=True):
        tokens[vocabulary[token]] = token
    return TokenMap(tokens, canonical_sha256(tokens))


def refuse_other_tokens(mine: TokenMap, theirs: list[str | None], model: str) -> None:
    """Refuse a tokenizer whose map differs from a cache's.

    Raises:
        TokenizerError: naming the first ids that differ with both spellings.
    """
    longest = max(len(mine.tokens), len(theirs))
    a = mine.tokens + [None] * (longest - len(mine.tokens))
    b = theirs + [None] * (longest - len(theirs))
    differing = [i for i in range(longest) if a[i] != b[i]]
    if differing:
        shown = "; ".join(f"id {i} is {a[i]!r}, in the cache {b[i]!r}" for i in differing[:4])
        raise TokenizerError(
            f"the tokenizer of {model} differs from the cache's in {len(differing)} of {longest} entries: {shown}. "
            "A student needs its teacher's token map"
        )


def identify(model: str, revision: str | None = None) -> ModelIdentity:
    """Who a model is, without loading it.

    Raises:
        ModelError: no such folder, no configuration or no weights.
    """
    import transformers

    quiet_libraries()
    _refuse_missing_folder(model)
    try:
        config = transformers.AutoConfig.from_pretrained(model, revision=revision)
    except Exception as exc:
        raise ModelError(f"cannot read the configuration of {model}: {_first_line(exc)}") from exc
    architecture = (config.architectures or ["unknown"])[0]
    folder = Path(model)
    if not folder.is_dir():
        commit = getattr(config, "_commit_hash", None) or revision
        identity = hashlib.sha256(f"{model}@{commit}".encode()).hexdigest()
        return ModelIdentity(model, commit, identity, architecture)
    weights = sorted(p for pattern in _WEIGHTS for p in folder.glob(pattern))
    if not weights:
        raise ModelError(f"{model} has no weights (expected model.safetensors)")
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in weights:
        with path.open("rb") as f:
            digest.update(hashlib.file_digest(f, "sha256").digest())
    return ModelIdentity(folder.resolve().name, None, digest.hexdigest(), architecture)


def load_model(
    model: str,
    *,
    revision: str | None = None,
    quantization: str = "none",
    dtype: str = "bfloat16",
    device: str = "auto",
) -> PreTrainedModel:
    """A causal language model in evaluation mode on its device.

    Args:
        model: Hugging Face id or local folder.
        revision: commit, tag or branch on the Hub.
        quantization: ``nf4`` (4-bit NormalFloat with double quantisation, QLoRA, Dettmers et al. 2023,
            https://arxiv.org/abs/2305.14314), ``int8`` (LLM.int8()) or ``none``.
        dtype: ``bfloat16``, ``float16`` or ``float32``: arithmetic and unquantised weights.
        device: ``auto``, ``cuda`` or ``cpu``.

    Raises:
        ModelError: it cannot be loaded.
        DeviceError: the device is absent.
    """
    import torch
    import transformers

    quiet_libraries()
    place = resolve_device(device)
    _refuse_missing_folder(model)
    compute: torch.dtype = getattr(torch, dtype)
    options: dict[str, Any] = {"dtype": compute, "device_map": {"": place}}
    if quantization == "nf4":
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute,
        )
    elif quantization == "int8":
        options["quantization_config"] = transformers.BitsAndBytesConfig(load_in_8bit=True)
        # LLM.int8() computes in half precision whatever is asked; another dtype warns at every call.
        options["dtype"] = torch.float16
    try:
        loaded = transformers.AutoModelForCausalLM.from_pretrained(model, revision=revision, **options)
    except Exception as exc:
        raise ModelError(f"cannot load {model} ({quantization}, {dtype}, {place}): {_first_line(exc)}") from exc
    _keep_weights_in_place(loaded)
    loaded.config.use_cache = False
    loaded.eval()
    return loaded


def attach_lora(
    model: PreTrainedModel, *, r: int, alpha: float, dropout: float, targets: str | list[str], quantized: bool
) -> PreTrainedModel:
    """Freeze the base and add LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685) through peft.

    A quantised base is prepared as QLoRA does: what is not quantised (norms, embeddings, head) goes to
    float32.

    Raises:
        ModelError: no module bears one of the target names.
    """
    import peft

    if quantized:
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    config = peft.LoraConfig(
        r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets, bias="none", task_type="CAUSAL_LM"
    )
    try:
        adapted: PreTrainedModel = peft.get_peft_model(model, config)
        return adapted
    except ValueError as exc:
        raise ModelError(f"student.lora does not fit the model: {_first_line(exc)}") from exc


def head_of(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight ``[V, D]`` and bias ``[V]`` or None of the output head.

    Raises:
        ModelError: the head is not a plain linear layer, or the model changes logits behind it.
    """
    import torch

    head = model.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear):
        raise ModelError(f"the output head is a {type(head).__name__}; a plain linear layer is needed")
    for key in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        value = getattr(model.config, key, None)
        if value not in (None, 1, 1.0):
            raise ModelError(
                f"{model.config.model_type} changes its logits behind the head ({key} = {value}), which the loss "
                "on hidden states would miss; such models are not supported"
            )
    return head.weight, head.bias


def effective_vocabulary(model: PreTrainedModel, tokens: int, name: str) -> int:
    """Vocabulary columns that stand for tokens; a head padded beyond them is fine, a narrower one is not.

    Raises:
        ModelError: the head has fewer columns than there are tokens.
    """
    width = int(model.get_output_embeddings().weight.shape[0])
    if width < tokens:
        raise ModelError(f"the head of {name} has {width} columns, fewer than the {tokens} tokens of the vocabulary")
    return tokens


def _keep_weights_in_place(model: PreTrainedModel) -> None:
    # On CPUs with AVX512-BF16 bitsandbytes repacks 4-bit weights in the first evaluation forward;
    # training forwards after that use a kernel without autograd and give wrong gradients.
    import bitsandbytes

    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def _refuse_missing_folder(model: str) -> None:
    looks_local = model.startswith((".", "/", "~")) or model.count("/") > 1
    if looks_local and not Path(model).is_dir():
        raise ModelError(f"the model folder {model} does not exist")


def _first_line(exc: BaseException) -> str:
    text = " ".join(str(exc).split())
    return f"{type(exc).__name__}: {text[:240]}"
