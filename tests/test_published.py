"""The recipes of published size, as they are, with the Hub's endpoints served on loopback: every name, split and column in them is
asked for as it would be there. The models and data sets behind the names are small stand-ins (`tests.stand_ins`)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.cache.hub_server import HubServer
from tests.stand_ins import fill

ROOT = Path(__file__).parent.parent
RECIPES = [
    path.relative_to(ROOT).as_posix()
    for folder in (".", "start", "tasks", "chains")
    for path in sorted((ROOT / "recipes" / folder).glob("*.yaml"))
    if "embedded" not in yaml.safe_load(path.read_text()) and path.stem != "embedded"
]
# What the stand-ins are too small for, or would take long: of the cache from which the training is predicted.
SMALLER = {
    "recipes/llama-3.1-8b-gsm8k-self.yaml": [
        "data.generate.max_new_tokens=8", "data.train.split=train[:40]", "data.validation.split=train[40:44]",
    ],
    "recipes/llama-3.2-1b-fineweb.yaml": ["data.token_budget=2k"],
}  # fmt: skip


@pytest.fixture(scope="module")
def found(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    with HubServer() as hub:
        fill(hub, models / "teacher", folder / "models")
        environment = {
            **os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "0", "COLUMNS": "200",
            "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": str(ROOT),
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "tests.published_dry_runs", str(folder / "caches")],
            input=json.dumps({recipe: SMALLER.get(recipe, []) for recipe in RECIPES}),
            capture_output=True, text=True, env=environment, cwd=ROOT,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-4000:]
        assert hub.unknown == []
    commits = {name.removeprefix("models/"): r.commits[-1][0] for name, r in hub.repositories.items()}
    return json.loads(done.stdout), commits


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_published_recipe_passes_its_dry_runs(found, recipe):
    found, _ = found
    for command, code, said in found[recipe]:
        assert code == 0, f"{command}: {said[-2000:]}"
    if "chains" in recipe:
        assert "Qwen2.5-3B-Instruct of 3b" in found[recipe][0][2]
        return
    assert "the whole run is predicted to take" in found[recipe][0][2]
    if "tasks" not in recipe:
        assert "student     " in found[recipe][-1][2]


def test_a_student_is_made_from_the_published_layers(found):
    found, _ = found
    said = found["recipes/llama-3.2-1b-fineweb.yaml"][-1][2]
    assert "layers 0, 2, 4, 6, 8, 10, 12, 15 of the 16 of Llama-3.2-1B" in said
    assert "student     LlamaForCausalLM of 8 layers" in said
    said = found["recipes/llama-3.1-8b-gsm8k-self.yaml"][-1][2]
    assert "nf4" in said.lower()


def test_a_cache_names_the_commit_of_its_teacher(found):
    found, commits = found
    for recipe, name in (
        ("recipes/llama-3.2-1b-fineweb.yaml", "meta-llama/Llama-3.2-1B"),
        ("recipes/qwen2.5-3b-to-0.5b.yaml", "Qwen/Qwen2.5-3B-Instruct"),
    ):
        assert found[recipe][2] == ["commit", 0, commits[name]]
