"""From bytes per position to floors: the budget is met, refused, or taken from the run that goes on."""

import dataclasses
from pathlib import Path

import pytest

from kdcache.cache.layout import MANIFEST_FILE, MINIMUM_FLOOR
from kdcache.cache.reader import open_cache, read_plan, shard_path
from kdcache.errors import CacheError, PlanMismatchError, RecipeError
from kdcache.progress import Silent
from kdcache.recipe import parse_recipe
from kdcache.teacher import capture as capture_module
from kdcache.teacher.budget import adopted_floors, bytes_per_position, find_floors
from kdcache.teacher.capture import capture, load_teacher
from kdcache.teacher.planning import plan_cache
from kdcache.teacher.sample import HiddenSample, hidden_sample, sample_rows

SHARPER = 3.0


@pytest.fixture
def values(values):
    """One shard per split, so that the size of a header does not count."""
    values["cache"]["positions_per_shard"] = 65536
    return values


@pytest.fixture
def measured(values):
    """A plan, and a sample whose distributions are as peaked as a real teacher's."""
    recipe = parse_recipe(values)
    planned = plan_cache(recipe, Silent())
    teacher = load_teacher(recipe, planned)
    flat = hidden_sample(teacher, sample_rows(planned, batch_tokens=512, positions=400), batch_tokens=512)
    return planned, HiddenSample(flat.rows, [(m, h * SHARPER, y) for m, h, y in flat.hidden], teacher)


def files(directory):
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def size_per_position(result):
    return sum(s.bytes for s in result.manifest.shards) / sum(s.positions for s in result.manifest.splits)


@pytest.mark.parametrize(
    "selection",
    [
        {"bytes_per_position": 24},
        {"bytes_per_position": 64},
        {"bytes_per_position": 200},
        {"bytes_per_position": 64, "values": "half"},
        {"bytes_per_position": 40, "temperatures": [2.0], "tail_logits": False},
        {"bytes_per_position": 40, "positions": "loss", "quantile": 0.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("sample", [4096, 250])
def test_a_budget_is_met(values, selection, sample, monkeypatch):
    monkeypatch.setattr(capture_module, "SAMPLE_POSITIONS", sample)
    values["selection"] = selection
    result = capture(parse_recipe(values))
    asked = selection["bytes_per_position"]
    if "positions" in selection:
        # Only the train split is thinned, and the budget is for it.
        shard, split = result.manifest.shards[0], result.manifest.splits[0]
        assert shard.bytes / split.positions == pytest.approx(asked, rel=0.15)
    else:
        assert size_per_position(result) == pytest.approx(asked, rel=0.15)
    plan = read_plan(result.directory)
    assert plan == result.plan
    assert plan.selection.bytes_per_position == asked
    assert all(MINIMUM_FLOOR <= f < 1 for f in plan.selection.floors)


@pytest.mark.parametrize("method", ["threshold_sampling", "threshold"])
def test_larger_budgets_have_lower_floors_and_measure_as_asked(measured, method):
    planned, sample = measured
    floors = []
    for asked in (24.0, 32.0, 40.0):
        changes = {"bytes_per_position": asked, "method": method}
        selection = planned.plan.selection.model_copy(update=changes)
        asking = dataclasses.replace(planned, plan=planned.plan.model_copy(update={"selection": selection}))
        found = find_floors(asking, sample, progress=Silent())
        assert bytes_per_position(found, sample) == pytest.approx(asked, rel=0.02)
        floors.append(found.plan.selection.floors)
    assert all(a > b > c > MINIMUM_FLOOR for a, b, c in zip(*floors, strict=True))


def test_too_small_a_budget_is_refused_before_anything_is_written(values):
    values["selection"]["bytes_per_position"] = 8
    with pytest.raises(RecipeError, match=r"bytes_per_position 8 is too small: .* take \d+\.\d bytes per position"):
        capture(parse_recipe(values))
    assert not Path(values["cache"]["directory"]).exists()


def test_given_floors_are_taken_as_they_are(values, monkeypatch):
    monkeypatch.setattr(capture_module, "find_floors", None)
    values["selection"] = {"floors": [0.02, 0.03]}
    result = capture(parse_recipe(values))
    assert result.plan.selection.floors == (0.02, 0.03)
    assert result.plan.selection.bytes_per_position is None


def test_a_run_that_goes_on_takes_the_floors_that_are_there(values, monkeypatch):
    values["cache"]["positions_per_shard"] = 200
    recipe = parse_recipe(values)
    first = capture(recipe)
    whole = files(first.directory)
    shard_path(first.directory, 1).unlink()
    (first.directory / MANIFEST_FILE).unlink()

    def measure(*args, **kwargs):
        raise AssertionError("floors were measured again")

    monkeypatch.setattr(capture_module, "find_floors", measure)
    second = capture(recipe)
    assert second.shards_made == 1
    assert second.plan == first.plan
    assert files(first.directory) == whole


def test_floors_of_another_plan_are_refused_before_the_teacher_is_loaded(values, tmp_path):
    first = capture(parse_recipe(values))
    planned = plan_cache(parse_recipe(values), Silent())
    assert planned.floors_open
    assert adopted_floors(planned, first.directory).plan == open_cache(first.directory).plan
    assert adopted_floors(planned, tmp_path / "nothing") is None
    for change in ({"bytes_per_position": 49}, {"bytes_per_position": 48, "temperatures": [1.0]}):
        values["selection"] = change
        with pytest.raises(PlanMismatchError, match=r"selection\.bytes_per_position|selection\.temperatures"):
            adopted_floors(plan_cache(parse_recipe(values), Silent()), first.directory)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("years of work")
    with pytest.raises(CacheError, match="neither empty nor a cache"):
        adopted_floors(planned, tmp_path / "thesis")


def test_one_floor_serves_every_temperature(measured):
    planned, sample = measured
    for temperatures in ((1.0,), (0.7, 1.0, 3.0)):
        changes = {"bytes_per_position": 40.0, "temperatures": temperatures, "floors": (0.5,) * len(temperatures)}
        selection = planned.plan.selection.model_copy(update=changes)
        asking = dataclasses.replace(planned, plan=planned.plan.model_copy(update={"selection": selection}))
        found = find_floors(asking, sample, progress=Silent())
        assert len(found.plan.selection.floors) == len(temperatures)
        assert len(set(found.plan.selection.floors)) == 1
        assert bytes_per_position(found, sample) == pytest.approx(40.0, rel=0.02)
