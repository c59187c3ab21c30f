"""Students that are made: some layers of a model, random weights at a size, a copy of the teacher."""

import copy
import json
import shutil

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from kdcache import cli
from kdcache.cache.reader import open_cache
from kdcache.chain.stages import expand as stages_of
from kdcache.errors import KdcacheError, ModelError, RecipeError
from kdcache.evaluate.evaluation import Wanted, evaluate
from kdcache.evaluate.inference import InferenceBench
from kdcache.evaluate.perplexity import student_score
from kdcache.evaluate.saved_run import Students, open_saved_run, score_saved_run
from kdcache.evaluate.saved_student import refuse_missing_student
from kdcache.models import load_model
from kdcache.recipe import parse_recipe
from kdcache.recipe_student import InitSection, StudentSection, parse_size
from kdcache.run_record import BEFORE
from kdcache.student import assembly, initial, layers, start
from kdcache.student.assembly import load_student, tell_of_init
from kdcache.student.distill import check_student, distill
from kdcache.student.estimate import estimate_training
from kdcache.student.initial import kept_layers, made_config, make_student, read_source
from kdcache.student.kept import Kept
from kdcache.student.layers import drop_layers, refuse_undescribed, shortened_config
from kdcache.student.shapes import Shape, alternatives, count
from kdcache.summary import training_lines
from kdcache.sweep.rows import expand as rows_of
from kdcache.token_maps import load_tokenizer
from tests.told import Told

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": 2,
}
FAMILIES = {
    "llama": lambda **k: transformers.LlamaConfig(**SHAPE, **k),
    "qwen2": lambda **k: transformers.Qwen2Config(**SHAPE, **k),
    # From layer 3 on attention sees the last four tokens alone.
    "qwen2 sliding": lambda **k: transformers.Qwen2Config(
        **SHAPE, use_sliding_window=True, sliding_window=4, max_window_layers=3, **k
    ),
}
LLAMA_1B = transformers.LlamaConfig(
    vocab_size=128256,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=64,
    tie_word_embeddings=True,
)


@pytest.fixture
def source(tmp_path, models, request):
    """A tiny model folder with a tokenizer."""
    family, tied = request.param
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES[family](tie_word_embeddings=tied))
    for parameter in model.parameters():  # biases and norms as well, so that a swapped one is seen
        parameter.data.normal_(0.0, 0.3)
    model.eval().save_pretrained(tmp_path / "source")
    load_tokenizer(str(models / "student")).save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def section(folder, init, **changes):
    values = {"model": str(folder), "quantization": "none", "dtype": "float32", "device": "cpu", "init": init}
    if init.get("method") == "scale":
        init.setdefault("seed", 0)
    return StudentSection.model_validate(values | changes)


def through_layers(model, ids, kept):
    """Logits of some layers of a whole model, by hand."""
    inner, length = model.model, ids.shape[1]
    hidden = inner.embed_tokens(ids)
    positions = torch.arange(length)[None]
    back = torch.arange(length)[:, None] - torch.arange(length)[None]
    for i in kept:
        layer = inner.layers[i]
        window = getattr(layer.self_attn, "sliding_window", None) or length
        mask = torch.where((back >= 0) & (back < window), 0.0, -torch.inf)[None, None]
        hidden = layer(
            hidden, attention_mask=mask, position_embeddings=inner.rotary_emb(hidden, positions), position_ids=positions
        )
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
    return model.lm_head(inner.norm(hidden))


ALL = pytest.mark.parametrize(
    "source",
    [(f, tied) for f in FAMILIES for tied in (True, False)],
    indirect=True,
    ids=lambda p: f"{p[0]} tied={p[1]}",
)


