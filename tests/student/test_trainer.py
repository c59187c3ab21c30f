"""The trainer: normalisation over the accumulation window, logs, 4-bit gradients, refusals."""

import copy

import pytest
import torch

from kdcache.cache.reader import open_cache
from kdcache.errors import DeviceError, PlanMismatchError, TokenizerError, TrainingError
from kdcache.evaluate.perplexity import student_score, teacher_score
from kdcache.models import attach_lora, load_model
from kdcache.recipe import parse_recipe
from kdcache.student.arguments import training_arguments
from kdcache.student.collate import Collator
from kdcache.student.distill import distill
from kdcache.student.forward import loss_sums
from kdcache.student.log import read_log
from kdcache.student.sampler import EpochOrder
from kdcache.student.trainer import DistillationTrainer, SplitDataset
from kdcache.teacher.capture import capture
from kdcache.token_maps import load_tokenizer

OPTIONS = {"temperature": 2.0, "ce_weight": 0.5, "kd_weight": 0.5}


def one_step_gradients(values, shared_cache, tmp_path, batch, accumulation, reduction="mean"):
    """Gradient of the first optimizer step over eight sequences, however they are cut."""
    cache = open_cache(shared_cache)
    own = copy.deepcopy(values)
    own["training"] |= {"batch_size": batch, "accumulation": accumulation, "max_steps": 1, "clip": None}
    recipe = parse_recipe(own)
    model = load_model(recipe.student.model, dtype="float32", device="cpu").requires_grad_(True)
    grads = {}

    class Spy(DistillationTrainer):
        def create_optimizer(self, *args, **kwargs):
            optimizer = super().create_optimizer(*args, **kwargs)
            inner = self.optimizer
            step = inner.step

            def spy(*a, **k):
                grads.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
                return step(*a, **k)

            inner.step = spy
            return optimizer

    trainer = Spy(
        model=model,
        args=training_arguments(
            recipe.training, device="cpu", seed=0, checkpoints=tmp_path / f"{batch}x{accumulation}"
        ),
        train_dataset=SplitDataset(cache.split("train")),
        data_collator=Collator(cache.plan.tokenizer.pad_id, 2.0),
        distillation={**OPTIONS, "vocab_size": cache.vocab_size, "reduction": reduction},
    )
    trainer.train()
    return grads


def test_eight_is_two_by_four_is_one_by_eight(values, shared_cache, tmp_path):
    whole = one_step_gradients(values, shared_cache, tmp_path, 8, 1)
    assert whole
    for batch, accumulation in ((2, 4), (1, 8)):
        parts = one_step_gradients(values, shared_cache, tmp_path, batch, accumulation)
        scale = max(float(g.abs().max()) for g in whole.values())
        for name, gradient in whole.items():
            assert torch.allclose(parts[name], gradient, atol=1e-6 * scale + 1e-8), name


def test_the_mean_is_per_token_and_the_sum_is_not(values, shared_cache, tmp_path):
    mean = one_step_gradients(values, shared_cache, tmp_path, 8, 1)
    total = one_step_gradients(values, shared_cache, tmp_path / "sum", 8, 1, reduction="sum")
    cache = open_cache(shared_cache)
    split = cache.split("train")
    sizes = [cache.plan.shards[i].sequences for i in split.shards]
    first = EpochOrder(sizes, cache_id=cache.id, seed=0, epoch=0).between(0, 8)
    tokens = sum(len(split[int(i)].rows) for i in first)
    name = max(mean, key=lambda n: float(mean[n].norm()))
    assert torch.allclose(total[name], mean[name] * tokens, rtol=1e-3, atol=1e-5 * tokens)


def test_four_bit_gradients_are_the_same_after_an_evaluation_forward(models, shared_cache):
    """On some CPUs bitsandbytes repacks weights in an evaluation forward and training goes wrong after it."""
    cache = open_cache(shared_cache)
    batch = Collator(cache.plan.tokenizer.pad_id, 2.0)([(i, cache.split("train")[i]) for i in range(4)])

    def gradients(evaluate_first):
        torch.manual_seed(0)
        model = load_model(str(models / "student"), quantization="nf4", dtype="bfloat16", device="cpu")
        model = attach_lora(model, r=4, alpha=8, dropout=0.0, targets="all-linear", quantized=True)
        if evaluate_first:
            student_score(model, cache.split("validation"), batch_size=4)
        model.train()
        loss_sums(model, model, batch, vocab_size=cache.vocab_size, **OPTIONS).total.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    before, after = gradients(False), gradients(True)
    assert before.keys() == after.keys()
    assert any(float(g.norm()) > 0 for g in before.values())
    for name in before:
        assert torch.equal(before[name], after[name]), name


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_quantised_students_train(values, shared_cache, quantization):
    values["cache"]["directory"] = str(shared_cache)
    values["student"] |= {"quantization": quantization, "dtype": "bfloat16"}
    values["training"] |= {
        "max_steps": 2,
        "precision": "bf16",
        "gradient_checkpointing": True,
        "optimizer": "paged_adamw_8bit",
    }
    record = distill(parse_recipe(values))
    assert record.values["steps"] == 2
    assert record.values["parameters"]["trainable"] < record.values["parameters"]["total"]


