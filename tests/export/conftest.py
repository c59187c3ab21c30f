"""A finished QLoRA run, a fully trained one, and one of a student that was made, all tiny."""

import copy
import shutil

import pytest

from kdcache.recipe import parse_recipe
from kdcache.student.distill import distill


def trained(base_values, shared_cache, output, **student):
    values = copy.deepcopy(base_values)
    values["output"] = str(output)
    values["cache"]["directory"] = str(shared_cache)
    values["student"] |= student
    values["training"] |= {"max_steps": 4, "learning_rate": 5e-2 if student.get("lora", 1) else 1e-3}
    return distill(parse_recipe(values)).output


@pytest.fixture(scope="session")
def qlora_run(base_values, shared_cache, tmp_path_factory):
    """A student on a 4-bit base whose adapter has learnt something."""
    output = tmp_path_factory.mktemp("qlora") / "student"
    return trained(base_values, shared_cache, output, quantization="nf4", dtype="bfloat16")


@pytest.fixture(scope="session")
def full_run(base_values, shared_cache, tmp_path_factory):
    """A student with every weight trained."""
    return trained(base_values, shared_cache, tmp_path_factory.mktemp("full") / "student", lora=None)


@pytest.fixture(scope="session")
def made_run(base_values, shared_cache, models, tmp_path_factory):
    """An adapter on a student with one layer of its source left; the source is gone."""
    place = tmp_path_factory.mktemp("made")
    source = shutil.copytree(models / "student", place / "source")
    init = {"method": "drop_layers", "layers": [1]}
    output = trained(base_values, shared_cache, place / "student", model=str(source), init=init)
    shutil.rmtree(source)
    return output