@ALL
@pytest.mark.parametrize("init", [{"every": 2}, {"layers": [1, 3, 4]}], ids=["every", "named"])
def test_a_layer_dropped_model_is_its_layers_and_nothing_else(source, tmp_path, init):
    student = section(source, {"method": "drop_layers", **init})
    kept = kept_layers(student.init, 5, "source")
    whole = load_model(str(source), dtype="float32", device="cpu")
    ids = torch.arange(3, 15)[None] * 7 % 128
    with torch.no_grad():
        wanted = through_layers(whole, ids, kept)
    make_student(student, tmp_path / "made")
    made = load_model(str(tmp_path / "made"), dtype="float32", device="cpu")
    drop_layers(whole, kept)  # in place, without the way over a folder
    for model in (made, whole):
        with torch.no_grad():
            assert torch.allclose(model(input_ids=ids).logits, wanted, atol=1e-5)
        assert model.config.num_hidden_layers == 3
        assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2]
        # Keys and values that are remembered are found by the layer's number.
        texts = [
            model.generate(
                input_ids=ids, do_sample=False, max_new_tokens=6, min_new_tokens=6, use_cache=c, pad_token_id=0
            )
            for c in (True, False)
        ]
        assert torch.equal(*texts)
    assert sum(p.numel() for p in made.parameters()) == count(made_config(read_source(student), student)).total
    assert load_tokenizer(str(tmp_path / "made")).get_vocab() == load_tokenizer(str(source)).get_vocab()
    assert made.config.tie_word_embeddings == whole.config.tie_word_embeddings


def test_lists_with_one_item_per_layer_keep_those_that_stay():
    config = FAMILIES["qwen2 sliding"]()
    short = shortened_config(config, (0, 2, 4))
    assert short.layer_types == ["full_attention", "full_attention", "sliding_attention"]
    assert (short.num_hidden_layers, short.max_window_layers) == (3, 2)
    assert config.num_hidden_layers == 5  # the one given stays as it is
    unlimited = transformers.Qwen2Config(**SHAPE)
    assert shortened_config(unlimited, (0, 4)).max_window_layers == unlimited.max_window_layers


