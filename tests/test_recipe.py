"""Recipes: strict, explained, documented; the shipped ones say what was published."""

from pathlib import Path

import pytest

from kdcache.errors import RecipeError
from kdcache.recipe import Recipe, load_recipe, parse_recipe
from kdcache.recipe_keys import recipe_keys
from kdcache.recipe_yaml import read_values

ROOT = Path(__file__).parent.parent
RECIPES = sorted(p for folder in (".", "start", "tasks") for p in (ROOT / "recipes" / folder).glob("*.yaml"))
MINIMAL = {"output": "o", "cache": {"directory": "c"}}


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
def test_shipped_recipes_load(path):
    recipe = load_recipe(path)
    assert recipe.student is not None
    assert recipe.teacher is not None


def test_the_reference_experiment_is_as_published():
    r = load_recipe(ROOT / "recipes/qwen2.5-3b-to-0.5b.yaml")
    assert (r.teacher.model, r.teacher.quantization) == ("Qwen/Qwen2.5-3B-Instruct", "nf4")
    assert (r.student.model, r.student.quantization) == ("Qwen/Qwen2.5-0.5B-Instruct", "nf4")
    assert (r.student.lora.r, r.student.lora.alpha, r.student.lora.dropout) == (16, 32, 0.05)
    assert (r.loss.ce_weight, r.loss.kd_weight, r.loss.temperature) == (0.5, 0.5, 2.0)
    t = r.training
    assert (t.learning_rate, t.epochs, t.clip, t.optimizer) == (2e-4, 3.0, 0.5, "paged_adamw_8bit")
    assert t.gradient_checkpointing
    assert r.data.max_length == 512
    assert [(s.path, s.split) for s in (r.data.train, r.data.validation)] == [
        ("yahma/alpaca-cleaned", "train[:5%]"),
        ("yahma/alpaca-cleaned", "train[5%:6%]"),
    ]
    best = load_recipe(ROOT / "recipes/qwen2.5-3b-to-0.5b-best.yaml")
    changed = {"output": best.output, "training": best.training}
    assert best == r.model_copy(update=changed)
    assert best.training == r.training.model_copy(update={"learning_rate": 1e-4})


def test_overrides_are_yaml_and_reach_any_key():
    recipe = load_recipe(
        RECIPES[0],
        [
            "loss.temperature=4",
            "training.learning_rate=1e-4",
            "student.lora.targets=[q_proj, v_proj]",
            "training.clip=null",
        ],
    )
    assert recipe.loss.temperature == 4.0
    assert recipe.training.learning_rate == 1e-4
    assert recipe.student.lora.targets == ["q_proj", "v_proj"]
    assert recipe.training.clip is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": {"temprature": 2}}, r"unknown recipe key loss\.temprature; did you mean loss\.temperature\?"),
        ({"lambda": 1}, "unknown recipe key lambda"),
        (
            {"data": {"columns": {"instuction": "a"}}},
            r"unknown recipe key data\.columns\.instuction; did you mean data\.columns\.instruction\?",
        ),
        (
            {"data": {"columns": {"x": "a"}}},
            r"unknown recipe key data\.columns\.x; data\.columns takes 'instruction', 'input'",
        ),
        ({"loss": {"temperature": -1}}, r"recipe key loss\.temperature should be above 0 and at most 100, found -1"),
        ({"loss": {"temperature": float("nan")}}, r"loss\.temperature"),
        ({"loss": {"ce_weight": 0, "kd_weight": 0}}, r"loss\.ce_weight and loss\.kd_weight are both 0"),
        ({"selection": {"floor": 0.1}}, r"unknown recipe key selection\.floor; did you mean selection\.floors\?"),
        ({"selection": {"method": "top_k", "floors": [0.1, 0.1]}}, r"selection\.floors is for the threshold methods"),
        ({"selection": {"floors": [0.1]}}, r"selection\.floors has 1 values for 2 selection\.temperatures"),
        ({"selection": {"floors": [0.1, 1e-9]}}, r"selection\.floors should lie between 0\.0001 and 1"),
        (
            {"selection": {"method": "top_k", "bytes_per_position": 9}},
            r"selection\.bytes_per_position is for the threshold",
        ),
        (
            {"selection": {"bytes_per_position": 9, "floors": [0.1, 0.1]}},
            r"selection\.bytes_per_position is for .* without",
        ),
        ({"selection": {"method": "random_sampling"}}, r"random_sampling draws at one temperature"),
        ({"selection": {"tail_logits": False}}, r"selection\.tail_logits false goes with threshold_sampling at one"),
        ({"selection": {"temperatures": [1.0, 200.0]}}, r"selection\.temperatures"),
        ({"selection": {"quantile": 0.5}}, r"selection\.quantile above 0 goes with selection\.positions"),
        ({"selection": {"positions": "loss"}}, r"selection\.positions loss needs selection\.quantile above 0"),
        ({"selection": {"k": 5}}, r"selection\.k is for selection\.method top_k or threshold; leave it out"),
        ({"selection": {"draws": 5}}, r"selection\.draws is for selection\.method random_sampling; leave it out"),
        ({"selection": {"temperatures": 2.0}}, r"selection\.temperatures should be a list, such as \[2\.0\]"),
        ({"loss": {"tail": "renormalised", "divergence": "jsd"}}, r"loss\.divergence jsd needs the mass outside"),
        ({"selection": {"temperatures": [2.0, 1.0]}}, r"selection\.temperatures should be positive and rise"),
        ({"student": {"model": "m", "lora": None}}, r"student\.lora is null .* needs student\.quantization none"),
        ({"training": {"warmup": 1.5}}, r"training\.warmup"),
        ({"training": {"batch_size": "many"}}, r"training\.batch_size: .*found 'many'"),
        ({"output": None}, "recipe key output"),
    ],
)
def test_bad_values_name_the_key_and_the_way_out(change, message):
    with pytest.raises(RecipeError, match=message):
        parse_recipe({**MINIMAL, **change})


