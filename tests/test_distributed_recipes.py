"""What lies in recipes/distributed is what accelerate, DeepSpeed's integration and bash take, and its README names all of it."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from typer.testing import CliRunner

from kdcache.cli import app

FOLDER = Path(__file__).parent.parent / "recipes/distributed"
ENGINES = {
    "ddp": "MULTI_GPU",
    "ddp-multi-node": "MULTI_GPU",
    "fsdp": "FSDP",
    "zero2": "DEEPSPEED",
    "zero3": "DEEPSPEED",
}
DEEPSPEED_KEYS = {
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping", "bf16", "fp16",
    "zero_optimization", "zero_allow_untested_optimizer",
}  # fmt: skip


def test_the_readme_names_every_file():
    files = {p.name for p in FOLDER.iterdir()} - {"README.md"}
    assert files == {f"{n}.yaml" for n in ENGINES} | {
        "zero2.json",
        "zero3.json",
        "teacher-cache.sbatch",
        "train-student.sbatch",
    }
    named = set(re.findall(r"`([\w.-]+\.(?:yaml|json|sbatch))`", (FOLDER / "README.md").read_text()))
    assert files == named


@pytest.mark.parametrize("name", ENGINES)
def test_accelerate_knows_every_key(name):
    path = FOLDER / f"{name}.yaml"
    config = load_config_from_file(str(path))  # refuses keys it does not know
    assert config.distributed_type == ENGINES[name]
    options = {action.dest for action in launch_command_parser()._actions}
    section = yaml.safe_load(path.read_text()).get(f"{ENGINES[name].lower()}_config", {})
    assert set(section) <= options


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_files_say_their_stage_and_leave_the_recipe_its_keys(stage):
    text = (FOLDER / f"zero{stage}.json").read_text()
    values = json.loads(text)
    assert set(values) == DEEPSPEED_KEYS
    config = HfDeepSpeedConfig(values)
    assert config.get_value("zero_optimization.stage") == stage
    assert config.is_zero3() == (stage == 3)
    for key in ("train_batch_size", "gradient_accumulation_steps", "gradient_clipping"):
        assert values[key] == "auto"
    launched = yaml.safe_load((FOLDER / f"zero{stage}.yaml").read_text())["deepspeed_config"]["deepspeed_config_file"]
    assert launched == f"recipes/distributed/zero{stage}.json"


@pytest.mark.parametrize("name", ["teacher-cache", "train-student"])
def test_batch_scripts_are_bash_and_start_a_command_there_is(name):
    path = FOLDER / f"{name}.sbatch"
    checked = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
    assert re.search(rf"kdcache {name} ", path.read_text())
    assert CliRunner().invoke(app, [name, "--help"]).exit_code == 0
    # Without a recipe they end before anything is started.
    ran = subprocess.run(["bash", str(path)], capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    assert "give a recipe" in ran.stderr