@pytest.mark.parametrize(
    ("layers", "every", "kept"),
    [
        (16, 2, (0, 2, 4, 6, 8, 10, 12, 15)),
        (7, 2, (0, 2, 4, 6)),
        (4, 3, (0, 3)),
        (3, 2, (0, 2)),
        (5, 4, (0, 4)),
        (24, 5, (0, 5, 10, 15, 23)),
    ],
)
def test_every_nth_layer_and_always_the_first_and_the_last(layers, every, kept):
    found = kept_layers(InitSection(method="drop_layers", every=every), layers, "m")
    assert found == kept
    assert len(found) == -(-layers // every)


def test_the_published_student_has_the_published_size():
    kept = kept_layers(InitSection(method="drop_layers", every=2), 16, "Llama-3.2-1B")
    assert len(kept) == 8
    assert count(LLAMA_1B).total == 1_235_814_400
    assert count(shortened_config(LLAMA_1B, kept)).total == 749_242_368
    assert count(LLAMA_1B).embedding == count(LLAMA_1B).head == 128256 * 2048


@pytest.mark.parametrize("size", [30_000_000, 50_000_000, 250_000_000, 750_000_000])
def test_shapes_of_a_size_have_that_size(size):
    qwen = transformers.Qwen2Config(
        vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    for source in (qwen, LLAMA_1B):
        found = alternatives(source, size, "m")
        depths = [s.num_hidden_layers for s in found.shapes]
        assert depths == sorted(depths, reverse=True)
        assert found.chosen in found.shapes
        for shape in found.shapes:
            config = initial.scaled_config(source, shape, "m")
            assert abs(count(config).total / size - 1) <= 0.05, shape
            assert shape.hidden_size // shape.num_attention_heads == 64
            assert shape.num_attention_heads % shape.num_key_value_heads == 0


@pytest.mark.parametrize("source", [("qwen2", True)], indirect=True)
def test_a_scaled_student_is_a_function_of_its_seed(source, tmp_path):
    init = {"method": "scale", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    weights = {}
    for name, seed, dtype in (("a", 3, "float32"), ("b", 3, "bfloat16"), ("c", 4, "float32")):
        torch.manual_seed(hash(name) % 1000)  # whatever has been drawn before
        before = torch.get_rng_state()
        make_student(section(source, {**init, "seed": seed}, dtype=dtype), tmp_path / name)
        assert torch.equal(torch.get_rng_state(), before)
        weights[name] = (tmp_path / name / "model.safetensors").read_bytes()
    assert weights["a"] == weights["b"] != weights["c"]
    config = transformers.AutoConfig.from_pretrained(tmp_path / "a")
    assert Shape.of(config) == Shape(16, 64, 2, 2, 2)  # what is left out is the source's
    assert (config.model_type, config.vocab_size, len(config.layer_types)) == ("qwen2", 128, 2)


def test_sizes_are_read_as_people_write_them():
    assert [parse_size(t) for t in ("50M", "0.5B", "1000", " 12 k", "3b")] == [
        50_000_000, 500_000_000, 1000, 12_000, 3_000_000_000,
    ]  # fmt: skip
    for init in ({"parameters": "50M"}, {"parameters": 50_000_000}, {"parameters": 5e7}):
        assert InitSection(method="scale", **init).parameters == 50_000_000
    for text in ("", "M", "-5M", "5MB", "five", "1e3x"):
        with pytest.raises(ValueError, match="should look like 50M"):
            parse_size(text)


MINIMAL = {"output": "o", "cache": {"directory": "c"}}


@pytest.mark.parametrize(
    ("init", "message"),
    [
        ({}, r"the recipe lacks student\.init\.method"),
        ({"method": "prune"}, r"student\.init\.method"),
        ({"method": "drop_layers"}, r"needs student\.init\.every or student\.init\.layers"),
        ({"method": "drop_layers", "every": 2, "layers": [0]}, r"needs student\.init\.every or"),
        ({"method": "drop_layers", "every": 1}, r"student\.init\.every: .*greater than or equal to 2"),
        ({"method": "drop_layers", "layers": []}, r"in rising order, none of them twice, found \[\]"),
        ({"method": "drop_layers", "layers": [0, 2, 2]}, r"none of them twice, found \[0, 2, 2\]"),
        ({"method": "drop_layers", "layers": [2, 0]}, r"in rising order"),
        ({"method": "drop_layers", "layers": [-1, 0]}, r"should name layers from 0 on"),
        ({"method": "drop_layers", "every": 2, "parameters": "5M"}, r"student\.init\.parameters is for .* scale"),
        ({"method": "drop_layers", "every": 2, "seed": 1}, r"student\.init\.seed is for student\.init\.method scale"),
        ({"method": "scale"}, r"needs either student\.init\.parameters or a shape"),
        ({"method": "scale", "parameters": "5M", "hidden_size": 64}, r"found both \(hidden_size\)"),
        ({"method": "scale", "parameters": 0}, r"student\.init\.parameters: .*greater than or equal to 1"),
        ({"method": "scale", "parameters": "2T"}, r"student\.init\.parameters: .*less than or equal to"),
        ({"method": "scale", "parameters": "big"}, r"should look like 50M"),
        ({"method": "scale", "hidden_size": 65, "num_attention_heads": 4}, r"hidden_size 65 is not a multiple of"),
        (
            {"method": "scale", "num_attention_heads": 6, "num_key_value_heads": 4},
            r"num_attention_heads 6 is not a multiple of student\.init\.num_key_value_heads 4",
        ),
        ({"method": "scale", "every": 2}, r"student\.init\.every is for student\.init\.method drop_layers"),
        ({"method": "teacher"}, r"needs the recipe section teacher"),
        (
            {"method": "drop_layers", "evry": 2},
            r"unknown recipe key student\.init\.evry; did you mean student\.init\.every",
        ),
    ],
)
def test_a_section_that_contradicts_itself_is_refused(init, message):
    with pytest.raises(RecipeError, match=message):
        parse_recipe({**MINIMAL, "student": {"model": "m", "init": init}})


def test_a_copy_of_the_teacher_names_the_teacher_and_everybody_else_a_model():
    teacher = {"model": "t", "revision": "r"}
    values = {**MINIMAL, "teacher": teacher, "student": {"init": {"method": "teacher"}}}
    recipe = parse_recipe(values)
    assert (recipe.student.model, recipe.student.revision, recipe.student.quantization) == ("t", "r", "nf4")
    assert parse_recipe(recipe.model_dump(mode="json")) == recipe
    for key in ("model", "revision"):
        with pytest.raises(RecipeError, match=rf"copies teacher\.{key} .* but student\.{key} is 'u'; leave it out"):
            parse_recipe({**values, "student": {"init": {"method": "teacher"}, key: "u"}})
    with pytest.raises(RecipeError, match=r"student\.init\.every is for student\.init\.method drop_layers"):
        parse_recipe({**values, "student": {"init": {"method": "teacher", "every": 2}}})
    for student in ({}, {"init": None}, {"init": {"method": "drop_layers", "every": 2}}):
        with pytest.raises(RecipeError, match=r"the recipe lacks student\.model"):
            parse_recipe({**values, "student": student})


def test_random_weights_take_the_recipes_seed_unless_they_have_their_own():
    student = {"model": "m", "init": {"method": "scale", "parameters": 5}}
    assert parse_recipe({**MINIMAL, "seed": 7, "student": student}).student.init.seed == 7
    student["init"]["seed"] = 3
    assert parse_recipe({**MINIMAL, "seed": 7, "student": student}).student.init.seed == 3


def test_rows_and_stages_with_a_seed_of_their_own_draw_other_random_weights():
    student = {"model": "m", "init": {"method": "scale", "parameters": 5}}
    needed = {**MINIMAL, "data": {"train": {"path": "a"}, "validation": {"path": "b"}}, "teacher": {"model": "t"}}
    stages = {"a": {"seed": 5}, "b": {"seed": 7, "student.init.seed": 1}, "c": {}}
    for own, seeds in ((None, ([0, 1, 2], [5, 1, 3])), (4, ([4, 4, 4], [4, 1, 4]))):
        student["init"]["seed"] = own
        recipe = parse_recipe({**needed, "student": student, "sweep": {"grid": {"seed": [0, 1, 2]}}})
        assert [row.recipe.student.init.seed for row in rows_of(recipe)] == seeds[0]
        recipe = parse_recipe({
            **needed, "seed": 3, "student": student, "chain": {"stages": stages, "direct": False}
        })  # fmt: skip
        assert [stage.recipe.student.init.seed for stage in stages_of(recipe)] == seeds[1]


@pytest.mark.parametrize("kept", [[0, 3, 4], [0, 1, 2, 4]])
def test_layers_that_the_configuration_numbers_otherwise_are_refused(tmp_path, models, kept, monkeypatch):
    """Layer 3 is without experts; loaded as another one it would start from random weights."""
    own = {"moe_intermediate_size": 8, "shared_expert_intermediate_size": 8, "num_experts": 4, "num_experts_per_tok": 2}
    config = transformers.Qwen2MoeConfig(**SHAPE, **own, mlp_only_layers=[3])
    torch.manual_seed(0)
    whole = transformers.AutoModelForCausalLM.from_config(config).eval()
    whole.save_pretrained(tmp_path / "moe")
    load_tokenizer(str(models / "student")).save_pretrained(tmp_path / "moe")
    # The first ones keep their numbers.
    student = section(tmp_path / "moe", {"method": "drop_layers", "layers": [0, 1, 2, 3]})
    make_student(student, tmp_path / "made")
    made = load_model(str(tmp_path / "made"), dtype="float32", device="cpu")
    drop_layers(whole, (0, 1, 2, 3))
    ids = torch.arange(3, 15)[None]
    assert torch.allclose(made(input_ids=ids).logits, whole(input_ids=ids).logits, atol=1e-5)
    monkeypatch.setattr(initial, "load_model", lambda *a, **k: pytest.fail("loaded"))
    student = section(tmp_path / "moe", {"method": "drop_layers", "layers": kept})
    for refuses in (initial.refuse_impossible, lambda s: make_student(s, tmp_path / "other")):
        with pytest.raises(
            ModelError, match=r"does not describe layers 0, .* should be .*, found .*; keep other layers"
        ):
            refuses(student)
    assert not (tmp_path / "other").exists()


def test_windows_of_attention_are_compared_as_well():
    config = transformers.Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=4, max_window_layers=3)
    refuse_undescribed(config, (0, 2, 4), "m")
    config.layer_types = ["full_attention"] * 3 + ["sliding_attention"] * 2
    config.max_window_layers = 3
    lost = copy.deepcopy(config)
    short = layers.shortened_config(lost, (0, 4))
    assert short.layer_types == ["full_attention", "sliding_attention"]
    short.layer_types = ["full_attention"] * 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers, "shortened_config", lambda *a: short)
        with pytest.raises(ModelError, match="sliding"):
            refuse_undescribed(config, (0, 4), "m")


@pytest.mark.parametrize("source", [("qwen2 sliding", True)], indirect=True)
@pytest.mark.parametrize(
    ("init", "message"),
    [
        ({"method": "drop_layers", "layers": [0, 5, 9]}, r"layers names 5, 9, but .* has 5 layers, 0 to 4"),
        ({"method": "drop_layers", "every": 5}, r"every should be less than the 5 layers of .*, found 5"),
        ({"method": "scale", "parameters": 100}, r"no model in the family of .* the smallest has"),
        ({"method": "scale", "hidden_size": 34}, r"hidden_size 34 is not a multiple of num_attention_heads 4 \(of "),
        ({"method": "scale", "num_key_value_heads": 3}, r"num_attention_heads 4 \(of .*is not a multiple of"),
        ({"method": "scale", "hidden_size": 20}, r"heads of an odd width"),
        ({"method": "scale", "num_hidden_layers": 3}, r"are not all alike \(layer_types: full_attention, sliding"),
    ],
)
def test_what_the_model_cannot_give_is_refused_before_its_weights_are_read(source, init, message, values, shared_cache):
    (source / "model.safetensors").unlink()
    values["cache"]["directory"] = str(shared_cache)
    values["student"] |= {"model": str(source), "init": init}
    for refuses in (distill, estimate_training, lambda recipe: check_student(recipe, Kept())):
        with pytest.raises(KdcacheError, match=message):
            refuses(parse_recipe(values))
    assert not (source.parent / "student").exists()


def test_families_that_are_not_known_well_enough_are_refused(tmp_path):
    transformers.GPT2Config(n_layer=2, n_embd=32, n_head=2).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ModelError, match="does not say intermediate_size, num_key_value_heads"):
        initial.refuse_impossible(section(tmp_path / "gpt2", {"method": "drop_layers", "every": 2}))
    quantised = FAMILIES["llama"]()
    quantised.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    quantised.save_pretrained(tmp_path / "nf4")
    with pytest.raises(ModelError, match="is stored quantised"):
        initial.refuse_impossible(section(tmp_path / "nf4", {"method": "drop_layers", "every": 2}))
    with pytest.raises(ModelError, match="does not exist"):
        initial.refuse_impossible(section(tmp_path / "none", {"method": "drop_layers", "every": 2}))


