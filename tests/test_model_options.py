"""How a student is loaded and adapted: attention, the process's own GPU, DoRA and rsLoRA."""

import importlib.util

import pytest
import torch
import transformers

from kdcache.errors import ModelError
from kdcache.models import attach_lora, load_adapter, load_model

OPTIONS = {"r": 4, "alpha": 8, "dropout": 0.0, "targets": "all-linear"}
IDS = torch.arange(3, 40)[None]


def logits(model):
    with torch.inference_mode():
        return model.eval()(input_ids=IDS, use_cache=False).logits


def load(models, quantization):
    return load_model(str(models / "student"), quantization=quantization, dtype="float32", device="cpu")


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_adapters_start_as_the_base_and_learn(models, tmp_path, quantization, dora, rslora):
    quantized = quantization == "nf4"
    base = logits(load(models, quantization))
    torch.manual_seed(0)
    model = attach_lora(load(models, quantization), **OPTIONS, quantized=quantized, dora=dora, rslora=rslora)
    assert torch.allclose(logits(model), base, atol=1e-4)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(3):
        loss = model.train()(input_ids=IDS, labels=IDS, use_cache=False).loss
        loss.backward()
        learnt = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(g.isfinite().all() and g.any() for g in learnt.values())
    assert any("magnitude" in name for name in learnt) == dora
    scaling = {m.scaling["default"] for m in model.modules() if hasattr(m, "scaling") and isinstance(m.scaling, dict)}
    assert scaling == {4.0 if rslora else 2.0}

    model.save_pretrained(str(tmp_path))
    again = load_adapter(load(models, quantization), str(tmp_path), quantized=quantized)
    assert torch.allclose(logits(again), logits(model), atol=1e-5)


def test_dora_on_int8_is_refused_where_peft_cannot_do_it(models):
    model = load_model(str(models / "student"), quantization="int8", device="cpu")
    with pytest.raises(
        ModelError, match=r"student\.lora\.dora needs CUDA where student\.quantization is int8; use nf4"
    ):
        attach_lora(model, **OPTIONS, quantized=True, dora=True)


def test_attention_is_the_one_asked_for_and_gives_the_same(models):
    found = {}
    for attention in ("auto", "eager", "sdpa"):
        model = load_model(str(models / "student"), dtype="float32", device="cpu", attention=attention)
        used = model.config._attn_implementation
        assert used == attention or attention == "auto"
        found[attention] = logits(model)
    assert torch.allclose(found["eager"], found["sdpa"], atol=1e-4)
    assert torch.equal(found["auto"], found["sdpa"])


@pytest.mark.parametrize(
    ("cuda", "package", "dtype", "message"),
    [
        (False, True, "bfloat16", "flash_attention_2 needs a CUDA device, found cpu; use sdpa or eager"),
        (True, False, "bfloat16", "flash_attention_2 needs the package flash-attn, which is not installed"),
        (True, True, "float32", "flash_attention_2 needs bfloat16 or float16, found float32"),
    ],
)
def test_flash_attention_that_is_not_to_be_had_is_refused(models, monkeypatch, cuda, package, dtype, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    real = importlib.util.find_spec
    there = lambda name, *a: package or None if name == "flash_attn" else real(name, *a)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", there)
    with pytest.raises(ModelError, match=message):
        load_model(str(models / "student"), dtype=dtype, attention="flash_attention_2")


def test_attention_that_a_family_lacks_is_refused(tmp_path):
    config = transformers.AutoConfig.for_model("bloom", vocab_size=64, hidden_size=16, n_layer=1, n_head=2)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"cannot load .*attention sdpa\): .*does not support"):
        load_model(str(tmp_path), dtype="float32", device="cpu", attention="sdpa")


@pytest.mark.parametrize(
    ("device", "rank", "visible", "expected"),
    [
        ("auto", "3", 4, "cuda:3"),
        ("cuda", "1", 2, "cuda:1"),
        ("cuda", "1", 1, "cuda:0"),  # a launcher that shows each process its own GPU only
        ("cuda", None, 4, "cuda"),
        ("cuda:2", "1", 4, "cuda:2"),
        ("cpu", "1", 4, "cpu"),
    ],
)
def test_each_process_loads_onto_its_own_gpu(models, monkeypatch, device, rank, visible, expected):
    asked = {}

    def record(name, **options):
        asked.update(options)
        raise OSError("far enough")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", record)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    with pytest.raises(ModelError, match="far enough"):
        load_model(str(models / "student"), device=device)
    assert asked["device_map"] == {"": expected}
