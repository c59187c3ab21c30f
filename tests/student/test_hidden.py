"""The term on a live teacher's hidden states: its value and gradient, how it is averaged, kept and refused."""

import copy
import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from kdcache.cache.mixture import Mixture
from kdcache.cache.reader import open_cache
from kdcache.errors import CacheError, ModelError, RecipeError, TrainingError
from kdcache.models import load_model
from kdcache.recipe import parse_recipe
from kdcache.same_teacher import refuse_other_teacher, teacher_revision
from kdcache.student.arguments import training_arguments
from kdcache.student.assembly import load_student, with_adapter
from kdcache.student.collate import Collator
from kdcache.student.distill import distill
from kdcache.student.estimate import estimate_training
from kdcache.student.forward import loss_sums
from kdcache.student.hidden import HiddenTerm, hidden_sum, live_term, paired_layers
from kdcache.student.kept import Kept
from kdcache.student.log import read_log
from kdcache.student.trainer import DistillationTrainer, SplitDataset

NAME = "hidden_projection.safetensors"


@pytest.fixture
def own(values, shared_cache):
    """Recipe values with the term; teacher 256 wide in four layers, student 128 in two."""
    values["cache"]["directory"] = str(shared_cache)
    values["loss"] = {"hidden_weight": 0.3}
    values["training"] |= {"max_steps": 4, "save_steps": 2, "logging_steps": 1}
    return values


def batch_of(cache, packed=False, number=5):
    split = cache.split("train")
    return Collator(cache.plan.tokenizer.pad_id, 2.0, max_length=96 if packed else None, packed=packed)(
        [(i, split[i]) for i in range(number)]
    )


def test_layers_are_paired_by_their_share_of_the_depth():
    assert paired_layers(None, 2, 4) == [(1, 2), (2, 4)]
    assert paired_layers(None, 4, 12) == [(1, 3), (2, 6), (3, 9), (4, 12)]  # TinyBERT's
    assert paired_layers((0, 8), 8, 36) == [(0, 0), (8, 36)]
    assert paired_layers(None, 3, 2) == [(1, 1), (2, 1), (3, 2)]
    with pytest.raises(ModelError, match="names 3, 5, but the student has 2 layers; take numbers from 0"):
        paired_layers((1, 3, 5), 2, 4)