@pytest.fixture
def dropped(values, models, shared_cache):
    """Recipe values of a student of two of the teacher's four layers."""
    values["cache"]["directory"] = str(shared_cache)
    values["student"] |= {
        "model": str(models / "teacher"),
        "init": {"method": "drop_layers", "every": 2},
        "lora": {"r": 4, "dropout": 0.1},
    }
    values["training"] |= {"max_steps": 4, "save_steps": 2}
    return values


def weights_of(folder):
    return next(folder.glob("*model.safetensors")).read_bytes()


def test_an_adapter_on_a_quantised_made_base_can_be_used_by_everyone(dropped, tmp_path, models):
    """Trained, judged, gone on with, loaded by peft alone; also where the model it was made from is gone."""
    own = tmp_path / "own"
    shutil.copytree(models / "teacher", own)
    dropped["student"] |= {"model": str(own), "quantization": "nf4", "dtype": "bfloat16"}
    recipe = parse_recipe(dropped)
    record = distill(recipe)
    run = record.output
    base = run / "base"
    made = load_student(recipe.student.model_copy(update={"model": str(base), "init": None}))
    assert len(made.model.layers) == 2
    validation = open_cache(recipe.cache.directory).split("validation")
    wrapped = assembly.with_adapter(made, recipe.student)  # QLoRA takes norms and embeddings to float32
    again = student_score(wrapped, validation, batch_size=4)
    assert again.as_record() == record.values["scores"][BEFORE]
    shutil.rmtree(own)
    assert score_saved_run(run).scores == record.scores
    InferenceBench().check(run)
    adapter = peft.PeftConfig.from_pretrained(run / "model")
    assert adapter.base_model_name_or_path == str(base)
    person = peft.AutoPeftModelForCausalLM.from_pretrained(run / "model")
    assert person.generate(input_ids=torch.tensor([[5, 6, 7]]), max_new_tokens=2, pad_token_id=0).shape[1] > 3
    card = (run / "model" / "README.md").read_text()
    assert "Started from layers 0, 3 of the 4 of own" in card
    assert (
        record.values["parameters"]["total"] < count(transformers.AutoConfig.from_pretrained(models / "teacher")).total
    )
    shutil.rmtree(base)
    for reads in (lambda: refuse_missing_student(run, recipe.student), lambda: InferenceBench().check(run)):
        with pytest.raises(ModelError, match="has lost the student that it made to start from"):
            reads()


