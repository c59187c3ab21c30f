"""Load base models, quantise them, attach LoRA.

Hugging Face ids and local folders alike. Code that ships with a model is never run.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdcache.devices import give_back_memory, own_gpu, refuse_absent_attention, resolve_device
from kdcache.errors import ModelError
from kdcache.hub_access import refuse_unreachable

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def quiet_libraries() -> None:
    """Leave only errors of the libraries on the terminal; ours say what a user needs to know."""
    for name in ("bitsandbytes", "huggingface_hub", "accelerate", "peft"):
        logging.getLogger(name).setLevel(logging.ERROR)
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def load_model(
    model: str,
    *,
    revision: str | None = None,
    quantization: str = "none",
    dtype: str = "bfloat16",
    device: str = "auto",
    attention: str = "auto",
) -> PreTrainedModel:
    """A causal language model in evaluation mode on its device.

    Args:
        model: Hugging Face id or local folder.
        revision: commit, tag or branch on the Hub.
        quantization: ``nf4`` (4-bit NormalFloat with double quantisation, QLoRA, Dettmers et al. 2023,
            https://arxiv.org/abs/2305.14314), ``int8`` (LLM.int8()) or ``none``.
        dtype: ``bfloat16``, ``float16`` or ``float32``: arithmetic and unquantised weights.
        device: ``auto``, ``cuda`` or ``cpu``. Where a launcher started several processes, CUDA is each one's own GPU.
        attention: transformers' ``attn_implementation``; ``auto`` leaves it to transformers.

    Raises:
        ModelError: it cannot be loaded, or not with that attention.
        DeviceError: the device is absent.
    """
    import torch
    import transformers

    quiet_libraries()
    place = own_gpu(resolve_device(device))
    refuse_missing_folder(model)
    compute: torch.dtype = getattr(torch, effective_dtype(quantization, dtype))
    options: dict[str, Any] = {"dtype": compute, "device_map": {"": place}}
    if attention != "auto":
        refuse_absent_attention(attention, place, compute)
        options["attn_implementation"] = attention
    if quantization == "nf4":
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute,
            # FSDP cuts floating-point weights alone, and leaves packed bytes whole on every GPU.
            bnb_4bit_quant_storage=compute if os.environ.get("ACCELERATE_USE_FSDP") == "true" else torch.uint8,
        )
    elif quantization == "int8":
        options["quantization_config"] = transformers.BitsAndBytesConfig(load_in_8bit=True)
    try:
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            model, revision=revision, trust_remote_code=False, **options
        )
    except Exception as exc:
        refuse_unreachable(model, revision, exc)
        raise ModelError(
            f"cannot load {model} ({quantization}, {dtype}, {place}, attention {attention}): {first_line(exc)}"
        ) from exc
    _keep_weights_in_place(loaded)
    loaded.config.use_cache = False
    loaded.eval()
    _refuse_changed_logits(loaded, model)
    give_back_memory()
    return loaded


def attach_lora(
    model: PreTrainedModel,
    *,
    r: int,
    alpha: float,
    dropout: float,
    targets: str | list[str],
    quantized: bool,
    dora: bool = False,
    rslora: bool = False,
) -> PreTrainedModel:
    """Freeze the base and add LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685) through peft.

    A quantised base is prepared as QLoRA does: what is not quantised (norms, embeddings, head) goes to
    float32.

    Args:
        model: the base.
        r: rank.
        alpha: the update is multiplied by ``alpha / r``.
        dropout: of the adapter's input.
        targets: names of the modules that get an adapter, or ``all-linear``.
        quantized: whether the base is.
        dora: learn each weight's magnitude apart from its direction (Liu et al. 2024, https://arxiv.org/abs/2402.09353).
        rslora: multiply by ``alpha / sqrt(r)`` instead (Kalajdzievski 2023, https://arxiv.org/abs/2312.03732).

    Raises:
        ModelError: no module bears one of the target names, or DoRA on an int8 base on the CPU.
    """
    import bitsandbytes
    import peft

    if (
        dora
        and model.device.type == "cpu"
        and any(isinstance(m, bitsandbytes.nn.Linear8bitLt) for m in model.modules())
    ):
        # peft copies the weights to look at them, and the scales of LLM.int8() do not survive that on a CPU.
        raise ModelError("student.lora.dora needs CUDA where student.quantization is int8; use nf4 or none")
    if quantized:
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    config = peft.LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=targets,
        bias="none",
        task_type="CAUSAL_LM",
        use_dora=dora,
        use_rslora=rslora,
    )
    try:
        adapted: PreTrainedModel = peft.get_peft_model(model, config)
        return adapted
    except ValueError as exc:
        raise ModelError(f"student.lora does not fit the model: {first_line(exc)}") from exc


def load_adapter(model: PreTrainedModel, folder: str, *, quantized: bool) -> PreTrainedModel:
    """A base model with a saved adapter, in the arithmetic it was trained in.

    Raises:
        ModelError: there is no such adapter.
    """
    import peft

    if quantized:
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    try:
        adapted: PreTrainedModel = peft.PeftModel.from_pretrained(model, folder)
    except (OSError, ValueError) as exc:
        raise ModelError(f"cannot load the adapter {folder}: {first_line(exc)}") from exc
    return adapted


def effective_dtype(quantization: str, dtype: str) -> str:
    """The arithmetic that is really used: LLM.int8() computes in half precision whatever is asked."""
    return "float16" if quantization == "int8" else dtype


def head_of(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight ``[V, D]`` and bias ``[V]`` or None of the output head.

    Raises:
        ModelError: the head is not a plain linear layer.
    """
    import torch

    head = model.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear):
        raise ModelError(f"the output head is a {type(head).__name__}; a plain linear layer is needed")
    return head.weight, head.bias