# Drawn entries are quantised to 1/2 nat, and their rounding averages out; in half precision hardly anything is rounded.
@pytest.mark.parametrize(("kept", "kl"), [("quantised", 1e-2), ("half", 1e-4)])
def test_scores_are_token_sums_and_the_teacher_row_is_the_teacher(models, values, kept, kl):
    values["selection"]["values"] = kept
    cache = open_cache(capture(parse_recipe(values)).directory)
    validation = cache.split("validation")
    teacher = load_model(str(models / "teacher"), dtype="float32", device="cpu")
    own = student_score(teacher, validation, batch_size=5)
    stated = teacher_score(validation)
    assert own.tokens == stated.tokens
    # Labels are rounded to half precision, each by up to 2^-11 of itself, up as often as down.
    assert own.loss == pytest.approx(stated.loss, rel=3 * 2.0**-11 / own.tokens**0.5)
    assert abs(own.kl) < kl
    naive = 0.0
    for sequence in validation:
        ids = torch.from_numpy(sequence.token_ids.astype("int64"))
        with torch.inference_mode():
            log_p = torch.log_softmax(teacher(input_ids=ids[None]).logits[0].double(), dim=1)
        for i in range(1, len(ids)):
            if sequence.targets[i]:
                naive -= float(log_p[i - 1, ids[i]])
    assert own.ce_sum == pytest.approx(naive, rel=1e-5)


def test_full_fine_tuning_overfits_and_logs_ce_and_kl(values, shared_cache):
    values["cache"]["directory"] = str(shared_cache)
    values["student"]["lora"] = None
    values["training"] |= {"epochs": 6, "learning_rate": 3e-3, "batch_size": 8, "logging_steps": 1}
    record = distill(parse_recipe(values))
    log = read_log(record.output / "log.csv")
    assert {"step", "loss", "ce", "kl", "learning_rate", "grad_norm"} <= set(log[0])
    assert log[-1]["ce"] < log[0]["ce"]
    for row in log:
        assert row["loss"] == pytest.approx(0.5 * row["ce"] + 0.5 * 4 * row["kl"], rel=1e-3)
    assert record.scores["student after"]["loss"] < record.scores["student before"]["loss"]


def test_a_wider_head_works_and_other_tokens_are_named(values, shared_cache, models, tmp_path):
    import transformers

    values["cache"]["directory"] = str(shared_cache)
    values["training"]["max_steps"] = 1
    tokenizer = load_tokenizer(str(models / "student"))
    wide = transformers.AutoModelForCausalLM.from_pretrained(models / "student")
    wide.resize_token_embeddings(len(tokenizer) + 64)
    wide.save_pretrained(tmp_path / "wide")
    tokenizer.save_pretrained(tmp_path / "wide")
    values["student"]["model"] = str(tmp_path / "wide")
    assert distill(parse_recipe(values)).values["steps"] == 1

    target = tmp_path / "other"
    wide.save_pretrained(target)
    tokenizer.save_pretrained(target)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (target / name).write_text((target / name).read_text().replace("<|im_start|>", "<|turn|>"))
    values["student"]["model"] = str(target)
    values["output"] += "-other"
    with pytest.raises(
        TokenizerError, match=r"differs .* in 1 of .*id 1 is '<\|turn\|>', in the cache '<\|im_start\|>'"
    ):
        distill(parse_recipe(values))


def test_a_recipe_that_contradicts_the_cache_is_refused(values, shared_cache):
    values["cache"]["directory"] = str(shared_cache)
    values["selection"]["values"] = "half"
    values["teacher"]["quantization"] = "nf4"
    with pytest.raises(
        PlanMismatchError,
        match=r"selection\.values is 'half', in the cache 'quantised'; teacher\.quantization is 'nf4'",
    ):
        distill(parse_recipe(values))


def test_an_earlier_run_is_never_overwritten_by_accident(values, shared_cache):
    values["cache"]["directory"] = str(shared_cache)
    values["training"]["max_steps"] = 1
    first = distill(parse_recipe(values))
    with pytest.raises(TrainingError, match="earlier run"):
        distill(parse_recipe(values))
    assert distill(parse_recipe(values), resume=True).values == first.values
    values["loss"] = {"temperature": 3.0}
    with pytest.raises(TrainingError, match=r"loss\.temperature was 2\.0, now 3\.0"):
        distill(parse_recipe(values), resume=True)
    assert distill(parse_recipe(values), overwrite=True).values["recipe"]["loss"]["temperature"] == 3.0


def test_a_loss_that_is_not_finite_stops_and_names_the_sequences(values, shared_cache):
    values["cache"]["directory"] = str(shared_cache)
    values["training"] |= {"learning_rate": 1e30, "clip": None}
    with pytest.raises(TrainingError, match=r"not finite at step \d+, in the sequences \d+"):
        distill(parse_recipe(values))


def test_half_precision_needs_a_gpu(values, shared_cache):
    values["cache"]["directory"] = str(shared_cache)
    values["training"]["precision"] = "fp16"
    with pytest.raises(DeviceError, match="fp16 needs a CUDA device"):
        distill(parse_recipe(values))
