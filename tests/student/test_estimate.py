"""What a dry run of a training says, held against the training itself."""

import copy

import bitsandbytes
import pytest
import torch
import transformers

from kdcache import cli
from kdcache.cache.reader import open_cache
from kdcache.errors import CacheError, RecipeError
from kdcache.models import load_model
from kdcache.recipe import parse_recipe
from kdcache.recipe_student import StudentSection
from kdcache.student import estimate as estimate_module
from kdcache.student.assembly import load_student, with_adapter
from kdcache.student.bench import Bench
from kdcache.student.collate import Collator
from kdcache.student.distill import distill
from kdcache.student.estimate import estimate_training
from kdcache.student.parameters import (
    count_parameters,
    optimizer_bytes,
    outline,
    read_config,
    untrained_bytes,
)
from kdcache.student.probe import PerLayer, probe, shortened, write_random
from kdcache.summary import duration, training_lines

LOSS = {"temperature": 2.0, "ce_weight": 0.5, "kd_weight": 0.5}


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    """Every micro-batch is timed once, and no more."""
    monkeypatch.setattr("kdcache.student.probe._ENOUGH_SECONDS", 0.0)


@pytest.fixture
def student(models):
    return {"model": str(models / "student"), "quantization": "none", "dtype": "bfloat16", "device": "cpu"}


@pytest.fixture
def own(values, shared_cache):
    values["cache"]["directory"] = str(shared_cache)
    return values


def counted(model):
    """Total and trained parameters of a loaded model, 4-bit ones as what they stand for."""
    sizes = [(p.quant_state.shape.numel() if hasattr(p, "quant_state") else p.numel(), p) for p in model.parameters()]
    return sum(n for n, _ in sizes), sum(n for n, p in sizes if p.requires_grad)


def held_bytes(model):
    """Weights of a loaded model with the constants of their quantisation."""
    total = 0
    for p in model.parameters():
        total += p.nbytes
        if hasattr(p, "quant_state"):
            total += p.quant_state.absmax.nbytes + p.quant_state.state2.absmax.nbytes
    return total


@pytest.mark.parametrize(
    "changes",
    [
        {"quantization": "nf4"},
        {"quantization": "int8"},
        {},
        {"lora": {"r": 4, "targets": ["q_proj", "down_proj"]}},
        {"lora": {"r": 4, "dora": True}},
        {"quantization": "nf4", "lora": {"r": 4, "dora": True}},
        {"lora": None, "dtype": "float32"},
    ],
    ids=["nf4", "int8", "lora", "targets", "dora", "nf4 dora", "full"],
)
def test_parameters_and_their_bytes_are_those_of_the_loaded_student(student, changes):
    section = StudentSection.model_validate(student | changes)
    p = count_parameters(outline(read_config(section), section), section, "sgd")
    real = with_adapter(load_student(section), section)
    assert (p.total, p.trained) == counted(real)
    assert p.gradient_bytes == sum(q.nbytes for q in real.parameters() if q.requires_grad)
    if section.quantization == "int8":  # whose row scales bitsandbytes keeps in places that vary
        rows = sum(m.weight.shape[0] for m in real.modules() if type(m) is bitsandbytes.nn.Linear8bitLt)
        assert p.base_bytes + p.adapter_bytes == held_bytes(real) + 4 * rows
    else:
        assert p.base_bytes + p.adapter_bytes == pytest.approx(held_bytes(real), rel=1e-4)


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_model_that_is_only_looked_at_takes_what_it_takes(student, quantization, dtype):
    section = StudentSection.model_validate(student | {"quantization": quantization, "dtype": dtype})
    real = load_model(section.model, quantization=quantization, dtype=dtype, device="cpu")
    assert untrained_bytes(section) == pytest.approx(held_bytes(real), rel=1e-3)