def refuse_narrow_head(model: PreTrainedModel, tokens: int, name: str) -> None:
    """A head padded beyond the tokens is fine, a narrower one is not.

    Raises:
        ModelError: the head has fewer columns than there are tokens.
    """
    width = int(model.get_output_embeddings().weight.shape[0])
    if width < tokens:
        raise ModelError(f"the head of {name} has {width} columns, fewer than the {tokens} tokens of the vocabulary")


def _refuse_changed_logits(model: PreTrainedModel, name: str) -> None:
    """Some families scale or cap their logits behind the head; the head on hidden states is then another model."""
    import torch

    from kdcache.head import Head

    text = model.config.get_text_config()
    ids = torch.arange(1, 9, device=model.device)[None] % int(text.vocab_size)
    with torch.inference_mode():
        hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0]
        ours = Head(*head_of(model)).logits(hidden)
        theirs = model(input_ids=ids, use_cache=False).logits[0].float()
    # A cap of 30 bends logits of ordinary size by less than half precision rounds them: ask the configuration too.
    declared = [
        k
        for k in ("final_logit_softcapping", "logit_scale", "logits_scaling")
        if getattr(text, k, None) not in (None, 1)
    ]
    if declared or not torch.allclose(ours, theirs, rtol=0.03, atol=0.03 * float(theirs.abs().max())):
        raise ModelError(
            f"{name} ({model.config.model_type}) changes its logits behind the head"
            f"{' by ' + ', '.join(declared) if declared else ''}; such models are not supported"
        )


def _keep_weights_in_place(model: PreTrainedModel) -> None:
    # On CPUs with AVX512-BF16 bitsandbytes repacks 4-bit weights in the first evaluation forward;
    # training forwards after that use a kernel without autograd and give wrong gradients.
    import bitsandbytes

    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def refuse_missing_folder(model: str) -> None:
    """A name that can only be a folder should be one.

    Raises:
        ModelError: it does not exist.
    """
    looks_local = model.startswith((".", "/", "~")) or model.count("/") > 1
    if looks_local and not Path(model).is_dir():
        raise ModelError(f"the model folder {model} does not exist")


def first_line(exc: BaseException) -> str:
    """A foreign error in one short line."""
    text = " ".join(str(exc).split())
    return f"{type(exc).__name__}: {text[:240]}"
