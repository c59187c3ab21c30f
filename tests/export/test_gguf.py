"""GGUF files: the same model to transformers' own reader, blocks as the format has them, metadata, and what is refused."""

import json

import gguf
import numpy as np
import pytest
import torch
import transformers

from kdcache.errors import ModelError, StorageError
from kdcache.export.gguf_file import interleaved, read_back, write_gguf
from kdcache.export.gguf_metadata import refuse_unmapped, rope_factors, tokenizer_table
from kdcache.token_maps import load_tokenizer

SHAPE = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 256, "bos_token_id": None, "eos_token_id": 2,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
CONFIGS = {
    "qwen2, tied": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen2, yarn": ("Qwen2Config", {"rope_parameters": YARN}),
    "llama": ("LlamaConfig", {}),
    "llama, biases, wide heads": ("LlamaConfig", {"attention_bias": True, "head_dim": 32}),
    "llama 3, tied": ("LlamaConfig", {"tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    # No row of the second matrix of the feed-forward layers is a multiple of 32.
    "qwen2, odd": ("Qwen2Config", {"intermediate_size": 80}),
}


@pytest.fixture(scope="module")
def tokenizer(models):
    return load_tokenizer(str(models / "student"))


@pytest.fixture(scope="module")
def folders(tokenizer, tmp_path_factory):
    """Models with weights that make every part of them count."""
    made = {}
    for name, (kind, changes) in CONFIGS.items():
        config = getattr(transformers, kind)(**{**SHAPE, "vocab_size": len(tokenizer) + 6, **changes})
        torch.manual_seed(len(made))
        model = transformers.AutoModelForCausalLM.from_config(config).bfloat16()
        for weight in model.parameters():
            torch.nn.init.normal_(weight, mean=float(weight.ndim < 2), std=0.2)
        made[name] = tmp_path_factory.mktemp("model")
        model.save_pretrained(made[name])
    return made


def logits(folder, **options):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    with torch.inference_mode():
        return model(torch.arange(5, 200)[None]).logits.log_softmax(-1)


def written(folder, kind, tokenizer, tmp_path):
    config = transformers.AutoConfig.from_pretrained(folder)
    path = tmp_path / f"model-{kind}.gguf"
    write_gguf(path, folder, kind, tokenizer_table(tokenizer, config.vocab_size), name="a model")
    return path, config


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_reads_the_same_model_from_the_file(folders, tokenizer, tmp_path, name):
    folder, wanted = folders[name], logits(folders[name])
    errors = {}
    for kind in ("F16", "Q8_0", "Q4_0"):
        path, config = written(folder, kind, tokenizer, tmp_path)
        # transformers' reader has its own table of names and order of rows; of rope it reads the base alone.
        found = logits(tmp_path, gguf_file=path.name, config=config)
        errors[kind] = float((wanted.exp() * (wanted - found)).sum(-1).mean())
        again = read_back(path, folder)
        assert again.tensors == len(gguf.GGUFReader(path).tensors)
        assert again.relative_error < {"F16": 1e-6, "Q8_0": 0.01, "Q4_0": 0.1}[kind]
    assert errors["F16"] < 1e-6 < errors["Q8_0"] < 0.02
    assert errors["Q8_0"] < errors["Q4_0"]


@pytest.mark.parametrize("name", ["qwen2, tied", "llama"])
def test_a_plain_model_needs_nothing_but_the_file(folders, tokenizer, tmp_path, name):
    path, config = written(folders[name], "F16", tokenizer, tmp_path)
    assert torch.allclose(logits(tmp_path, gguf_file=path.name), logits(folders[name]), atol=1e-4)
    stated = transformers.AutoConfig.from_pretrained(tmp_path, gguf_file=path.name)
    for key in (
        *(k for k in SHAPE if k not in ("bos_token_id", "eos_token_id")),
        "tie_word_embeddings",
        "vocab_size",
        "rms_norm_eps",
    ):
        assert getattr(stated, key) == pytest.approx(getattr(config, key)), key


def test_blocks_are_those_of_the_format(folders, tokenizer, tmp_path):
    import safetensors.torch

    weights = safetensors.torch.load_file(folders["qwen2, tied"] / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    values = weights[name].double().numpy()
    blocks = values.reshape(-1, 32)
    for kind in ("Q8_0", "Q4_0"):
        path, _ = written(folders["qwen2, tied"], kind, tokenizer, tmp_path)
        tensors = {t.name: t for t in gguf.GGUFReader(path).tensors}
        stored = np.asarray(tensors["blk.0.ffn_up.weight"].data).reshape(len(blocks), -1)
        scale = stored[:, :2].copy().view("<f2").astype(np.float64)
        if kind == "Q8_0":
            assert stored.shape[1] == 34
            steps = stored[:, 2:].view(np.int8).astype(np.float64)
            assert scale[:, 0] == pytest.approx(np.abs(blocks).max(axis=1) / 127, rel=1e-3)
        else:
            assert stored.shape[1] == 18
            # Low halves of the bytes are the first sixteen numbers.
            steps = np.concatenate([stored[:, 2:] & 15, stored[:, 2:] >> 4], axis=1).astype(np.float64) - 8
            extreme = blocks[np.arange(len(blocks)), np.abs(blocks).argmax(axis=1)]
            assert scale[:, 0] == pytest.approx(extreme / -8, rel=1e-3)
        error = np.abs(scale * steps - blocks) / np.abs(scale)
        assert (error <= (0.57 if kind == "Q8_0" else 1.01)).all()
        kinds = {t.name: t.tensor_type.name for t in tensors.values()}
        assert kinds["token_embd.weight"] == "Q8_0"
        assert kinds["output_norm.weight"] == kinds["blk.0.attn_q.bias"] == "F32"
        assert "output.weight" not in kinds
    path, _ = written(folders["qwen2, odd"], "Q4_0", tokenizer, tmp_path)
    assert {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}["blk.0.ffn_down.weight"] == "F16"


def test_rows_of_a_head_are_taken_in_turn():
    rows = np.arange(2 * 6)[:, None] * np.ones(3)
    assert interleaved(rows, 2)[:, 0].tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    assert interleaved(np.arange(4), 1).tolist() == [0, 2, 1, 3]


def test_rope_factors_divide_the_plain_frequencies_into_the_models_own(folders):
    config = transformers.AutoConfig.from_pretrained(folders["llama 3, tied"])
    model = transformers.AutoModelForCausalLM.from_config(config)
    plain = 5e5 ** -(np.arange(0, 16, 2) / 16)
    factors = rope_factors(config)
    assert plain / factors == pytest.approx(model.model.rotary_emb.inv_freq.numpy(), rel=1e-5)
    assert factors.min() == pytest.approx(1.0)
    assert factors.max() == pytest.approx(32.0)
    assert rope_factors(transformers.AutoConfig.from_pretrained(folders["llama"])) is None


def test_the_file_says_what_llama_cpp_asks(folders, tokenizer, tmp_path):
    path, config = written(folders["qwen2, yarn"], "Q4_0", tokenizer, tmp_path)
    fields = {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}
    assert fields["general.architecture"] == "qwen2"
    assert fields["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q4_0
    assert fields["qwen2.rope.scaling.type"] == "yarn"
    assert fields["qwen2.rope.scaling.factor"] == 4.0
    assert fields["qwen2.rope.scaling.original_context_length"] == 64
    assert fields["tokenizer.ggml.model"] == "gpt2"
    assert fields["tokenizer.ggml.pre"] == "qwen2"
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == config.vocab_size
    assert tokens[: len(tokenizer)] == tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    assert types[:4] == [3, 3, 3, 1]  # <|endoftext|>, <|im_start|>, <|im_end|> are control tokens
    assert types[-6:] == [5] * 6
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    assert fields["tokenizer.ggml.merges"] == [" ".join(pair) for pair in state["model"]["merges"]]
    assert fields["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
    assert fields["tokenizer.ggml.padding_token_id"] == tokenizer.pad_token_id
    assert fields["tokenizer.ggml.add_bos_token"] is False
    assert fields["tokenizer.chat_template"] == tokenizer.chat_template
    path, _ = written(folders["llama, biases, wide heads"], "F16", tokenizer, tmp_path)
    fields = {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}
    assert fields["llama.attention.key_length"] == fields["llama.rope.dimension_count"] == 32


def rebuilt(tokenizer, change):
    import tokenizers

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    change(state)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(json.dumps(state)), eos_token="<|im_end|>"
    )


def test_the_rule_for_words_is_named_by_its_expression(tokenizer):
    def three_digits(state):
        expression = state["pre_tokenizer"]["pretokenizers"][0]["pattern"]
        expression["Regex"] = expression["Regex"].replace(r"\p{N}| ", r"\p{N}{1,3}| ")

    def bytes_alone(state):
        state["pre_tokenizer"] = {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": True,
        }

    def own(state):
        state["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\w+|\W"

    rows = len(tokenizer)
    assert tokenizer_table(tokenizer, rows).pre == "qwen2"
    assert tokenizer_table(rebuilt(tokenizer, three_digits), rows).pre == "llama-bpe"
    assert tokenizer_table(rebuilt(tokenizer, bytes_alone), rows).pre == "gpt-2"
    assert tokenizer_table(rebuilt(tokenizer, own), rows).pre == "default"


def test_tokenizers_of_another_kind_are_refused(tokenizer):
    def fallback(state):
        state["model"]["byte_fallback"] = True

    with pytest.raises(ModelError, match="not byte-level BPE"):
        tokenizer_table(rebuilt(tokenizer, fallback), len(tokenizer))
    with pytest.raises(ModelError, match="only 500 embeddings"):
        tokenizer_table(tokenizer, 500)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (transformers.GPT2Config(), "of type gpt2; GGUF is written for qwen2 and llama"),
        (
            transformers.Qwen2Config(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
            "type dynamic",
        ),
        (transformers.Qwen2Config(use_sliding_window=True), "sliding window"),
        (transformers.LlamaConfig(mlp_bias=True), "biases in its MLP"),
        (transformers.LlamaConfig(hidden_act="gelu"), "the activation gelu"),
        (transformers.LlamaConfig(partial_rotary_factor=0.5), "partial_rotary_factor = 0.5"),
        (transformers.Qwen2Config(rope_parameters={**YARN, "attention_factor": 2.0}), "attention_factor = 2.0, of type yarn"),
        (transformers.Qwen2Config(rope_parameters={**YARN, "beta_fast": 16}), "beta_fast = 16"),
        (transformers.LlamaConfig(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0, "own": 3}), "own = 3"),
    ],
)  # fmt: skip
def test_what_gguf_could_not_say_is_refused(config, match):
    with pytest.raises(ModelError, match=match):
        refuse_unmapped(config, "the model")


def test_what_gguf_says_in_full_is_not_refused(folders):
    for name in CONFIGS:
        refuse_unmapped(transformers.AutoConfig.from_pretrained(folders[name]), name)
    refuse_unmapped(transformers.Qwen2Config(rope_parameters={**YARN, "beta_fast": 32.0, "beta_slow": 1}), "yarn")


@pytest.mark.parametrize(
    ("name", "left_out", "match"),
    [
        ("llama", "add_rope_freq_base", r"llama\.rope\.freq_base is None, not 10000\.0"),
        ("llama, biases, wide heads", "add_key_length", r"llama\.attention\.key_length is None, not 32"),
        ("qwen2, yarn", "add_rope_scaling_factor", r"qwen2\.rope\.scaling\.factor is None, not 4\.0"),
    ],
)
def test_a_file_that_does_not_say_what_the_model_is_is_told(
    folders, tokenizer, tmp_path, monkeypatch, name, left_out, match
):
    monkeypatch.setattr(gguf.GGUFWriter, left_out, lambda *a: None)
    path, _ = written(folders[name], "F16", tokenizer, tmp_path)
    with pytest.raises(StorageError, match=match):
        read_back(path, folders[name])


def test_a_weight_beyond_half_precision_and_a_damaged_file_are_told(folders, tokenizer, tmp_path):
    path, _ = written(folders["llama"], "Q8_0", tokenizer, tmp_path)
    data = bytearray(path.read_bytes())
    data[-40] ^= 0x7F
    path.write_bytes(data)
    with pytest.raises(StorageError, match="reads back other than it was written"):
        read_back(path, folders["llama"])
    model = transformers.AutoModelForCausalLM.from_pretrained(folders["llama"], dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 3] = 1e6
    model.save_pretrained(tmp_path / "large")
    with pytest.raises(ModelError, match=r"blk\.0\.ffn_up\.weight holds a weight beyond half precision"):
        written(tmp_path / "large", "Q8_0", tokenizer, tmp_path)
    with pytest.raises(StorageError, match="cannot write"):
        written(folders["llama"], "F16", tokenizer, tmp_path / "absent")