OPTIMIZERS = ["adamw_torch", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "lion_8bit", "rmsprop", "adagrad", "sgd", "adafactor"]  # fmt: skip


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("lora", [{"r": 40}, None], ids=["lora", "full"])
def test_the_optimizers_state_is_what_it_turns_out_to_be(student, tmp_path, name, lora):
    section = StudentSection.model_validate(
        student | {"lora": lora, "dtype": "float32" if lora is None else "bfloat16"}
    )
    predicted = count_parameters(outline(read_config(section), section), section, name).state_bytes
    model = with_adapter(load_student(section), section)
    arguments = transformers.TrainingArguments(str(tmp_path), optim=name, use_cpu=True, report_to=[])
    optimizer = transformers.Trainer(model=model, args=arguments).create_optimizer()
    ids = torch.arange(8)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    shared = ("step", "qmap1", "qmap2")
    found = [v for state in optimizer.state.values() for k, v in state.items() if k not in shared]
    assert predicted == pytest.approx(sum(v.nbytes for v in found if isinstance(v, torch.Tensor)), rel=0.01)


def test_a_state_that_is_not_known_is_not_guessed():
    assert optimizer_bytes("lomo", [torch.nn.Parameter(torch.zeros(4))]) is None


def test_steps_and_tokens_are_those_of_the_run_and_nothing_is_written(own, tmp_path):
    own["training"] |= {"epochs": 1.5, "batch_size": 3, "accumulation": 2, "save_steps": 100}
    recipe = parse_recipe(own)
    e = estimate_training(recipe)
    assert not (tmp_path / "student").exists()
    split = open_cache(own["cache"]["directory"])["train"]
    assert (e.tokens, e.positions) == (sum(len(s.token_ids) for s in split), sum(len(s.rows) for s in split))
    passes = []
    original = estimate_module.BatchPlan.span
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(estimate_module.BatchPlan, "span", lambda self, n: passes.append(n) or original(self, n))
        recipe = parse_recipe(own | {"training": own["training"] | {"workers": 0}})
        record = distill(recipe)
    assert e.steps == record.values["steps"]
    assert e.micro_batches == len(set(passes)) + sum(n < len(passes) - len(set(passes)) for n in set(passes))


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_two_layers_say_what_five_keep_for_the_backward_pass(own, student, tmp_path, checkpointing, quantization):
    own["training"]["gradient_checkpointing"] = checkpointing
    config = transformers.AutoConfig.from_pretrained(student["model"])
    config.num_hidden_layers, config.layer_types = 5, ["full_attention"] * 5
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "five")
    section = StudentSection.model_validate(student | {"model": str(tmp_path / "five"), "quantization": quantization})
    recipe = parse_recipe(own)
    cache = open_cache(own["cache"]["directory"])
    batch = Collator(cache.plan.tokenizer.pad_id, 2.0)([(i, cache["train"][i]) for i in range(4)])
    loss = {**LOSS, "vocab_size": cache.vocab_size}
    arguments = transformers.TrainingArguments(str(tmp_path / "out"), optim="adamw_torch", use_cpu=True, report_to=[])
    write_random(shortened(read_config(section), section), section, tmp_path / "two")
    measured = probe(recipe, section, tmp_path / "two", [batch], loss, arguments)
    model = with_adapter(load_student(section), section)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad])
    whole = Bench(model, optimizer, recipe.training, loss)
    assert measured.activation_bytes.at(5) == whole.saved(batch, 5)
    assert measured.activation_bytes.two > measured.activation_bytes.one > 0
    assert measured.largest == tuple(batch["input_ids"].shape)
    assert all(s.one > 0 for s in (measured.pass_seconds, measured.update_seconds, measured.score_seconds))


def test_recomputing_needs_less(own):
    kept = estimate_training(parse_recipe(own)).memory
    own["training"]["gradient_checkpointing"] = True
    assert estimate_training(parse_recipe(own)).memory["activations"] < kept["activations"]


def test_layers_add_up():
    assert PerLayer(3.0, 5.0).at(1) == 3.0
    assert PerLayer(3.0, 5.0).at(10) == 21.0
    assert PerLayer(3.0, 2.9).at(10) == 3.0  # noise: a layer never takes less than nothing


