"""Position selection end to end: which positions are kept, what the manifest says, and what the loss is averaged over."""

import math

import numpy as np
import pytest
import torch

from kdcache.cache.reader import open_cache
from kdcache.cache.verify import verify
from kdcache.models import load_model
from kdcache.recipe import parse_recipe
from kdcache.student.arguments import training_arguments
from kdcache.student.collate import IGNORED, Collator, sparse_teacher
from kdcache.student.distill import distill
from kdcache.student.forward import loss_sums
from kdcache.student.log import read_log
from kdcache.student.loss import SparseTeacher, distillation_loss
from kdcache.student.trainer import DistillationTrainer, SplitDataset
from kdcache.teacher.capture import capture
from kdcache.teacher.select import Selection, select
from tests.reference import dense_loss, relative_error

QUANTILE = 0.6


@pytest.fixture(scope="module", params=["entropy", "loss"])
def by(request):
    return request.param


@pytest.fixture(scope="module")
def thinned(base_values, by, tmp_path_factory):
    """Recipe values and a cache whose positions are selected."""
    values = {**base_values, "cache": {**base_values["cache"], "directory": str(tmp_path_factory.mktemp(by) / "cache")}}
    values["selection"] = {"bytes_per_position": 40, "positions": by, "quantile": QUANTILE}
    return values, open_cache(capture(parse_recipe(values)).directory)


def dense(model, sequence):
    """float64 log-probabilities at the positions that count, and their labels."""
    ids = torch.from_numpy(sequence.token_ids.astype(np.int64))
    with torch.inference_mode():
        logits = model(input_ids=ids[None]).logits[0].double()
    places = np.flatnonzero(sequence.targets)
    return torch.log_softmax(logits[places - 1], dim=1), ids[places]


def test_each_sequence_keeps_the_positions_that_teach_most(thinned, by, models):
    _, cache = thinned
    teacher = load_model(str(models / "teacher"), dtype="float32", device="cpu")
    shares = set()
    for sequence in cache.split("train"):
        log_p, labels = dense(teacher, sequence)
        score = -(log_p.exp() * log_p).sum(dim=1) if by == "entropy" else -log_p.gather(1, labels[:, None]).squeeze(1)
        count, kept = len(score), sequence.rows.kept
        assert kept.sum() == math.ceil((1 - QUANTILE) * count - 1e-9)
        # Scores that float32 cannot tell apart may go either way.
        assert score[torch.from_numpy(kept)].min() >= score.sort(descending=True).values[kept.sum() - 1] - 1e-4
        assert np.abs(sequence.rows.label_log_prob - log_p.gather(1, labels[:, None]).squeeze(1).numpy()).max() < 5e-3
        shares.add(float(kept.mean()))
    assert len(shares) > 1
    assert all(s.rows.kept.all() for s in cache.split("validation"))


def test_the_manifest_counts_kept_positions(thinned):
    _, cache = thinned
    for name in ("train", "validation"):
        split = cache.split(name)
        assert split.summary.kept_positions == sum(int(s.rows.kept.sum()) for s in split)
        assert split.summary.positions == sum(len(s.rows) for s in split)
    assert 0 < cache.split("train").summary.kept_positions < cache.split("train").summary.positions
    assert verify(cache.directory) == []