def test_missing_keys_files_and_broken_yaml(tmp_path):
    with pytest.raises(RecipeError, match="lacks output"):
        parse_recipe({"cache": {"directory": "c"}})
    with pytest.raises(RecipeError, match="no recipe at"):
        load_recipe(tmp_path / "none.yaml")
    for text, message in (
        ("a: [", "not YAML"),
        ("- 1", "mapping"),
        ("output: a\noutput: b", "stands twice"),
        ("a: !!python/object:os.system x", "not YAML"),
    ):
        (tmp_path / "r.yaml").write_text(text)
        with pytest.raises(RecipeError, match=message):
            load_recipe(tmp_path / "r.yaml")
    for override in ("loss.temperature", "=3", "output.x=1"):
        with pytest.raises(RecipeError, match="override"):
            load_recipe(RECIPES[0], [override])


def test_every_key_is_documented_where_users_look():
    page = (ROOT / "recipes/README.md").read_text()
    for key, (default, description) in recipe_keys(Recipe).items():
        assert description, key
        line = f"| `{key}` | {'required' if default is ... else f'`{default!r}`'} | {description} |"
        assert line in page, f"recipes/README.md lacks: {line}"


@pytest.mark.parametrize(
    "selection",
    [
        {"method": "top_k", "k": 5},
        {"floors": [0.1, 0.1]},
        {"method": "random_sampling", "draws": 9, "temperatures": [1.0]},
    ],
)
def test_a_recorded_recipe_can_be_read_again(selection):
    """run.json states every key, those that the method does not use too."""
    recipe = parse_recipe({**MINIMAL, "selection": selection})
    assert parse_recipe(recipe.model_dump(mode="json")) == recipe


def written(folder, **files):
    """Recipe files, one for each keyword."""
    for name, text in files.items():
        path = folder / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def test_a_recipe_is_laid_over_its_base(tmp_path):
    written(
        tmp_path,
        first="output: o\ncache: {directory: runs/c}\nloss: {temperature: 2, ce_weight: 0.2}\ntraining: {report_to: [a, b]}\n",
    )
    written(tmp_path / "deep", second="base: ../first.yaml\nloss: {temperature: 1}\ntraining: {report_to: [c]}\n")
    written(tmp_path / "deep", third="base: second.yaml\noutput: p\nloss: {kd_weight: 1}\nselection: null\n")
    values = read_values(tmp_path / "deep/third.yaml", ["loss.beta=0.3"])
    assert values == {
        "output": "p",
        # Relative to the working directory, wherever the file lies.
        "cache": {"directory": "runs/c"},
        "loss": {"temperature": 1, "ce_weight": 0.2, "kd_weight": 1, "beta": 0.3},
        "training": {"report_to": ["c"]},
        "selection": None,
    }
    assert "base" not in load_recipe(tmp_path / "deep/second.yaml").model_dump()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: here.yaml\n", r"is based on itself: here\.yaml -> here\.yaml"),
        ("base: other.yaml\n", r"is based on itself: here\.yaml -> other\.yaml -> here\.yaml"),
        ("base: nowhere.yaml\n", r"no recipe at .*nowhere\.yaml; .*here\.yaml names it as its base"),
        ("base: list.yaml\n", r"list\.yaml should be a mapping"),
        ("base: broken.yaml\n", r"broken\.yaml is not YAML"),
        ("base: [a]\n", r"base should be the path of another recipe.*found \['a'\]"),
        ("base: null\n", "base should be the path of another recipe"),
        ("base: .\n", "cannot read the recipe"),
    ],
)
def test_bad_bases_are_explained(tmp_path, text, message):
    written(tmp_path, here=text, other="base: here.yaml\n", list="[1]\n", broken="a: [\n")
    with pytest.raises(RecipeError, match=message):
        load_recipe(tmp_path / "here.yaml")


def test_base_is_a_key_of_files_alone():
    with pytest.raises(RecipeError, match="unknown recipe key base"):
        parse_recipe({**MINIMAL, "base": "x"})


def test_a_section_that_is_no_section_is_named():
    with pytest.raises(RecipeError, match=r"^recipe key training: .*found None$"):
        parse_recipe({**MINIMAL, "training": None})