def test_a_made_student_is_gone_on_with_in_the_same_bytes(dropped, tmp_path):
    whole = distill(parse_recipe(dropped)).output
    dropped["output"] = str(tmp_path / "stopped")
    stopped = distill(parse_recipe(dropped)).output
    for path in ("checkpoints/checkpoint-4", "model"):
        shutil.rmtree(stopped / path)
    (stopped / "run.json").unlink()
    distill(parse_recipe(dropped), resume=True)
    assert weights_of(stopped / "model") == weights_of(whole / "model")
    assert weights_of(stopped / "base") == weights_of(whole / "base")
    # A folder that was lost is made again.
    shutil.rmtree(stopped / "base")
    shutil.rmtree(stopped / "checkpoints" / "checkpoint-4")
    (stopped / "run.json").unlink()
    distill(parse_recipe(dropped), resume=True)
    assert weights_of(stopped / "model") == weights_of(whole / "model")


def unfinish(run):
    """As a run that was stopped after its checkpoint of step 2."""
    for path in ("checkpoints/checkpoint-4", "model"):
        shutil.rmtree(run / path)
    (run / "run.json").unlink()


@pytest.fixture
def own(dropped, models, tmp_path):
    """A copy of the model that the student is made from, which may change."""
    shutil.copytree(models / "teacher", tmp_path / "own")
    dropped["student"]["model"] = str(tmp_path / "own")
    return tmp_path / "own"


