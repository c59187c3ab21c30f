"""Which rows a sweep has, how they are named, and what is refused before anything runs."""

import copy
from pathlib import Path

import pytest

from kdcache.errors import KdcacheError, RecipeError
from kdcache.recipe import load_recipe, parse_recipe
from kdcache.sweep.ready import ready_rows
from kdcache.sweep.rows import expand, factors

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes/sweeps").glob("*.yaml"))
PUBLISHED = ("loss.temperature", "loss.ce_weight", "loss.kd_weight", "training.learning_rate", "training.max_length")


def rows(sweep, **sections):
    values = {"output": "o", "cache": {"directory": "c"}, "student": {"model": "m"}, **sections, "sweep": sweep}
    return expand(parse_recipe(values))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
def test_shipped_sweeps_expand(path):
    recipe = load_recipe(path)
    found = ready_rows(recipe, cache_to_come=True)
    assert len(found) >= 5
    assert len({row.directory for row in found}) == len(found)
    for row in found:
        assert row.recipe.sweep is None
        assert Path(row.recipe.output).parent == Path(recipe.output)
        assert row.recipe.cache == recipe.cache


def test_both_grids_of_six_vary_what_was_published():
    for name in ("embedded.yaml", "qwen2.5-a1-a6.yaml"):
        found = expand(load_recipe(ROOT / "recipes/sweeps" / name))
        assert [row.name for row in found] == [f"A{i}" for i in range(1, 7)]
        assert sorted(factors(found)) == sorted(PUBLISHED)
    reference = load_recipe(ROOT / "recipes/qwen2.5-3b-to-0.5b.yaml")
    first = found[0].recipe
    assert first == reference.model_copy(update={"output": first.output})
    assert found[4].changes == {"training.learning_rate": 1e-4}
    assert found[5].recipe.training.max_length == 256


def test_named_rows_come_first_and_the_grid_varies_its_last_key_fastest():
    found = rows({
        "grid": {"loss.temperature": [1, 2], "training.learning_rate": [1e-4, 0.002]},
        "rows": {"A 1": {}, "A2": {"training.clip": None, "loss.kd_weight": {"start": 1, "end": 0.5}}},
    })  # fmt: skip
    assert [row.name for row in found] == [
        "A 1", "A2", "temperature=1,learning_rate=0.0001", "temperature=1,learning_rate=0.002",
        "temperature=2,learning_rate=0.0001", "temperature=2,learning_rate=0.002",
    ]  # fmt: skip
    assert [row.directory for row in found[:3]] == ["A_1", "A2", "temperature=1,learning_rate=0.0001"]
    assert found[1].changes == {"training.clip": None, "loss.kd_weight": {"start": 1.0, "end": 0.5, "shape": "linear"}}
    assert found[1].recipe.training.clip is None
    assert found[5].recipe.loss.temperature == 2.0
    assert found[5].recipe.training.learning_rate == 0.002
    assert factors(found) == ["training.clip", "loss.kd_weight", "loss.temperature", "training.learning_rate"]


def test_a_row_keeps_its_name_when_values_are_added():
    few = rows({"grid": {"training.learning_rate": [1e-4, 2e-4]}})
    more = rows({"grid": {"training.learning_rate": [5e-5, 1e-4, 0.000123456789, 2e-4]}})
    assert [row.name for row in few] == ["learning_rate=0.0001", "learning_rate=0.0002"]
    assert [row.name for row in more] == [
        "learning_rate=5e-05", "learning_rate=0.0001", "learning_rate=0.000123456789", "learning_rate=0.0002",
    ]  # fmt: skip


