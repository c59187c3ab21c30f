"""Exports of students that were made by ``student.init``: the run holds all that they need."""

import json
import shutil

import pytest
import transformers
import yaml

from kdcache.errors import ModelError
from kdcache.export import run
from kdcache.export.run import export
from kdcache.student.start import described_base
from tests.export.test_export import Told, changed


def card_of(folder):
    text = (folder / "README.md").read_text()
    return yaml.safe_load(text.split("---\n")[1]), text


def test_a_made_student_is_exported_without_what_it_was_made_from(made_run, tmp_path):
    told = Told()
    made = export(made_run, tmp_path / "out", ["merged", "nf4", "gguf-f16"], progress=told)
    assert made.rows["merged"]["kl_to_run"] < 2e-3
    assert made.rows["gguf-f16"]["kl_to_run"] < 2e-3
    assert made.rows["nf4"]["kl_to_run"] < 0.05
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "merged", dtype="auto")
    assert model.config.num_hidden_layers == len(model.model.layers) == 1
    assert not any("is not the run's student" in text for text in told.messages)
    fields, text = card_of(tmp_path / "out")
    assert "base_model" not in fields
    assert "# Some layers of source, distilled from teacher" in text
    assert f"not start from source as it is, but from {described_base(made_run)}." in text
    assert "source" in made.rows["gguf-f16"]["file"]


def test_a_changed_source_makes_no_other_student(made_run, models, tmp_path):
    copy = shutil.copytree(made_run, tmp_path / "run")
    # The teacher is another model of the same width of vocabulary.
    changed(copy, "run.json", lambda r: r["recipe"]["student"].update(model=str(models / "teacher")))
    assert export(copy, tmp_path / "out", ["merged"]).rows["merged"]["kl_to_run"] < 2e-3
    # Without the base of its own there is nothing to merge into.
    shutil.rmtree(copy / "base")
    with pytest.raises(ModelError, match="has lost the student that it made to start from"):
        export(copy, tmp_path / "two", ["merged"])


def test_a_form_that_is_another_student_is_warned_of(qlora_run, models, tmp_path, monkeypatch):
    copy = shutil.copytree(qlora_run, tmp_path / "run")
    whole = run.Maker._merge

    def other(self, folder):
        whole(self, folder)
        shutil.copy(models / "student" / "model.safetensors", folder)

    monkeypatch.setattr(run.Maker, "_merge", other)
    told = Told()
    made = export(copy, tmp_path / "out", ["merged", "gguf-f16"], progress=told)
    assert made.rows["merged"]["kl_to_run"] > 1e-2
    assert len([t for t in told.messages if "is not the run's student: its distributions are" in t]) == 2


def test_the_card_claims_no_base_for_random_weights_and_keeps_names_without_a_cache(made_run, tmp_path, monkeypatch):
    copy = shutil.copytree(made_run, tmp_path / "run")
    base = export(copy, tmp_path / "layers", ["merged"], base_model="user/base", compare=False)
    fields, text = card_of(base.folder)
    assert fields["base_model"] == "user/base"
    assert "# Some layers of base, distilled from teacher" in text
    assert "It did not start from base as it is" in text

    def scaled(record):
        record["recipe"]["student"]["init"] = {"method": "scale", "parameters": 100_000, "seed": 1}
        record["recipe"]["data"]["train"] |= {"path": "user/texts", "revision": "a" * 40}

    changed(copy, "run.json", scaled)
    folder = export(copy, tmp_path / "random", ["merged"], base_model="user/base", compare=False).folder
    fields, text = card_of(folder)
    assert "base_model" not in fields
    assert fields["datasets"] == ["user/texts"]
    assert "# A student shaped after base, distilled from teacher" in text
    assert str(made_run) not in text
    assert json.loads((folder / "export.json").read_text())["finished"]
