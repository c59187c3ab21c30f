"""A cache cut when it is read is the cache that would have been made at that length."""

import copy
import math

import numpy as np
import pytest
import torch

from kdcache.cache.reader import open_cache
from kdcache.errors import TrainingError
from kdcache.evaluate.perplexity import student_score, teacher_score
from kdcache.evaluate.saved_run import score_saved_run
from kdcache.models import attach_lora, load_model
from kdcache.recipe import parse_recipe
from kdcache.student.collate import IGNORED, Collator
from kdcache.student.distill import distill
from kdcache.student.forward import loss_sums
from kdcache.teacher.capture import capture

OPTIONS = {"temperature": 2.0, "ce_weight": 0.5, "kd_weight": 0.5}
SHORT = 42


@pytest.fixture(scope="module")
def caches(base_values, tmp_path_factory):
    """The same examples at 96 tokens and at `SHORT`, by a method that leaves nothing to chance."""
    made = []
    for length in (96, SHORT):
        own = copy.deepcopy(base_values)
        own["cache"]["directory"] = str(tmp_path_factory.mktemp(f"at-{length}") / "cache")
        own["data"]["max_length"] = length
        own["selection"] = {"method": "top_k", "k": 12, "values": "half"}
        made.append(open_cache(capture(parse_recipe(own)).directory))
    return made


@pytest.fixture(scope="module")
def student(models):
    return load_model(str(models / "student"), dtype="float32", device="cpu")


def collator(cache, **options):
    return Collator(cache.plan.tokenizer.pad_id, 2.0, **options)


def left(split):
    """Index and sequence of what has a target within `SHORT` tokens."""
    return [(i, s) for i, s in enumerate(split) if s.targets[:SHORT].any()]


def gradients(model, batch, cache):
    model.zero_grad()
    sums = loss_sums(model, model, batch, vocab_size=cache.vocab_size, **OPTIONS)
    sums.total.backward()
    return sums, {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def assert_same_gradients(found, expected):
    scale = max(float(g.abs().max()) for g in expected.values())
    assert scale > 0
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, rtol=0, atol=1e-5 * scale), name


def test_the_two_caches_try_every_case(caches):
    long, short = (c.split("train") for c in caches)
    lengths = [len(s.token_ids) for s in long]
    kept = left(long)
    assert len(kept) == len(short) < len(long)  # some are dropped,
    assert any(len(s.token_ids) <= SHORT for _, s in kept)  # some are whole,
    assert any(len(s.token_ids) > SHORT for _, s in kept)  # and some are cut.
    assert max(lengths) <= 96


@pytest.mark.parametrize("name", ["train", "validation"])
def test_tokens_targets_and_batches_are_those_of_the_short_cache(caches, name):
    long, short = caches
    kept, whole = left(long.split(name)), list(short.split(name))
    for (_, s), t in zip(kept, whole, strict=True):
        cut = s.cut(SHORT)
        assert np.array_equal(cut.token_ids, t.token_ids)
        assert np.array_equal(cut.targets, t.targets)
        assert len(cut.rows) == len(t.rows) == t.targets.sum()
        assert np.array_equal(cut.rows.head_ids, t.rows.head_ids)
    for start in range(0, len(kept), 5):
        span = slice(start, start + 5)
        expected = collator(short)([(i, t) for (i, _), t in zip(kept[span], whole[span], strict=True)])
        found = collator(long, max_length=SHORT)(kept[span])
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            if key == "temperature" or not value.is_floating_point():
                assert torch.equal(torch.as_tensor(found[key]), torch.as_tensor(value)), key
            else:  # The teacher read other batches: its logits are rounded otherwise, and then to half precision.
                assert torch.allclose(found[key], value, rtol=0, atol=0.02), key
                assert torch.isclose(found[key], value, rtol=0, atol=1e-4).float().mean() > 0.99, key


def test_loss_and_gradient_ignore_what_lies_beyond_the_cut(caches, student):
    """A batch of everything, those left without a target among them, is the short cache's batch."""
    long, short = caches
    model = student.requires_grad_(True)
    everything = collator(long, max_length=SHORT)(list(enumerate(long.split("train"))))
    assert everything["input_ids"].shape[1] == SHORT
    assert (everything["sequence_targets"] == 0).any()
    found, grads = gradients(model, everything, long)
    expected, expected_grads = gradients(model, collator(short)(list(enumerate(short.split("train")))), short)
    assert len(found.ce_N) == len(expected.ce_N)
    assert torch.allclose(found.ce_N, expected.ce_N, atol=1e-4)
    assert found.total.item() == pytest.approx(expected.total.item(), rel=1e-4)
    scale = max(float(g.abs().max()) for g in expected_grads.values())
    for name, gradient in expected_grads.items():
        assert torch.allclose(grads[name], gradient, rtol=0, atol=1e-3 * scale), name


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("lora", [False, True])
def test_a_batch_without_targets_costs_nothing_and_has_a_gradient_for_every_weight(caches, models, lora, packed):
    """Other processes may have targets where this one has none, and all must meet in the backward pass."""
    long = caches[0]
    split = long.split("train")
    without = [(i, s) for i, s in enumerate(split) if not s.targets[:SHORT].any()][:3]
    batch = collator(long, max_length=SHORT, packed=packed)(without)
    assert (batch["labels"] == IGNORED).all()
    assert batch["teacher_ids"].shape[0] == batch["teacher_log_tail"].shape[0] == 0
    model = load_model(str(models / "student"), dtype="float32", device="cpu").requires_grad_(True)
    if lora:
        model = attach_lora(model, r=4, alpha=8, dropout=0.0, targets="all-linear", quantized=False)
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    sums, grads = gradients(model.train(), batch, long)
    assert sums.total.item() == 0
    assert not any(g.any() for g in grads.values())