def test_kd_is_the_mean_over_kept_rows_and_ce_over_all(thinned, tmp_path):
    """A batch of the whole train split: the gradient of the trainer against a dense float64 one."""
    values, cache = thinned
    recipe, split = parse_recipe(values), cache.split("train")
    model = load_model(recipe.student.model, dtype="float32", device="cpu")
    summary = split.summary
    trainer = DistillationTrainer(
        model=model,
        args=training_arguments(recipe.training, device="cpu", seed=0, checkpoints=tmp_path),
        train_dataset=SplitDataset(split),
        data_collator=Collator(cache.plan.tokenizer.pad_id, 2.0),
        distillation={
            "vocab_size": cache.vocab_size, "temperature": 2.0, "ce_weight": 0.4, "kd_weight": 0.6,
            "kept_share": summary.kept_positions / summary.positions,
        },
    )  # fmt: skip
    batch = trainer.data_collator([(i, s) for i, s in enumerate(split)])
    head = model.get_output_embeddings().weight.detach()
    following = batch["labels"][:, 1:]
    counts = following != IGNORED
    assert int(counts.sum()) == summary.positions
    with torch.no_grad():
        hidden = model.get_decoder()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    states = hidden.last_hidden_state[:, :-1][counts]
    teacher = SparseTeacher(*(batch[f"teacher_{k}"] for k in ("ids", "log_probs", "log_tail", "log_weights")))
    assert int((~torch.isneginf(teacher.log_probs_NK)).any(dim=1).sum()) == summary.kept_positions
    weights = {
        "temperature": 2.0, "ce_weight": 0.4 / summary.positions, "kd_weight": 0.6 / summary.kept_positions,
    }  # fmt: skip
    total, ce, kd, grads = dense_loss(states, head[: cache.vocab_size], None, following[counts], teacher, **weights)
    model.train()
    loss = trainer.compute_loss(model, batch)
    assert float(loss.detach()) == pytest.approx(float(total), rel=1e-4)
    assert float(total) == pytest.approx(
        0.4 * float(ce) / summary.positions + 0.6 * 4 * float(kd) / summary.kept_positions, rel=1e-9
    )
    # The gradient by the states, through the trainer's own path.
    seen = []
    hook = model.get_decoder().register_forward_hook(lambda m, a, output: seen.append(output.last_hidden_state))
    try:
        loss = trainer.compute_loss(model, batch)
    finally:
        hook.remove()
    by_states = torch.autograd.grad(loss, seen[0])[0][:, :-1][counts]
    assert relative_error(by_states, grads[0]) < 1e-4


def test_a_run_on_a_thinned_cache_trains_and_logs_the_mean_over_kept_rows(thinned, tmp_path):
    values, cache = thinned
    training = {**values["training"], "epochs": 2, "logging_steps": 1, "learning_rate": 3e-3, "batch_size": 8}
    record = distill(parse_recipe({**values, "output": str(tmp_path / "run"), "training": training}))
    log = read_log(record.output / "log.csv")
    assert len(log) == 12
    for row in log:
        assert row["loss"] == pytest.approx(0.5 * row["ce"] + 0.5 * 4 * row["kl"], rel=1e-3)
    assert record.scores["student after"]["loss"] < record.scores["student before"]["loss"]
    assert record.scores["student after"]["tokens"] == cache.split("validation").summary.positions


def test_rows_left_empty_cost_nothing(thinned):
    values, cache = thinned
    recipe, split = parse_recipe(values), cache.split("train")
    model = load_model(recipe.student.model, dtype="float32", device="cpu")
    pairs = [(i, split[i]) for i in range(6)]
    kept = torch.from_numpy(np.concatenate([s.rows.kept for _, s in pairs]))
    for tail in ("auto", "lumped", "renormalised"):
        batch = Collator(cache.plan.tokenizer.pad_id, 2.0, tail)(pairs)
        sums = loss_sums(
            model, model, batch, vocab_size=cache.vocab_size, temperature=2.0, ce_weight=0.5, kd_weight=0.5
        )
        assert not sums.divergence_N[~kept].any()
        assert sums.divergence_N[kept].all()
        assert (sums.ce_N > 0).all()


@pytest.mark.parametrize("divergence", ["forward_kl", "soft_ce", "reverse_kl", "jsd"])
def test_a_row_that_says_nothing_costs_nothing_under_any_divergence(divergence):
    generator = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(3, 5, generator=generator), torch.randn(11, 5, generator=generator)
    logits = torch.randn(3, 11, generator=generator)
    labels = torch.tensor([1, 2, 3])
    rows = select(logits, labels, Selection("top_k", (1.0, 2.0), k=4)).rows
    thinned = rows.emptied(np.array([True, False, True]))
    found = []
    for chosen, kept in ((thinned, slice(None)), (rows, [0, 2])):
        own = hidden[kept].clone().requires_grad_(True)
        teacher = sparse_teacher(chosen, 2.0)
        if kept != slice(None):
            teacher = SparseTeacher(teacher.ids_NK[kept], teacher.log_probs_NK[kept], teacher.log_tail_N[kept])
        sums = distillation_loss(
            own, head, labels[kept], teacher, temperature=2.0, ce_weight=0.0, kd_weight=1.0, divergence=divergence
        )
        sums.total.backward()
        found.append((sums, own.grad))
    assert float(found[0][0].divergence) == pytest.approx(float(found[1][0].divergence), rel=1e-5)
    assert found[0][0].divergence_N[1] == 0
    assert found[0][1][1].abs().max() == 0
    assert torch.allclose(found[0][1][[0, 2]], found[1][1], atol=1e-6)
