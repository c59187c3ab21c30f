"""Stand-ins for the models and data sets that published recipes name: of the same kind and with the same columns, but small."""

import io
import json
import random

import pyarrow
import pyarrow.parquet
import transformers

from tests.cache.hub_server import Repository

QWEN, LLAMA = (transformers.Qwen2Config, 2), (transformers.LlamaConfig, 16)
MODELS = {
    "Qwen/Qwen2.5-0.5B-Instruct": QWEN, "Qwen/Qwen2.5-1.5B-Instruct": QWEN, "Qwen/Qwen2.5-3B-Instruct": QWEN,
    "Qwen/Qwen2.5-7B-Instruct": QWEN, "meta-llama/Llama-3.2-1B": LLAMA, "meta-llama/Llama-3.1-8B-Instruct": LLAMA,
}  # fmt: skip
# A data set's file by split, and its columns; where recipes name a configuration, the card says which files are of it.
DATASETS = {
    "yahma/alpaca-cleaned": ({"train": "alpaca_data_cleaned.json"}, ("instruction", "input", "output"), None),
    "sahil2801/CodeAlpaca-20k": ({"train": "code_alpaca_20k.json"}, ("instruction", "input", "output"), None),
    "databricks/databricks-dolly-15k": (
        {"train": "databricks-dolly-15k.jsonl"}, ("instruction", "context", "response", "category"), None,
    ),
    "argilla/databricks-dolly-15k-curated-multilingual": (
        {s: f"data/{s}-00000-of-00001.parquet" for s in ("de", "en", "es", "fr")},
        ("instruction", "context", "response", "category", "instruction_original_en"), "default",
    ),
    "google/code_x_glue_cc_code_refinement": (
        {s: f"small/{s}-00000-of-00001.parquet" for s in ("train", "validation", "test")}, ("id", "buggy", "fixed"), "small",
    ),
    "google/code_x_glue_tc_text_to_code": (
        {s: f"data/{s}-00000-of-00001.parquet" for s in ("train", "validation", "test")}, ("id", "nl", "code"), "default",
    ),
    "allenai/sciq": (
        {s: f"data/{s}-00000-of-00001.parquet" for s in ("train", "validation", "test")},
        ("question", "distractor1", "distractor2", "distractor3", "correct_answer", "support"), "default",
    ),
    "abisee/cnn_dailymail": (
        {s: f"3.0.0/{s}-00000-of-00001.parquet" for s in ("train", "validation", "test")}, ("article", "highlights", "id"), "3.0.0",
    ),
    "openai/gsm8k": ({s: f"main/{s}-00000-of-00001.parquet" for s in ("train", "test")}, ("question", "answer"), "main"),
    "HuggingFaceFW/fineweb": ({"train": "sample/10BT/000_00000.parquet"}, ("text", "id", "url"), "sample-10BT"),
}  # fmt: skip
ROWS = {"openai/gsm8k": 1120, "HuggingFaceFW/fineweb": 400}


def fill(hub, tokenizer, folder):
    """Give the server every model, with the files of ``tokenizer``, a folder, and every data set; ``folder`` is for models being made."""
    words = {
        path.name: path.read_bytes() for path in tokenizer.iterdir() if "token" in path.name or "template" in path.name
    }
    for name, (kind, layers) in MODELS.items():
        repository = hub.repositories[f"models/{name}"] = Repository(private=False)
        repository.add(words | _model(kind, layers, tokenizer, folder / name.replace("/", "--")), "model")
    for number, (name, (splits, columns, configuration)) in enumerate(DATASETS.items()):
        files = {file: _rows(file, columns, ROWS.get(name, 100), number) for file in splits.values()}
        if configuration is not None:
            patterns = "".join(f"  - split: {split}\n    path: {file}\n" for split, file in splits.items())
            files["README.md"] = (
                f"---\nconfigs:\n- config_name: {configuration}\n  data_files:\n{patterns}---\n".encode()
            )
        repository = hub.repositories[name] = Repository(private=False)
        repository.add(files, "data")


def _model(kind, layers, tokenizer, folder):
    loaded = transformers.AutoTokenizer.from_pretrained(tokenizer)
    config = kind(
        vocab_size=len(loaded), hidden_size=64, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, eos_token_id=loaded.eos_token_id, bos_token_id=None, pad_token_id=loaded.pad_token_id,
        dtype="bfloat16",
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _rows(file, columns, count, seed):
    draw = random.Random(seed)
    rows = [
        {c: " ".join(draw.choices(("seven", "plus", "one", "is", "eight", "red"), k=12)) for c in columns}
        for _ in range(count)
    ]
    if file.endswith(".json"):
        return json.dumps(rows).encode()
    if file.endswith(".jsonl"):
        return "".join(json.dumps(row) + "\n" for row in rows).encode()
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), out)
    return out.getvalue()