def test_names_are_short_unique_and_safe():
    words = ["runs/a/cache", "runs/a cache", "../..", "x" * 200]
    names = [row.name for row in rows({"grid": {"cache.directory": words}})]
    assert len(set(names)) == 4
    assert all(len(name) <= 80 and not set(name) & set("/\\ :*?\"<>|$'") for name in names)
    lists = rows({"grid": {"student.lora.targets": ["all-linear", ["q_proj", "v_proj"]]}})
    assert [row.name for row in lists] == ["targets=all-linear", "targets=q_proj-v_proj"]


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ({}, "the section sweep is empty"),
        ({"grid": {"loss.temperature": []}}, r"loss\.temperature has an empty list of values"),
        ({"grid": {"loss.temperature": 2}}, r"sweep\.grid\.loss\.temperature: .*list, found 2"),
        ({"gird": {}}, r"unknown recipe key sweep\.gird; did you mean sweep\.grid"),
        ({"grid": {"loss.temprature": [1]}}, r"row temprature=1: unknown recipe key loss\.temprature; did you mean loss\.temperature"),
        ({"grid": {"loss.temperature": [1, -1]}}, r"row temperature=-1: recipe key loss\.temperature should be above 0"),
        ({"rows": {"B": {"loss.temperature": "hot"}}}, r"row B: recipe key loss\.temperature: .*found 'hot'"),
        ({"rows": {"B": {"training.warmup": 1.5}}}, r"row B: training\.warmup of 1 or more"),
        ({"rows": {"B": {"training.keep_best": True}}}, r"row B: training\.keep_best needs training\.eval_steps"),
        ({"rows": {"B": {"student.lora": None}}}, r"row B: student\.lora is null .* needs student\.quantization none"),
        ({"rows": {"B": {"seed.x": 1}}}, r"row B: .*seed"),
        ({"rows": {"B": {"student.model.x": 1}}}, r"row B: student\.model\.x: model is not a section"),
        ({"rows": {"B": {"selection.k": 3}}}, r"row B changes selection\.k, which makes another cache.*cache\.directory"),
        ({"rows": {"B": {"data.max_length": 3}}}, r"row B changes data\.max_length, which makes another cache"),
        ({"rows": {"B": {"teacher": None}}}, "row B changes teacher, which makes another cache"),
        ({"rows": {"B": {"cache.positions_per_shard": 9}}}, r"row B changes cache\.positions_per_shard"),
        ({"rows": {"B": {"embedded.seed": 9}}}, r"row B changes embedded\.seed"),
        ({"rows": {"B": {"loss": {"temperature": 1}}}}, r"row B gives the section loss as a whole, .* such as loss\.temperature"),
        ({"grid": {"student.lora": [{"r": 4}]}}, r"gives the section student\.lora as a whole, .* such as student\.lora\.r"),
        ({"rows": {"B": {"training": {}}}}, "row B gives the section training as a whole"),
        ({"rows": {"B": {"output": "x"}}}, "row B changes output; .* by its name"),
        ({"rows": {"../B": {}}}, r"the row name '\.\./B' is to be a directory"),
        ({"rows": {"": {}}}, "the row name '' is to be a directory"),
        ({"rows": {"sweep.json": {}}}, r"the row name sweep\.json is that of a file"),
        ({"rows": {"B": {}, "b": {"seed": 1}}}, "the rows B and b would share a directory"),
        ({"rows": {"B": {}, "C": {}}}, "the rows B and C are the same experiment"),
        ({"rows": {"B": {"loss.temperature": 1}}, "grid": {"loss.temperature": [1]}}, "rows B and temperature=1 are the same"),
        ({"grid": {"seed": [1, 1]}}, "seed has the value 1 twice"),
        ({"grid": {"loss.temperature": [1, 1.0]}}, "the same experiment"),
        ({"search": {"loss.temperature": [1, 2]}}, r"sweep\.search needs sweep\.trials"),
        ({"rows": {"B": {}}, "trials": 3}, r"sweep\.trials goes with sweep\.search"),
        ({"search": {"seed": {"low": 3, "high": 2}}, "trials": 3}, "needs low < high, found low 3, high 2"),
        ({"search": {"seed": {"low": 0, "high": 2, "log": True}}, "trials": 3}, "needs 0 < low < high, since log"),
        ({"search": {"seed": {"low": 0, "hihg": 2}}, "trials": 3}, r"seed in sweep\.search takes a list .* or \{low"),
        ({"search": {"seed": [[1]]}, "trials": 3}, r"seed in sweep\.search takes a list of plain values"),
        ({"search": {"seed": []}, "trials": 3}, "seed has an empty list"),
        ({"search": {"seed": [1]}, "grid": {"seed": [1]}, "trials": 3}, r"seed stands in sweep\.grid and in sweep\.search"),
        ({"search": {"seed": [1]}, "rows": {"trial-001": {}}, "trials": 3}, "row trial-001 has a name of the search's"),
    ],
)  # fmt: skip
def test_bad_sweeps_are_refused_by_row_and_key(sweep, message):
    with pytest.raises(RecipeError, match=message):
        rows(sweep)


def test_a_recipe_without_a_sweep_has_no_rows():
    with pytest.raises(RecipeError, match="nothing to sweep: give --grid"):
        expand(parse_recipe({"output": "o", "cache": {"directory": "c"}}))


def test_a_row_from_another_cache_says_nothing_of_how_that_was_made(values, shared_cache):
    values["sweep"] = {"rows": {"B": {"cache.directory": str(shared_cache), "teacher": None}}}
    values["selection"] = {"method": "top_k", "k": 3}
    (row,) = ready_rows(parse_recipe(values), cache_to_come=True)
    assert "selection" not in row.recipe.model_fields_set
    assert row.recipe.teacher is None
    assert row.recipe.data is not None


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ({"rows": {"A": {}, "B": {"loss.temperature": 0.5}}}, r"row B: loss\.temperature 0\.5 is below"),
        ({"grid": {"cache.directory": ["nowhere"]}}, "row directory=nowhere: "),
        ({"search": {"loss.temperature": {"low": 0.5, "high": 2}}, "trials": 2}, r"row of the search, loss\.temperature=0\.5: "),
        ({"search": {"training.epochs": {"low": -1.0, "high": 2}}, "trials": 2}, r"row of the search, training\.epochs=-1\.0: "),
        ({"rows": {"B": {"student": None}}}, "row B: the recipe has no section student"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("cache_to_come", [False, True])
def test_rows_are_held_against_their_caches(values, shared_cache, sweep, message, cache_to_come):
    own = copy.deepcopy(values)
    own["cache"]["directory"] = str(shared_cache) if not cache_to_come else own["cache"]["directory"]
    own["sweep"] = sweep
    with pytest.raises(KdcacheError, match=message):
        ready_rows(parse_recipe(own), cache_to_come=cache_to_come)


def test_a_recipe_of_another_cache_is_refused(values, shared_cache):
    values["cache"]["directory"] = str(shared_cache)
    values["selection"] = {"method": "top_k", "k": 3}
    values["sweep"] = {"rows": {"A": {}}}
    with pytest.raises(KdcacheError, match=r"row A: the cache .* was made from another recipe: selection\.method"):
        ready_rows(parse_recipe(values))