def change(folder):
    """Other weights in the same folder."""
    torch.manual_seed(5)
    weights = {n: w + 0.05 * torch.randn_like(w) for n, w in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def test_what_was_made_for_a_failed_overwrite_is_no_part_of_the_run_that_goes_on(dropped, monkeypatch):
    run = distill(parse_recipe(dropped)).output
    before, adapter = weights_of(run / "base"), weights_of(run / "model")
    unfinish(run)
    other = copy.deepcopy(dropped)
    other["student"]["init"] = {"method": "drop_layers", "layers": [0, 1]}

    def fail(*args, **kwargs):
        raise ModelError("no room")

    with monkeypatch.context() as patch:
        patch.setattr("kdcache.student.kept.load_student", fail)
        with pytest.raises(ModelError, match="no room"):
            distill(parse_recipe(other), overwrite=True)
    assert (run / "base.new").is_dir()
    record = distill(parse_recipe(dropped), resume=True)
    assert weights_of(run / "base") == before
    assert weights_of(run / "model") == adapter
    assert not (run / "base.new").exists()
    assert score_saved_run(run).scores == record.scores


@pytest.mark.usefixtures("models")
def test_runs_whose_source_changed_in_between_share_no_student(dropped, own):
    """One recipe, two students: neither an evaluation nor a process that trains both takes one for the other."""
    first = distill(parse_recipe(dropped)).output
    change(own)
    unfinish(first)
    kept, second = Kept(), {**dropped, "output": dropped["output"] + "2"}
    # The first goes on from the folder that it has, the second is made from what the model is now.
    one, two = (distill(parse_recipe(v), resume=v is dropped, kept=kept) for v in (dropped, second))
    assert weights_of(one.output / "base") != weights_of(two.output / "base")
    assert one.scores[BEFORE] != two.scores[BEFORE]
    found = [evaluation.values["scores"] for evaluation in evaluate([one.output, two.output], Wanted())]
    for record, scores in zip((one, two), found, strict=True):
        assert score_saved_run(record.output).scores == record.scores
        for name, score in record.values["scores"].items():
            assert scores[name]["perplexity"] == score["perplexity"], name


def test_a_lost_student_is_made_again_only_as_it_was(dropped, own):
    run = distill(parse_recipe(dropped)).output
    unfinish(run)
    shutil.move(run / "base", run.parent / "kept")
    change(own)
    step = run / "checkpoints" / "checkpoint-2"
    with pytest.raises(
        ModelError, match=r"has lost the student that its checkpoints belong to .*bring back that folder or"
    ):
        distill(parse_recipe(dropped), resume=True)
    assert step.is_dir()
    assert not (run / "base").exists()
    shutil.move(run.parent / "kept", run / "base")
    record = distill(parse_recipe(dropped), resume=True)
    assert score_saved_run(run).scores == record.scores
    # A new start makes what the model is now.
    before = weights_of(run / "base")
    distill(parse_recipe(dropped), overwrite=True)
    assert weights_of(run / "base") != before


def test_random_weights_that_come_out_otherwise_do_not_replace_a_lost_student(dropped, models, monkeypatch):
    dropped["student"] |= {
        "model": str(models / "student"), "init": {"method": "scale", "num_hidden_layers": 1}, "lora": None
    }  # fmt: skip
    run = distill(parse_recipe(dropped)).output
    unfinish(run)
    shutil.rmtree(run / "base")
    make = start.make_student

    def other(student, folder):  # as another version of torch may draw
        make(student.model_copy(update={"init": student.init.model_copy(update={"seed": 99})}), folder)

    with monkeypatch.context() as patch:
        patch.setattr(start, "make_student", other)
        with pytest.raises(ModelError, match="has lost the student that its checkpoints belong to"):
            distill(parse_recipe(dropped), resume=True)
    assert distill(parse_recipe(dropped), resume=True).values["steps"] == 4


def test_full_training_of_made_students(dropped, models):
    for name, init, model in (
        ("dropped", {"method": "drop_layers", "layers": [0, 1, 3]}, "teacher"),
        ("scaled", {"method": "scale", "parameters": "0.3M"}, "student"),
    ):
        own = copy.deepcopy(dropped)
        own["output"] += name
        own["student"] |= {"lora": None, "init": init, "model": str(models / model)}
        recipe = parse_recipe(own)
        record = distill(recipe)
        assert record.values["parameters"]["trainable"] == record.values["parameters"]["total"]
        config = read_source(recipe.student.model_copy(update={"model": str(record.output / "model")}))
        assert Shape.of(config) == Shape.of(made_config(read_source(recipe.student), recipe.student))
        assert weights_of(record.output / "model") != weights_of(record.output / "base")
        assert score_saved_run(record.output).scores == record.scores
        run, students = open_saved_run(record.output), Students()
        with students.before(run) as before:
            twin = load_student(recipe.student)  # made again, without the run
            for a, b in zip(before.parameters(), twin.parameters(), strict=True):
                assert torch.equal(a, b)


def test_a_copy_of_the_teacher_learns_from_the_teacher(dropped, models):
    del dropped["student"]["model"]
    dropped["student"] |= {"init": {"method": "teacher"}, "quantization": "nf4", "dtype": "bfloat16"}
    recipe = parse_recipe(dropped)
    record = distill(recipe)
    assert not (record.output / "base").exists()
    scores = record.values["scores"]
    assert scores[BEFORE]["kl_to_teacher"] < 0.05
    assert scores[BEFORE]["kl_to_teacher"] != 0
    assert score_saved_run(record.output).scores == record.scores


def test_students_of_one_process_share_the_bytes_of_their_base(dropped, monkeypatch):
    made, make = [], start.make_student
    monkeypatch.setattr(start, "make_student", lambda *a: (made.append(1), make(*a))[1])
    kept, runs = Kept(), []
    for row in ("a", "b"):
        own = copy.deepcopy(dropped)
        own["output"] += row
        own["training"]["learning_rate"] = 1e-3 if row == "a" else 1e-4
        runs.append(distill(parse_recipe(own), kept=kept).output)
    assert made == [1]
    first, second = (run / "base" / "model.safetensors" for run in runs)
    assert first.stat().st_ino == second.stat().st_ino
    configs = [json.loads((run / "model" / "adapter_config.json").read_text()) for run in runs]
    assert [c["base_model_name_or_path"] for c in configs] == [str(run / "base") for run in runs]
    # Alone it would have ended the same.
    shutil.rmtree(runs[0] / "base")
    alone = copy.deepcopy(dropped)
    alone["output"] += "alone"
    alone["training"]["learning_rate"] = 1e-4
    assert weights_of(distill(parse_recipe(alone)).output / "model") == weights_of(runs[1] / "model")
    # Another student does not take it over.
    other = copy.deepcopy(dropped)
    other["output"] += "other"
    other["student"]["init"] = {"method": "drop_layers", "layers": [0, 1]}
    distill(parse_recipe(other), kept=kept)
    assert made == [1, 1, 1]


def test_an_earlier_run_is_forgotten_only_when_the_next_one_begins(dropped, monkeypatch):
    run = distill(parse_recipe(dropped)).output
    before = weights_of(run / "base")
    dropped["student"]["init"] = {"method": "drop_layers", "layers": [0, 1, 2]}

    def fail(*args, **kwargs):
        raise ModelError("no room")

    with monkeypatch.context() as patch:
        patch.setattr("kdcache.student.kept.load_student", fail)
        with pytest.raises(ModelError, match="no room"):
            distill(parse_recipe(dropped), overwrite=True)
    assert weights_of(run / "base") == before
    assert score_saved_run(run).scores  # still whole
    distill(parse_recipe(dropped), overwrite=True)
    assert weights_of(run / "base") != before
    assert not (run / "base.new").exists()
    # A student that is not made leaves none behind.
    dropped["student"]["init"] = None
    distill(parse_recipe(dropped), overwrite=True)
    assert not (run / "base").exists()


def test_what_was_made_for_a_training_that_never_began_is_no_obstacle(dropped, monkeypatch):
    def fail(*args, **kwargs):
        raise ModelError("no room")

    with monkeypatch.context() as patch:
        patch.setattr("kdcache.student.kept.load_student", fail)
        with pytest.raises(ModelError, match="no room"):
            distill(parse_recipe(dropped))
    assert distill(parse_recipe(dropped)).values["steps"] == 4


def test_a_dry_run_counts_the_student_that_will_be_made(dropped, monkeypatch):
    monkeypatch.setattr("kdcache.student.probe._ENOUGH_SECONDS", 0.0)
    dropped["student"] |= {"lora": None}
    recipe = parse_recipe(dropped)
    estimate = estimate_training(recipe)
    student = load_student(recipe.student)
    assert (estimate.layers, estimate.parameters.total) == (2, sum(p.numel() for p in student.parameters()))
    assert any("kept beside it" in line for line in training_lines(estimate))
    # Of a student that is not made nothing is built to count it.
    monkeypatch.setattr("kdcache.student.estimate.count", lambda *a: pytest.fail("counted"))
    dropped["student"]["init"] = None
    assert not any("kept beside it" in line for line in training_lines(estimate_training(parse_recipe(dropped))))


def test_depth_and_width_are_shown_alike_by_the_command_and_by_a_training(dropped, models, monkeypatch, capsys):
    model = str(models / "student")
    monkeypatch.setattr("sys.argv", ["kdcache", "student-shapes", model, "--parameters", "0.5M", "--context", "96"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 0
    shown = capsys.readouterr().out.splitlines()
    rows = [line for line in shown if line[:1] in "* " and line[1:].split()[0].isdigit()]
    assert len(rows) >= 2
    assert sum(line.startswith("*") for line in rows) == 1
    deepest = int(rows[0][1:].split()[0])
    assert any(f"{deepest} layers of" in line and "are the deepest" in line for line in shown)

    dropped["student"] |= {"model": model, "init": {"method": "scale", "parameters": "0.5M"}, "lora": None}
    dropped["data"] = dropped["teacher"] = None
    distill(parse_recipe(dropped), progress=(told := Told()))
    for line in shown:
        assert line in told.messages
    assert not any("random" in warning for warning in told.warnings)


def test_random_weights_of_which_few_are_trained_are_warned_of(dropped, models, shared_cache):
    dropped["student"] |= {"model": str(models / "student"), "init": {"method": "scale", "parameters": "0.5M"}}
    tell_of_init(parse_recipe(dropped), open_cache(shared_cache), told := Told())
    assert "they stay random" in told.warnings[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["STUDENT"], "needs a size"),
        (["STUDENT", "--parameters", "lots"], "--parameters: a number of parameters should look like 50M"),
        (["STUDENT", "--parameters", "0"], "--parameters should be at least 1"),
        (["STUDENT", "seed=1", "--parameters", "1M"], "seed=1 is a recipe key, but"),
        (["STUDENT", "--parameters", "9"], "the smallest has"),
        (["/nowhere/at/all", "--parameters", "1M"], "does not exist"),
    ],
)
def test_sizes_that_cannot_be_shown_are_one_error(models, monkeypatch, capsys, arguments, message):
    own = [str(models / "student") if a == "STUDENT" else a for a in arguments]
    monkeypatch.setattr("sys.argv", ["kdcache", "student-shapes", *own])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    assert message in capsys.readouterr().err
