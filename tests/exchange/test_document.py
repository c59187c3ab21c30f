"""docs/exchange.md: its TRL example runs as it stands and has our loss, its plain JSON is read, its names are right."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml

from kdcache.cache.reader import open_cache
from kdcache.exchange.exporting import Options, export_cache
from kdcache.exchange.imported_plan import Given
from kdcache.exchange.importing import import_cache
from kdcache.student.forward import loss_sums
from kdcache.views import to_torch

TEXT = (Path(__file__).parent.parent.parent / "docs" / "exchange.md").read_text()


def blocks(kind):
    return re.findall(rf"```{kind}\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
def test_the_trl_example_trains_with_our_loss(models, shared_cache, tmp_path, monkeypatch):
    pytest.importorskip("trl", reason="TRL is not installed; its example in docs/exchange.md is not run")
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "arrow")
    [code] = blocks("python")
    code = code.replace("runs/embedded/cache", str(shared_cache)).replace("runs/embedded/models", str(models))
    code = code.replace(
        'output_dir="runs/embedded/trl"', f'output_dir="{tmp_path}", use_cpu=True, bf16=False, disable_tqdm=True'
    )
    names = {}
    exec(compile(code, "exchange.md", "exec"), names)
    trainer, model = names["trainer"], names["trainer"].model
    assert trainer.state.global_step == 4
    # The same batch through our own loss.
    model.eval().float()
    count = 5
    batch = names["collate"]([names["columns"][i] for i in range(count)])
    targets = int((batch["labels"] != -100).sum())
    view = to_torch(open_cache(shared_cache).split("train"), temperature=2.0)
    ours = loss_sums(
        model, model, view.collate([view[i] for i in range(count)]), vocab_size=names["cache"].vocab_size, temperature=2.0,
        ce_weight=0.5, kd_weight=0.5,
    )  # fmt: skip
    with torch.inference_mode():
        found = float(trainer.compute_loss(model, batch))
    assert found == pytest.approx(float(ours.total) / targets, rel=1e-4)


def test_the_plain_json_is_read_as_it_stands(models, tmp_path):
    [line] = blocks("json")
    (tmp_path / "train.jsonl").write_text(json.dumps(json.loads(line)) + "\n")
    import_cache(tmp_path / "train.jsonl", tmp_path / "cache", "jsonl", Given(tokenizer=str(models / "teacher")))
    [sequence] = open_cache(tmp_path / "cache")["train"]
    assert sequence.rows.head.tolist() == [2, 2]
    assert sequence.rows.label_log_prob[0] == pytest.approx(-0.69, abs=1e-3)


def test_the_settings_for_axolotl_are_those_beside_the_data(shared_cache, tmp_path):
    [shown] = blocks("yaml")
    export_cache(open_cache(shared_cache), tmp_path / "out", "axolotl", Options(temperature=1.0))
    beside = re.findall(r"```yaml\n(.*?)```", (tmp_path / "out" / "README.md").read_text(), re.DOTALL)
    shown, beside = yaml.safe_load(shown), yaml.safe_load(beside[0])
    del shown["base_model"]
    assert {k: v for k, v in shown.items() if k != "datasets"} == {k: v for k, v in beside.items() if k != "datasets"}
    # The fields of axolotl's settings for its plugin (integrations/kd/args.py at commit 002b1ac9).
    assert set(shown) <= {
        "plugins",
        "datasets",
        "kd_trainer",
        "kd_ce_alpha",
        "kd_alpha",
        "kd_temperature",
        "kd_beta",
        "kd_normalize_topk",
    }
    assert shown["datasets"][0]["ds_type"] == "parquet"
    assert shown["datasets"][0]["type"] is None