def test_times_are_told_in_seconds_minutes_and_hours():
    assert [duration(s) for s in (90, 1500, 3 * 86400)] == ["90 s", "25 min", "72.0 h"]


def test_what_is_cut_is_counted_as_cut(own):
    own["training"]["max_length"] = 30
    e = estimate_training(parse_recipe(own))
    split = open_cache(own["cache"]["directory"])["train"]
    # The sample is the whole of so small a split.
    assert e.tokens == sum(min(30, len(s.token_ids)) for s in split)
    assert e.positions == sum(int(s.targets[:30].sum()) for s in split)
    assert f"cut to 30 tokens, about {e.tokens:,} tokens" in "\n".join(training_lines(e))


def test_a_fraction_of_the_split_is_counted_as_one(own):
    whole = estimate_training(parse_recipe(own))
    own["training"]["fraction"] = 0.5
    half = estimate_training(parse_recipe(own))
    assert half.batches.sequences == round(whole.batches.sequences / 2)
    split = open_cache(own["cache"]["directory"])["train"][: half.batches.sequences]
    assert half.tokens == sum(len(s.token_ids) for s in split)  # the sample is all of it
    assert f"about {half.tokens:,} tokens" in "\n".join(training_lines(half))


def test_several_processes_share_a_step(own):
    alone = estimate_training(parse_recipe(own))
    e = estimate_training(parse_recipe(own), processes=3)
    assert (e.batches.global_batch, e.steps) == (12, -(-e.batches.sequences // 12))
    assert e.micro_batches < alone.micro_batches
    assert "x 3 processes" in "\n".join(training_lines(e))


@pytest.mark.parametrize(
    ("config", "names"),
    [
        (transformers.GPT2Config(n_layer=5, n_embd=32, n_head=2, vocab_size=64), "h"),
        (transformers.Gemma3TextConfig(num_hidden_layers=6, hidden_size=32, vocab_size=64, num_attention_heads=2), "layers"),
    ],
)  # fmt: skip
def test_other_architectures_can_be_shortened(student, config, names):
    short = shortened(config, StudentSection.model_validate(student))
    assert short.num_hidden_layers == 2
    assert config.num_hidden_layers > 2
    assert len(getattr(short, "layer_types", None) or "12") == 2
    assert len(getattr(outline(short, StudentSection.model_validate(student)).get_decoder(), names)) == 2


def test_an_architecture_without_one_list_of_layers_is_not_probed(own, student, monkeypatch):
    several = transformers.XLMConfig(n_layers=3, emb_dim=32, n_heads=2, vocab_size=64)
    assert shortened(several, StudentSection.model_validate(student)) is None
    monkeypatch.setattr(estimate_module, "shortened", lambda config, student: None)
    e = estimate_training(parse_recipe(own))
    assert e.measured is None
    assert e.step_seconds is None
    lines = "\n".join(training_lines(e))
    assert "activations          not known" in lines
    assert "no list of layers" in lines
    assert " per step" not in lines


def test_what_training_would_refuse_is_refused(own):
    cold = copy.deepcopy(own)
    cold["loss"] = {"temperature": 0.5}
    with pytest.raises(CacheError, match=r"temperature 0\.5 is below"):
        estimate_training(parse_recipe(cold))
    own["training"]["optimizer"] = "lomo"
    with pytest.raises(RecipeError, match="LOMO"):
        estimate_training(parse_recipe(own))
    del own["student"]
    with pytest.raises(RecipeError, match="needs the recipe section student"):
        estimate_training(parse_recipe(own))


def test_the_command_prints_and_does_not_train(own, tmp_path, monkeypatch, capsys):
    import yaml

    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(own))
    monkeypatch.setattr("sys.argv", ["kdcache", "train-student", str(tmp_path / "recipe.yaml"), "--dry-run"])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code in (0, None)
    printed = capsys.readouterr().out
    for part in ("parameters", "targets per epoch", "s per step", "activations", "per checkpoint"):
        assert part in printed
    assert not (tmp_path / "student").exists()
