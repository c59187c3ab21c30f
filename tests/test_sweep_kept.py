"""What a process keeps between students changes none of them: the same bytes and scores as trained alone."""

import copy
import hashlib
from pathlib import Path

import pytest
import torch

from kdcache.recipe import parse_recipe
from kdcache.student import kept as kept_module
from kdcache.student.distill import distill
from kdcache.student.kept import Kept

ROWS = [
    {"loss": {"temperature": 1.0}, "lora": {"r": 4}, "training": {}},
    {"loss": {"temperature": 2.0}, "lora": {"r": 8, "alpha": 8}, "training": {"max_length": 40}},
    {"loss": {"ce_weight": 0.2}, "lora": {"r": 4, "targets": ["q_proj", "v_proj"]}, "training": {"max_steps": 3}},
    {"loss": {"ce_weight": 0.2}, "lora": {"r": 4, "dora": True}, "training": {"gradient_checkpointing": True}},
    {"loss": {"temperature": 1.0}, "lora": {"r": 4}, "training": {"learning_rate": 1e-3, "max_length": 40}},
]


@pytest.fixture
def row(values, shared_cache, tmp_path):
    """The recipe of a row of `ROWS` in a directory of its own."""

    def make(row, folder, **student):
        own = copy.deepcopy(values)
        own["cache"]["directory"] = str(shared_cache)
        own["output"] = str(tmp_path / folder)
        own["loss"] = row["loss"]
        own["student"] |= {"lora": row["lora"], **student}
        own["training"] |= {"max_steps": 2, **row["training"]}
        return parse_recipe(own)

    return make


def weights(record):
    """Every tensor file of the saved student."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in (record.output / "model").glob("*.safetensors")}


# Quantised, what comes before and after the row that is prepared in most ways.
@pytest.mark.parametrize(("quantization", "rows"), [("none", ROWS), ("nf4", [ROWS[1], ROWS[3], ROWS[4]])])
def test_students_of_one_process_are_those_of_processes_of_their_own(row, quantization, rows, monkeypatch):
    loads, load = [], kept_module.load_student
    monkeypatch.setattr(kept_module, "load_student", lambda student: (loads.append(1), load(student))[1])
    kept = Kept()
    together = [distill(row(r, f"together{i}", quantization=quantization), kept=kept) for i, r in enumerate(rows)]
    assert len(loads) == 1
    alone = [distill(row(r, f"alone{i}", quantization=quantization)) for i, r in enumerate(rows)]
    assert len(loads) == 1 + len(rows)
    assert [weights(r) for r in together] == [weights(r) for r in alone]
    assert [r.scores for r in together] == [r.scores for r in alone]
    assert len({str(weights(r)) for r in alone}) == len(rows)
    assert all(r.scores["student before"] != r.scores["student after"] for r in alone)


def test_the_base_is_bit_for_bit_what_it_was(row):
    recipe = row(ROWS[3], "first", quantization="nf4")
    kept = Kept()
    distill(recipe, kept=kept)
    base = kept.take_base(recipe.student)
    fresh = kept_module.load_student(recipe.student)
    # What is not quantised was put into float32 for training, which changes no value.
    found, wanted = base.state_dict(), fresh.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[k].to(wanted[k].dtype), wanted[k]) for k in wanted)
    assert not any(p.requires_grad for p in base.parameters())
    assert not base.training
    assert not any(getattr(m, "gradient_checkpointing", False) for m in base.modules())


def test_another_base_and_full_fine_tuning_are_loaded_anew(row, monkeypatch):
    loads, load = [], kept_module.load_student
    monkeypatch.setattr(kept_module, "load_student", lambda student: (loads.append(1), load(student))[1])
    # Its 8-bit optimizer keeps 32-bit states for embeddings: known by place, they would be another's adapter next.
    whole = {"loss": {}, "lora": None, "training": {"optimizer": "adamw_8bit", "max_steps": 2}}
    small = {
        "loss": {},
        "lora": {"r": 64},
        "training": {"optimizer": "adamw_8bit", "max_steps": 2, "learning_rate": 1e-2},
    }
    kept, order = Kept(), [small, whole, small, small]
    together = [distill(row(r, f"together{i}"), kept=kept) for i, r in enumerate(order)]
    # The second row trains the very weights that the first has left untouched, and keeps none of them.
    assert len(loads) == 2
    alone = [distill(row(r, f"alone{i}")) for i, r in enumerate(order[1:3])]
    assert [weights(r) for r in together[1:3]] == [weights(r) for r in alone]
    assert weights(together[0]) == weights(together[2]) == weights(together[3])


def test_a_row_that_fails_leaves_no_base_behind(row, monkeypatch):
    kept, recipe = Kept(), row(ROWS[0], "first")
    good = distill(recipe, kept=kept)
    with monkeypatch.context() as patch:
        patch.setattr("kdcache.student.distill.train_to_end", lambda *a: (_ for _ in ()).throw(RuntimeError("broken")))
        with pytest.raises(RuntimeError, match="broken"):
            distill(row(ROWS[1], "second"), kept=kept)
    again = distill(row(ROWS[0], "third"), kept=kept)
    assert weights(again) == weights(good)
    assert Path(again.output / "run.json").exists()