@pytest.mark.parametrize("projected", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_value_and_gradient_are_those_of_the_formula(projected, dtype):
    """Loops over targets and widths in float64, and the gradient written down by hand."""
    generator = torch.Generator().manual_seed(0)
    n, d, pairs = 7, 6, 3
    e = 10 if projected else d
    student = [torch.randn(n, d, generator=generator).to(dtype).requires_grad_() for _ in range(pairs)]
    teacher = [torch.randn(n, e, generator=generator).to(dtype) for _ in range(pairs)]
    weight = torch.randn(e, d, generator=generator, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    weight = weight.requires_grad_() if projected else None
    found = hidden_sum(student, teacher, weight)
    found.backward()

    turn = weight.detach().double() if projected else torch.eye(d, dtype=torch.float64)
    total, turned_gradient = 0.0, torch.zeros_like(turn)
    own = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for mine, theirs in zip(student, teacher, strict=True):
        h, z = mine.detach().double(), theirs.double()
        gradient = torch.zeros_like(h)
        for i in range(n):
            apart = turn @ h[i] - z[i]
            total += float(sum(a * a for a in apart)) / e / pairs
            gradient[i] = 2 / e / pairs * turn.T @ apart
            turned_gradient += 2 / e / pairs * torch.outer(apart, h[i])
        assert torch.allclose(mine.grad.double(), gradient, atol=own * float(gradient.abs().max()), rtol=0)
    assert float(found.detach()) == pytest.approx(total, rel=1e-12 if dtype == torch.float64 else 1e-5)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    if projected:
        error = (weight.grad.double() - turned_gradient).abs().max() / turned_gradient.abs().max()
        assert error < (1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_the_term_is_that_of_whole_models_sequence_by_sequence(models, shared_cache, packed):
    """Both models in float64; the oracle runs every sequence alone, without a batch, and differentiates by autograd."""
    cache = open_cache(shared_cache)
    student, teacher = (
        transformers.AutoModelForCausalLM.from_pretrained(models / name, dtype=torch.float64).train()
        for name in ("student", "teacher")
    )
    pairs = [(0, 0), (1, 2), (2, 4)]
    projection = torch.nn.Linear(128, 256, bias=False, dtype=torch.float64)
    term = HiddenTerm(teacher, pairs, 0.7, projection)
    batch = batch_of(cache, packed)
    sums = loss_sums(
        student, student, batch, vocab_size=cache.vocab_size, temperature=2.0, ce_weight=0.0, kd_weight=0.0, hidden=term
    )
    sums.total.backward()
    trained = [*student.parameters(), projection.weight]
    found = [p.grad.clone() for p in trained]

    total = torch.zeros((), dtype=torch.float64)
    for i in range(5):
        sequence = cache.split("train")[i]
        ids = torch.from_numpy(sequence.token_ids.astype("int64"))[None]
        where = torch.from_numpy(sequence.targets.copy())[1:]
        mine = student(input_ids=ids, output_hidden_states=True).hidden_states
        with torch.no_grad():
            theirs = teacher(input_ids=ids, output_hidden_states=True).hidden_states
        for m, t in pairs:
            apart = mine[m][0, :-1][where] @ projection.weight.T - theirs[t][0, :-1][where]
            total = total + apart.pow(2).sum() / 256 / len(pairs)
    assert float(term.last) == pytest.approx(float(total.detach()), rel=1e-9)
    wanted = torch.autograd.grad(0.7 * total, trained, allow_unused=True)
    scale = max(float(g.abs().max()) for g in wanted if g is not None)
    for mine, theirs in zip(found, wanted, strict=True):
        assert torch.allclose(mine, torch.zeros_like(mine) if theirs is None else theirs, atol=1e-9 * scale, rtol=0)
    assert all(p.grad is None for p in teacher.parameters())


def test_a_teacher_of_equal_width_needs_no_projection_and_is_its_own_goal(models, own, shared_cache):
    cache = open_cache(shared_cache)
    own["student"]["model"] = str(models / "teacher")
    recipe = parse_recipe(own)
    model = load_student(recipe.student).requires_grad_(True)
    names = set(dict(model.named_parameters()))
    term = live_term(recipe, model, cache)
    assert set(dict(model.named_parameters())) == names
    options = {"vocab_size": cache.vocab_size, "temperature": 2.0, "ce_weight": 0.5, "kd_weight": 0.5}
    with_it = loss_sums(model, model, batch_of(cache), **options, hidden=term)
    assert float(term.last) < 1e-6
    assert torch.allclose(with_it.total, loss_sums(model, model, batch_of(cache), **options).total)


def test_recomputed_activations_change_nothing(own, shared_cache):
    cache = open_cache(shared_cache)
    gradients = []
    for checkpointing in (False, True):
        recipe = parse_recipe(own)
        torch.manual_seed(0)
        model = with_adapter(load_student(recipe.student), recipe.student).train()
        term = live_term(recipe, model, cache)
        if checkpointing:
            kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
            kwargs = {f"{kind}_checkpointing_kwargs": {"use_reentrant": False}}
            getattr(model, f"{kind}_checkpointing_enable")(**kwargs)
            model.enable_input_require_grads()
        torch.manual_seed(1)  # dropout
        options = {"vocab_size": cache.vocab_size, "temperature": 2.0, "ce_weight": 0.5, "kd_weight": 0.5}
        loss_sums(model, model, batch_of(cache), **options, hidden=term).total.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert any(n.endswith("hidden_projection.weight") for n in gradients[0])
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradients[1][name], gradient, rtol=1e-4, atol=1e-6 * float(gradient.abs().max())), name


def first_gradients(own, cache, folder, batch, accumulation, packing=False):
    """Gradients of the first step over eight sequences, and its log line."""
    values = copy.deepcopy(own)
    values["training"] |= {
        "batch_size": batch, "accumulation": accumulation, "max_steps": 1, "clip": None, "packing": packing,
    }  # fmt: skip
    values["student"]["lora"] = None
    recipe = parse_recipe(values)
    model = load_student(recipe.student).requires_grad_(True)
    grads = {}

    class Spy(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            grads.update({n: p.grad.clone() for n, p in model.named_parameters()})

    trainer = DistillationTrainer(
        model=model,
        args=training_arguments(recipe.training, device="cpu", seed=0, checkpoints=folder / f"{batch}{packing}"),
        train_dataset=SplitDataset(cache.split("train")),
        data_collator=Collator(cache.plan.tokenizer.pad_id, 2.0, max_length=96, packed=packing),
        callbacks=[Spy()],
        distillation={
            "vocab_size": cache.vocab_size, "temperature": 2.0, "ce_weight": 0.5, "kd_weight": 0.5,
            "hidden": live_term(recipe, model, cache),
        },
    )  # fmt: skip
    trainer.train()
    return grads, next(line for line in trainer.state.log_history if "hidden" in line)


def test_it_is_averaged_over_the_targets_of_the_whole_window(own, shared_cache, tmp_path):
    cache = open_cache(shared_cache)
    whole, logged = first_gradients(own, cache, tmp_path, 8, 1)
    assert "hidden_projection.weight" in whole
    assert logged["loss"] == pytest.approx(
        0.5 * logged["ce"] + 0.5 * 4 * logged["kl"] + 0.3 * logged["hidden"], rel=1e-4
    )
    for batch, accumulation, packing in ((4, 2, False), (1, 8, False), (8, 1, True)):
        parts, line = first_gradients(own, cache, tmp_path, batch, accumulation, packing)
        assert line["hidden"] == pytest.approx(logged["hidden"], rel=1e-5)
        scale = max(float(g.abs().max()) for g in whole.values())
        for name, gradient in whole.items():
            assert torch.allclose(parts[name], gradient, atol=2e-6 * scale + 1e-8), name


@pytest.mark.parametrize("lora", [{"r": 4, "dropout": 0.1}, None], ids=["lora", "full"])
def test_the_projection_goes_on_where_it_stopped_and_is_no_part_of_the_student(own, tmp_path, lora):
    own["student"]["lora"] = lora
    whole = distill(parse_recipe(own)).output
    own["output"] = str(tmp_path / "stopped")
    stopped = distill(parse_recipe(own)).output
    shutil.rmtree(stopped / "checkpoints" / "checkpoint-4")
    shutil.rmtree(stopped / "model")
    (stopped / "run.json").unlink()
    distill(parse_recipe(own), resume=True)
    for part in ("checkpoints/checkpoint-4/" + NAME, *(f"model/{p.name}" for p in (whole / "model").glob("*.safe*"))):
        assert (whole / part).read_bytes() == (stopped / part).read_bytes(), part
    moved = [load_file(whole / "checkpoints" / f"checkpoint-{step}" / NAME)["weight"] for step in (2, 4)]
    assert moved[0].shape == (256, 128)
    assert not torch.equal(*moved)
    (saved,) = (whole / "model").glob("*.safetensors")
    assert not [name for name in load_file(saved) if "hidden" in name]
    (at_step,) = (whole / "checkpoints" / "checkpoint-4").glob("*model.safetensors")
    assert not [name for name in load_file(at_step) if "hidden" in name]
    log = read_log(whole / "log.csv")
    assert all(float(line["hidden"]) > 0 for line in log if "loss" in line)
    parameters = json.loads((whole / "run.json").read_text())["parameters"]
    assert parameters["trainable"] == sum(t.numel() for t in load_file(saved).values())
    # One that is lost is missed.
    (stopped / "run.json").unlink()
    shutil.rmtree(stopped / "checkpoints" / "checkpoint-4")
    (stopped / "checkpoints" / "checkpoint-2" / NAME).unlink()
    with pytest.raises(TrainingError, match="has no usable projection of hidden states"):
        distill(parse_recipe(own), resume=True)


def test_the_term_draws_nothing_from_what_the_training_draws(own, tmp_path):
    """With a weight that rounds away, the student is the one that is trained without."""
    own["student"]["lora"] = {"r": 4, "dropout": 0.2}
    own["training"]["clip"] = None  # the projection's gradient has a norm as well
    own["loss"] = {"hidden_weight": 1e-30}
    with_it = distill(parse_recipe(own)).output
    own["loss"] = {}
    own["output"] = str(tmp_path / "without")
    without = distill(parse_recipe(own)).output
    a, b = (load_file(run / "model" / "adapter_model.safetensors") for run in (with_it, without))
    for name, weight in a.items():
        assert torch.allclose(weight, b[name], atol=1e-7), name
    assert not (without / "checkpoints" / "checkpoint-4" / NAME).exists()
    assert not any("hidden" in line for line in read_log(without / "log.csv"))


def test_learning_by_hidden_states_alone_brings_them_nearer(own):
    own["loss"] = {"hidden_weight": 1.0, "ce_weight": 0, "kd_weight": 0, "hidden_layers": [1]}
    own["training"] |= {"max_steps": 24, "learning_rate": 3e-3, "schedule": "constant"}
    own["student"]["lora"] = None
    log = [float(line["hidden"]) for line in read_log(distill(parse_recipe(own)).output / "log.csv")]
    assert sum(log[-4:]) < 0.8 * sum(log[:4])


def test_a_base_that_is_kept_for_the_next_student_is_as_it_was(own, models):
    kept = Kept()
    distill(parse_recipe(own), kept=kept)
    base = kept.take_base(parse_recipe(own).student)
    fresh = load_model(str(models / "student"), dtype="float32", device="cpu")
    assert [n for n, _ in base.named_parameters()] == [n for n, _ in fresh.named_parameters()]
    assert all(torch.equal(a, b) for a, b in zip(base.parameters(), fresh.parameters(), strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss.hidden_weight": -1}, r"loss\.hidden_weight: .*greater than or equal to 0"),
        ({"loss.hidden_layers": []}, r"rising order, none of them twice, found \[\]"),
        ({"loss.hidden_layers": [2, 1]}, r"rising order"),
        ({"loss.hidden_layers": [-1]}, r"layers from 0 \(the embeddings\) on"),
        ({"loss.hidden_layers": [1], "loss.hidden_weight": 0}, r"goes with loss\.hidden_weight above 0"),
        ({"loss.hidden_layers": [1, 3]}, r"names 3, but the student has 2 layers"),
        ({"teacher": None}, r"needs the recipe section teacher"),
        ({"training.compile": True}, r"does not go with training\.compile"),
        ({"loss.ce_weight": 0, "loss.kd_weight": 0, "loss.hidden_weight": 0}, r"are both 0: nothing to learn"),
    ],
)
def test_what_cannot_be_had_is_refused_before_a_model_is_loaded(own, changes, message, monkeypatch):
    monkeypatch.setattr("kdcache.student.kept.load_student", lambda *a: pytest.fail("loaded"))
    for key, value in changes.items():
        section, _, name = key.partition(".")
        if name:
            own[section][name] = value
        else:
            own[section] = value
    with pytest.raises((RecipeError, ModelError), match=message):
        distill(parse_recipe(own))


def test_engines_that_cut_the_student_are_refused(own, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setattr("kdcache.student.kept.load_student", lambda *a: pytest.fail("loaded"))
    with pytest.raises(RecipeError, match="does not go with FSDP or DeepSpeed"):
        distill(parse_recipe(own))


def test_a_teacher_that_is_gone_is_missed_before_a_model_is_loaded(own, tmp_path, models, monkeypatch):
    gone = tmp_path / "teacher"  # of the name that the cache knows
    own["teacher"]["model"] = str(gone)
    monkeypatch.setattr("kdcache.student.kept.load_student", lambda *a: pytest.fail("loaded"))
    with pytest.raises(ModelError, match=r"the model folder .*teacher does not exist"):
        distill(parse_recipe(own))


def test_a_dry_run_says_what_the_live_teacher_takes(own, models, monkeypatch):
    monkeypatch.setattr("kdcache.student.probe._ENOUGH_SECONDS", 0.0)
    teacher = load_model(str(models / "teacher"), dtype="float32", device="cpu")
    size = sum(p.nbytes for p in teacher.parameters())
    (remark,) = [r for r in estimate_training(parse_recipe(own)).remarks if "live teacher" in r]
    assert f"{size / 2**20:,.1f} MiB of weights" in remark


def test_another_model_by_the_name_of_the_teacher_is_refused_before_a_model_is_loaded(
    own, tmp_path, models, monkeypatch
):
    copied = tmp_path / "teacher"  # the name that the cache knows
    shutil.copytree(models / "teacher", copied)
    own["teacher"]["model"] = str(copied)
    own["training"]["max_steps"] = 1
    kept = Kept()
    distill(parse_recipe(own), kept=kept)  # the same model elsewhere is the teacher
    weights = load_file(copied / "model.safetensors")
    save_file({n: (w * 1.01).contiguous() for n, w in weights.items()}, copied / "model.safetensors", {"format": "pt"})
    monkeypatch.setattr("kdcache.student.kept.load_student", lambda *a: pytest.fail("loaded"))
    own["output"] += "2"
    for refuses in (lambda recipe: distill(recipe, kept=kept), estimate_training):
        with pytest.raises(CacheError, match=r"is not the teacher of .* give teacher\.model that one"):
            refuses(parse_recipe(own))


def test_a_teacher_is_that_of_the_first_cache_and_copies_from_the_hub_are_believed(models, shared_cache):
    plain = open_cache(shared_cache)
    mixed = Mixture([(plain, 1.0), (open_cache(shared_cache), 1.0)])
    for cache in (plain, mixed):
        refuse_other_teacher(cache, str(models / "teacher"), "x")
        with pytest.raises(CacheError, match=r"is not the teacher of .*; take it"):
            refuse_other_teacher(cache, str(models / "student"), "take it")
    identity = plain.plan.teacher.model_copy(update={"revision": "c" * 40, "fingerprint": "0" * 64})
    plain.plan = plain.plan.model_copy(update={"teacher": identity})
    for cache in (plain, Mixture([(plain, 1.0), (open_cache(shared_cache), 1.0)])):
        refuse_other_teacher(cache, str(models / "teacher"), "x")
        assert teacher_revision(cache, str(models / "teacher")) is None
        assert teacher_revision(cache, "owner/teacher") == "c" * 40