@pytest.mark.parametrize("tail", ["auto", "lumped", "renormalised"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_negative_index_is_a_forward_pass_and_nothing_else(shared_cache, student, packed, tail):
    cache = open_cache(shared_cache)
    split = cache.split("train")
    make = collator(cache, packed=packed, tail=tail)
    pairs = [(i, split[i]) for i in range(4)]
    alone, _ = gradients(student.requires_grad_(True), make([(-1, split[0]), (-1, split[1])]), cache)
    assert alone.total.item() == 0
    filler = make([(-1, split[0]), (-1, split[1])])
    assert filler["input_ids"].numel() == 4
    assert filler["sequence_index"].tolist() == [-1, -1]
    assert filler["sequence_targets"].tolist() == [0, 0]
    mixed = make([pairs[0], (-1, split[7]), *pairs[1:]])
    assert sorted(mixed["sequence_index"].tolist()) == [-1, 0, 1, 2, 3]
    expected, expected_grads = gradients(student, make(pairs), cache)
    found, grads = gradients(student, mixed, cache)
    assert found.total.item() == pytest.approx(expected.total.item(), rel=1e-6)
    assert_same_gradients(grads, expected_grads)


def test_a_temperature_in_the_call_goes_before_the_collators(shared_cache):
    cache = open_cache(shared_cache)
    pairs = [(i, cache.split("train")[i]) for i in range(3)]
    usual, once = collator(cache)(pairs), collator(cache)(pairs, temperature=1.0)
    own = Collator(cache.plan.tokenizer.pad_id, 1.0)(pairs)
    assert torch.equal(once["teacher_log_probs"], own["teacher_log_probs"])
    assert not torch.equal(once["teacher_log_probs"], usual["teacher_log_probs"])


def test_scores_are_those_of_the_short_cache(caches, student):
    long, short = (c.split("validation") for c in caches)
    assert len(left(long)) == len(short)
    found = student_score(student, long, batch_size=4, max_length=SHORT)
    expected = student_score(student, short, batch_size=4)
    assert found.tokens == expected.tokens == short.summary.positions < long.summary.positions
    assert found.ce_sum == pytest.approx(expected.ce_sum, rel=1e-6)
    assert found.kl_sum == pytest.approx(expected.kl_sum, rel=1e-3)
    teacher = teacher_score(long, max_length=SHORT)
    assert teacher.tokens == found.tokens
    assert teacher.ce_sum == pytest.approx(teacher_score(short).ce_sum, rel=1e-4)
    assert teacher.perplexity != pytest.approx(teacher_score(long).perplexity, rel=1e-3)


def test_a_length_that_cuts_nothing_changes_nothing(caches, student):
    split = caches[0].split("validation")
    assert student_score(student, split, batch_size=4, max_length=96) == student_score(student, split, batch_size=4)
    stated = teacher_score(split)
    found = teacher_score(split, max_length=96)
    assert found.tokens == stated.tokens
    assert found.ce_sum == pytest.approx(stated.ce_sum, abs=1e-5)
    assert math.isfinite(found.perplexity)


def test_a_length_at_which_nothing_is_left_is_refused(caches, student):
    split = caches[0].split("validation")
    way_out = "no sequence of split validation has a target within its first 3 tokens; raise training.max_length"
    with pytest.raises(TrainingError, match=way_out):
        student_score(student, split, batch_size=4, max_length=3)
    with pytest.raises(TrainingError, match=way_out):
        teacher_score(split, max_length=3)


def test_a_run_is_scored_again_at_the_length_it_was_trained_at(caches, values):
    values["cache"]["directory"] = str(caches[0].directory)
    values |= {"data": None, "teacher": None, "selection": {"method": "top_k", "k": 12, "values": "half"}}
    values["training"] |= {"max_length": SHORT, "packing": True, "max_steps": 2}
    record = distill(parse_recipe(values))
    again = score_saved_run(record.output)
    expected = teacher_score(caches[1].split("validation"))
    for name, score in again.scores.items():
        assert score["tokens"] == expected.tokens, name
        assert score["loss"] == pytest.approx(record.scores[name]["loss"], rel=1e-5), name
