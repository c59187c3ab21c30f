"""Mixtures of teachers: against dense float64 arithmetic, and caches that do not hold the same sequences."""

import copy
import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner

from kdcache.cache.mixture import MixedRows, Mixture, decodings, open_caches, order_id
from kdcache.cache.reader import open_cache
from kdcache.cache.subset import subset
from kdcache.cli import app
from kdcache.errors import CacheError, CorruptCacheError, KdcacheError, PlanMismatchError, RecipeError, TrainingError
from kdcache.evaluate.by_sequence import SequenceSums
from kdcache.evaluate.evaluation import Wanted, evaluate
from kdcache.evaluate.perplexity import teacher_score
from kdcache.evaluate.saved_run import open_saved_run, score_saved_run
from kdcache.recipe import parse_recipe
from kdcache.recipe_training import LossSection
from kdcache.run_record import AFTER, TEACHER, load_record, read_log
from kdcache.student.assembly import common_mass, tell_of_tail
from kdcache.student.batches import MicroBatches, OrderOptions
from kdcache.student.collate import Collator, sparse_teacher
from kdcache.student.distill import distill
from kdcache.student.estimate import estimate_training
from kdcache.student.loss import distillation_loss
from kdcache.student.sampler import BatchPlan
from kdcache.sweep.ready import ready_rows
from kdcache.teacher.capture import capture
from kdcache.teacher.select import select
from tests.reference import log_softmax
from tests.student.test_cached_rows import (
    CASES,
    SELECTIONS,
    N,
    V,
    assert_like_the_oracle,
    chosen_rows,
    student,
    teacher_logits,
)
from tests.told import Told

ROOT = Path(__file__).parent.parent.parent
WEIGHTS = (0.25, 0.75)


def mixed(*rows, weights=WEIGHTS):
    design = next((r.design for r in rows if not r.design.sampled), rows[0].design)
    return MixedRows(tuple(rows), weights, design)


def dense(teacher):
    """What each id stands for, the rest, and log p: float64 ``[N, V]``, ``[N]``, ``[N, V]``; ids have to be unique."""
    inside = ~torch.isneginf(teacher.log_probs_NK)
    weights = teacher.log_probs_NK if teacher.log_weights_NK is None else teacher.log_weights_NK
    filled, log_p = torch.zeros(len(inside), V).double(), torch.full((len(inside), V), -torch.inf).double()
    counted = torch.zeros(len(inside), V)
    for row in range(len(inside)):
        ids = teacher.ids_NK[row, inside[row]]
        counted[row].index_add_(0, ids, torch.ones(len(ids)))
        filled[row, ids] = weights[row, inside[row]].double().exp()
        log_p[row, ids] = teacher.log_probs_NK[row, inside[row]].double()
    assert counted.max() <= 1
    return filled, teacher.log_tail_N.double().exp(), log_p


def probabilities(temperature, *logits, weights=WEIGHTS):
    """Each teacher's distribution, and the mixture's: float64 ``[M, N, V]`` and ``[N, V]``."""
    own = np.exp([log_softmax(y.numpy(), temperature) for y in logits])
    return own, np.einsum("m,mnv->nv", weights, own)


@pytest.mark.parametrize("tail", ["auto", "lumped", "renormalised"])
@pytest.mark.parametrize(("method", "temperature"), CASES)
def test_a_mixture_of_one_teacher_with_itself_is_that_teacher(method, temperature, tail):
    rows = chosen_rows(method, teacher_logits(), empty=False)
    states, head, labels = student()
    found = []
    for teacher in (sparse_teacher(r, temperature, tail) for r in (rows, mixed(rows, rows))):
        leaf = states.clone().requires_grad_(True)
        sums = distillation_loss(leaf, head, labels, teacher, temperature=temperature, ce_weight=0.3, kd_weight=0.7)
        found.append([sums.divergence_N, *torch.autograd.grad(sums.total, leaf)])
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("methods", [("threshold_sampling", "threshold_sampling"), ("random_sampling", "random_sampling"),
                                     ("ids_alone", "ids_alone")])  # fmt: skip
def test_over_many_draws_the_gradient_is_the_dense_mixtures_and_the_value_is_off_by_a_constant(methods):
    logits, draws = [teacher_logits(4, seed=s) for s in (1, 2)], 4000
    temperature = SELECTIONS[methods[0]].temperatures[-1]
    own, mixture = probabilities(temperature, *logits)
    log_q = torch.log_softmax(torch.randn(4, V, generator=torch.Generator().manual_seed(9)).double(), dim=1)
    generator = np.random.default_rng(0)

    def drawn(y, method):
        """Many independent drawings of the same rows, in one call."""
        selection = SELECTIONS[method]
        return select(y.repeat(draws, 1), torch.zeros(4 * draws, dtype=torch.int64), selection,
                      generator.random((4 * draws, selection.uniforms))).rows  # fmt: skip

    parts = [drawn(y, m) for y, m in zip(logits, methods, strict=True)]
    weights, rest, log_p = dense(sparse_teacher(mixed(*parts), temperature))
    assert not rest.any()
    p_hat = weights.reshape(draws, 4, V)
    # Of an id that is drawn a few times in all, the variance cannot be told from those: it is below p times the largest weight.
    bound = torch.from_numpy(mixture) * 0.1
    error = (torch.maximum(p_hat.var(dim=0), bound) / draws).sqrt()
    off = (p_hat.mean(dim=0) - torch.from_numpy(mixture)).abs() / error
    assert off.max() < 5
    assert off.mean() < 1
    assert p_hat.std(dim=0).max() > 1e-3
    if methods[0] == "ids_alone":
        return  # their logarithms are the mean of a row's draws: another constant
    # Where every head holds an id its logarithm is the mixture's, elsewhere each teacher's own.
    in_all = np.ones((4, V), dtype=bool)
    for part in parts:
        row, held = np.repeat(np.arange(4), part.head[:4]), np.zeros((4, V), dtype=bool)
        held[row, part.head_ids[: len(row)].astype(int)] = True
        in_all &= held
    apart = np.einsum("m,mnv->nv", WEIGHTS, own * np.log(own)) - mixture * np.log(mixture)
    assert (apart > -1e-12).all()
    offset = np.where(in_all, 0, apart).sum(axis=1)
    kl = (mixture * (np.log(mixture) - log_q.numpy())).sum(axis=1)
    values = torch.where(weights > 0, weights * (log_p - log_q.repeat(draws, 1)), 0).sum(dim=1).reshape(draws, 4)
    error = values.std(dim=0) / draws**0.5
    assert ((values.mean(dim=0) - torch.from_numpy(kl + offset)).abs() < 5 * error).all()
    assert (offset > 0.05).all()
    mean_of_kls = np.einsum("m,mn->n", WEIGHTS, (own * (np.log(own) - log_q.numpy())).sum(axis=2))
    assert (kl + offset <= mean_of_kls + 1e-12).all()


@pytest.mark.parametrize("divergence", ["forward_kl", "soft_ce", "reverse_kl", "jsd"])
@pytest.mark.parametrize(
    ("methods", "tail"),
    [
        (("top_k", "threshold"), "auto"),
        (("threshold_sampling", "top_k"), "auto"),
        (("threshold_sampling", "threshold_sampling"), "lumped"),
    ],
)
def test_one_bucket_is_exact_on_what_all_hold_and_on_the_rest(methods, tail, divergence):
    logits, temperature = [teacher_logits(seed=s) for s in (1, 2)], 2.0
    # Near enough to have entries in common.
    logits[1] = logits[0] + 0.4 * logits[1]
    rows = [chosen_rows(m, y, empty=False) for m, y in zip(methods, logits, strict=True)]
    _, mixture = probabilities(temperature, *logits)
    kept = np.zeros((N, V), dtype=bool)
    for row in range(N):
        heads = [set(r.slice(row, row + 1).head_ids.tolist()) for r in rows]
        kept[row, sorted(heads[0] & heads[1])] = True
    assert kept.sum(axis=1).max() > 2
    assert (kept.sum(axis=1) < rows[0].head).any()
    weight = np.where(kept, mixture, 0.0)
    target = [torch.from_numpy(x) for x in (weight, kept, 1 - weight.sum(axis=1), np.log(mixture))]
    teacher = sparse_teacher(mixed(*rows), temperature, tail)
    assert teacher.log_weights_NK is None
    sums = assert_like_the_oracle(*student(), teacher, target, temperature, divergence=divergence)
    if divergence == "forward_kl":
        states, head, _ = student()
        log_q = log_softmax((states @ head.T).numpy(), temperature)
        assert float(sums.divergence) <= float((mixture * (np.log(mixture) - log_q)).sum())


def test_teachers_with_nothing_in_common_leave_one_bucket_that_teaches_nothing():
    logits = torch.full((1, V), -4.0)
    rows = []
    for first in (0, 20):
        own = logits.clone()
        own[0, first : first + 7] = 3.0
        rows.append(select(own, torch.zeros(1, dtype=torch.int64), SELECTIONS["top_k"], np.zeros((1, 0))).rows)
    teacher = sparse_teacher(mixed(*rows), 1.0)
    states = student(1)[0].requires_grad_(True)
    sums = distillation_loss(states, student(1)[1], torch.zeros(1, dtype=torch.int64), teacher, temperature=1.0, ce_weight=0, kd_weight=1)  # fmt: skip
    assert float(sums.divergence) == pytest.approx(0, abs=1e-5)
    assert torch.autograd.grad(sums.total, states)[0].abs().max() < 1e-5


def test_renormalised_truncation_is_the_mean_of_the_truncated():
    logits = [teacher_logits(seed=s) for s in (1, 2)]
    rows = [chosen_rows("top_k", y, empty=False) for y in logits]
    weights, rest, log_p = dense(sparse_teacher(mixed(*rows), 2.0, "renormalised"))
    alone = [dense(sparse_teacher(r, 2.0, "renormalised"))[0] for r in rows]
    assert torch.allclose(weights, WEIGHTS[0] * alone[0] + WEIGHTS[1] * alone[1], rtol=1e-5)
    assert torch.allclose(log_p.exp(), weights)
    assert not rest.any()


# Caches on disk.


@pytest.fixture(scope="module")
def second(base_values, models, shared_cache, tmp_path_factory):
    """A cache of another teacher over the same sequences, with other shards and another budget."""
    values = copy.deepcopy(base_values)
    values["cache"] = {"directory": str(tmp_path_factory.mktemp("second") / "cache"), "positions_per_shard": 170}
    values["teacher"]["model"] = str(models / "student")
    values["selection"] = {"bytes_per_position": 30}
    return capture(parse_recipe(values)).directory


@pytest.fixture
def mixing(values, shared_cache, second):
    """A recipe that learns from both."""
    values["cache"] = {
        "directory": str(shared_cache),
        "weight": 1,
        "mixture": [{"directory": str(second), "weight": 3}],
        "positions_per_shard": 100,
    }
    return values


def test_every_sequence_is_read_with_the_rows_of_all_caches(shared_cache, second):
    first, other = open_cache(shared_cache), open_cache(second)
    assert [s.sequences for s in first.plan.shards] != [s.sequences for s in other.plan.shards]
    cache = open_caches([(shared_cache, 1.0), (second, 3.0)], keep=2)
    assert isinstance(cache, Mixture)
    assert cache.weights == WEIGHTS
    assert cache.id not in (first.id, other.id)
    assert (
        cache.id == open_caches([(shared_cache, 2), (second, 6)]).id != open_caches([(shared_cache, 1), (second, 1)]).id
    )
    assert cache.id != open_caches([(second, 3), (shared_cache, 1)]).id
    for name in ("train", "validation"):
        assert len(cache.split(name)) == len(first.split(name))
        for index, one, a, b in zip(range(99), cache.split(name), first.split(name), other.split(name), strict=False):
            assert one.token_ids.tolist() == a.token_ids.tolist() == b.token_ids.tolist()
            assert [r.head_ids.tolist() for r in one.rows.parts] == [s.rows.head_ids.tolist() for s in (a, b)]
            assert cache.split(name)[index].targets.tolist() == a.targets.tolist()
    label = np.logaddexp(
        *(s.rows.label_log_prob.astype(float) + np.log(w) for s, w in zip((a, b), WEIGHTS, strict=True))
    )
    assert np.allclose(one.rows.label_log_prob, label, atol=1e-6)
    # One place is no mixture, whatever its weight.
    assert open_caches([(shared_cache, 0.3)]).id == first.id


def test_samples_come_as_from_the_first_cache_alone(shared_cache, second):
    first, cache = open_cache(shared_cache), open_caches([(shared_cache, 1), (second, 1)])
    assert order_id(cache) == order_id(first) == first.id
    orders = []
    for opened in (first, cache):
        split = opened.split("train")
        batches = MicroBatches(
            split,
            BatchPlan(len(split), 4, 1),
            OrderOptions(seed=3, window=2, group_by_length=True),
            Collator(0, 2.0),
            lambda step: 2.0,
        )
        orders.append([batches[1, n]["sequence_index"].tolist() for n in range(5)])
    assert orders[0] == orders[1]


def test_a_student_learns_from_a_mixture_and_all_that_reads_it_later(mixing, tmp_path, shared_cache, second, capsys):
    recipe = parse_recipe(mixing)
    record = distill(recipe)
    cache = open_caches(recipe.cache.places)
    assert record.values["cache_id"] == cache.id
    assert [(m["cache_id"], m["weight"]) for m in record.values["mixture"]] == [
        (open_cache(d).id, w) for d, w in zip((shared_cache, second), WEIGHTS, strict=True)
    ]
    nll = 0.0
    rows = [[s.rows for s in open_cache(d).split("validation")] for d in (shared_cache, second)]
    for parts in zip(*rows, strict=True):
        nll -= np.log(
            sum(w * np.exp(p.label_log_prob.astype(float)) for w, p in zip(WEIGHTS, parts, strict=True))
        ).sum()
    score = teacher_score(cache.split("validation"))
    assert score.ce_sum == pytest.approx(nll, rel=1e-6)
    assert record.scores[TEACHER]["loss"] == pytest.approx(score.loss)
    single = [teacher_score(open_cache(d).split("validation")).loss for d in (shared_cache, second)]
    assert score.loss <= np.average(single, weights=WEIGHTS)
    assert record.scores[AFTER]["kl_is_bound"]
    assert record.scores[AFTER]["kl_to_teacher"] > 0
    assert "distilled from a mixture of 0.25 teacher + 0.75 student" in (record.output / "model/README.md").read_text()
    # Finished, gone on with, moved and judged.
    moved = copy.deepcopy(mixing)
    moved["cache"]["mixture"][0]["directory"] = str(second.parent / "." / second.name)
    assert distill(parse_recipe(moved), resume=True).scores == record.scores
    moved["cache"]["mixture"][0]["weight"] = 4
    with pytest.raises(TrainingError, match="cache id was"):
        distill(parse_recipe(moved), resume=True)
    assert score_saved_run(record.output).scores[AFTER] == record.scores[AFTER]
    [judged] = list(evaluate([record.output], Wanted(generate=2)))
    assert judged.values["scores"][AFTER]["kl_to_teacher"] == pytest.approx(record.scores[AFTER]["kl_to_teacher"])
    assert TEACHER not in judged.values["generation"]["models"]
    with pytest.raises(CacheError, match="which is no model that could be asked"):
        list(evaluate([record.output], Wanted(generate=2, teacher="anything")))
    with pytest.raises(TrainingError, match="trained from a mixture of caches, and --cache names one"):
        open_saved_run(record.output, cache=str(shared_cache))


def test_the_same_token_is_asked_for_only_where_the_mixtures_is_known():
    head = torch.nn.Linear(4, V)
    model = SimpleNamespace(get_output_embeddings=lambda: head)
    batch = {
        "labels": torch.tensor([[-100, 1, 2, 3]]),
        "teacher_ids": torch.tensor([[5], [6], [7]]),
        "teacher_log_probs": torch.tensor([[0.6], [0.3], [0.5]]).log(),
        "teacher_log_tail": torch.tensor([0.4, 0.7, 0.5]).log(),
        "sequence_index": torch.tensor([0]),
        "sequence_targets": torch.tensor([3]),
    }
    costs = SimpleNamespace(ce_N=torch.zeros(3), divergence_N=torch.zeros(3))
    compared = []
    for mixed_ in (False, True):
        sums = SequenceSums(model, V, mixed=mixed_)
        with sums.listening():
            head(torch.randn(1, 4, 4))
            sums(batch, costs)
        compared.append(sums._sums[0][4])
    assert compared == [3.0, 2.0]


def test_a_stopped_run_on_a_mixture_goes_on_to_the_same_student(mixing, tmp_path):
    mixing["training"] |= {"max_length": 40, "max_steps": 6}
    whole = distill(parse_recipe(mixing))
    stopped = copy.deepcopy(mixing) | {"output": str(tmp_path / "stopped")}
    stopped["training"]["save_steps"] = 4

    class StopsAfterACheckpoint:
        def message(self, text):
            pass

        def warning(self, text):
            pass

        def begin(self, task, total, unit):
            self.task = task

        def end(self):
            pass

        def advance(self, amount, note=""):
            if (tmp_path / "stopped/checkpoints/checkpoint-4/trainer_state.json").exists():
                raise KeyboardInterrupt  # fmt: skip

    with pytest.raises(KeyboardInterrupt):
        distill(parse_recipe(stopped), progress=StopsAfterACheckpoint())
    assert not (tmp_path / "stopped/run.json").exists()
    again = distill(parse_recipe(stopped), resume=True)
    assert again.values["resumed_at"] == 4
    assert again.scores == whole.scores


def test_two_processes_learn_from_a_mixture_with_a_made_student_what_one_does(mixing, tmp_path, models):
    """The first process makes the student, the other waits for it; the batches are the same, and so are the losses."""
    mixing["student"] |= {
        "model": str(models / "teacher"), "init": {"method": "drop_layers", "every": 2}, "lora": {"r": 4, "dropout": 0.0},
    }  # fmt: skip
    mixing["training"] |= {"batch_size": 4, "accumulation": 2, "max_steps": 4, "logging_steps": 1}
    whole = distill(parse_recipe(mixing))
    recipe = tmp_path / "two.yaml"
    recipe.write_text(yaml.safe_dump(mixing | {"output": str(tmp_path / "two")}))
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
        "-m", "kdcache", "train-student", str(recipe), "training.accumulation=1",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    shared = load_record(tmp_path / "two")
    assert shared.values["cache_id"] == whole.values["cache_id"]
    weights = [next((run / "base").glob("*.safetensors")).read_bytes() for run in (whole.output, shared.output)]
    assert weights[0] == weights[1]
    for ours, theirs in zip(*(read_log(r.output / "log.csv") for r in (shared, whole)), strict=True):
        assert (ours["loss"], ours["kl"]) == pytest.approx((theirs["loss"], theirs["kl"]), rel=1e-3)
    assert shared.scores[AFTER]["loss"] == pytest.approx(whole.scores[AFTER]["loss"], rel=1e-3)


def holding(cache, monkeypatch, rows):
    """A mixture whose first shard has these rows, and whose caches keep nearly all, each for itself."""
    splits = tuple(s.model_copy(update={"kept_mass_mean": (0.99, 0.99)}) for s in cache.manifest.splits)
    monkeypatch.setattr(cache, "manifest", cache.manifest.model_copy(update={"splits": splits}))
    monkeypatch.setattr(cache, "shard", lambda index: SimpleNamespace(rows=rows))
    return cache


def test_the_mass_that_is_told_is_what_all_caches_hold(shared_cache, second, monkeypatch):
    cache = open_caches([(shared_cache, 1), (second, 3)])
    logits = [teacher_logits(seed=1), teacher_logits(seed=2)]
    logits[1] = logits[0] + 0.4 * logits[1]
    rows = [chosen_rows("top_k", y, empty=False) for y in logits]
    holding(cache, monkeypatch, mixed(*rows))
    for temperature in (1.0, 2.0):
        _, mixture_ = probabilities(temperature, *logits)
        common = [
            sum(mixture_[n, i] for i in {*rows[0].slice(n, n + 1).head_ids} & {*rows[1].slice(n, n + 1).head_ids})
            for n in range(N)
        ]
        assert common_mass(cache, temperature) == (pytest.approx(np.mean(common), rel=1e-3), N)
    # Both caches keep 99 per cent, and nothing of it in common.
    apart = []
    for start in (0, 20):
        y = torch.full((4, V), -4.0)
        y[:, start : start + 7] = 3.0
        apart.append(select(y, torch.zeros(4, dtype=torch.int64), SELECTIONS["top_k"], np.zeros((4, 0))).rows)
    holding(cache, monkeypatch, mixed(*apart))
    for changes, what in (
        ({"tail": "lumped", "temperature": 2.0}, "taught and scored"),
        ({"tail": "lumped", "temperature": 1.7}, "taught and scored"),
        ({"temperature": 2.0}, "scored"),
        ({"tail": "renormalised", "temperature": 2.0}, "scored"),
    ):
        heard = Told()
        tell_of_tail(LossSection(**changes), cache, heard)
        [low] = [w for w in heard.warnings if "the cache declares" not in w]
        assert low.startswith(f"students are {what} by the entries that all 2 caches hold: 0.0% of the mixture's")
    # What all hold is no cause for a warning.
    holding(cache, monkeypatch, mixed(apart[0], apart[0]))
    heard = Told()
    tell_of_tail(LossSection(tail="lumped", temperature=1.0), cache, heard)
    assert heard.warnings == []
    assert "students are taught and scored by" in heard.messages[-1]


def test_how_often_shards_of_another_cut_are_decoded_is_told(shared_cache, second, monkeypatch):
    first, other = open_cache(shared_cache), open_cache(second)
    # Few shards stay all in memory, and equal cuts need no memory.
    assert decodings(first, other) == decodings(first, first) == 1
    monkeypatch.setattr("kdcache.cache.mixture._KEPT_BESIDE", 1)
    ours, theirs = (c.split("train").starts for c in (first, other))
    meeting = sum(a < d and c < b for a, b in pairwise(ours) for c, d in pairwise(theirs))
    assert decodings(first, other) == meeting / (len(theirs) - 1) > 1
    assert decodings(first, first) == 1
    heard = Told()
    cache = open_caches([(shared_cache, 1), (second, 1)], progress=heard)
    assert f"decodes each of its shards up to {meeting / (len(theirs) - 1):.1f} times" in heard.messages[-1]
    # In the worst order, with one shard kept, that is what happens.
    loaded, load = [], cache.parts[1].load
    monkeypatch.setattr(cache.parts[1], "load", lambda index: (loaded.append(index), load(index))[1])
    split = cache.split("train")
    for index in [*split.shards[::2], *split.shards[1::2]]:
        cache.load(index)
    assert len(theirs) - 1 < len(loaded) <= meeting
    again = Told()
    open_caches([(shared_cache, 1), (shared_cache, 2)], progress=again)
    assert len(again.messages) == 1


def test_dry_run_and_sweep_of_a_mixture(mixing, shared_cache):
    assert estimate_training(parse_recipe(mixing)).steps == 12
    mixing["sweep"] = {"grid": {"cache.weight": [1, 2]}, "rows": {"alone": {"cache.mixture": [], "cache.weight": 1}}}
    rows = ready_rows(parse_recipe(mixing))
    assert [r.recipe.cache.weight for r in rows] == [1, 1, 2]
    assert rows[0].recipe.cache.mixture == ()
    mixing["sweep"]["rows"]["alone"] = {"cache.mixture": [{"directory": "/nowhere"}]}
    with pytest.raises(CacheError, match="row alone: /nowhere is not a cache"):
        ready_rows(parse_recipe(mixing))
    with pytest.raises(CacheError, match="row alone: /nowhere is not a cache"):
        ready_rows(parse_recipe(mixing), cache_to_come=True)


def other_cache(base_values, folder, changes):
    values = copy.deepcopy(base_values)
    values["cache"]["directory"] = str(folder)
    for key, value in changes.items():
        *sections, last = key.split(".")
        at = values
        for section in sections:
            at = at.setdefault(section, {})
        at[last] = value
    return capture(parse_recipe(values)).directory


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"data.max_length": 40},
            r"48 of them against 45; sequence 0 from position 40 on \(42 tokens against 40\); sequence 1 from",
        ),
        ({"data.train.split": "train[:40]"}, r"split train: 48 of them against 40\. "),
        (
            {"data.train.split": "train[1:]"},
            r"48 of them against 47; sequence 0 from position \d+ on \(token \d+ against \d+\)",
        ),
        ({"data.system": "Be brief."}, r"sequence 0 from position \d+ on \(token "),
        ({"selection": {"positions": "loss", "quantile": 0.5}}, "keeps positions by loss alone"),
        ({"selection": {"temperatures": [1.5]}}, r"declare a temperature in common, found .* T = 1, 2; .* T = 1\.5"),
    ],
)
def test_caches_that_cannot_be_mixed_are_refused_with_the_reason(base_values, shared_cache, tmp_path, changes, message):
    other = other_cache(base_values, tmp_path / "other", changes)
    with pytest.raises(CacheError, match=message):
        open_caches([(shared_cache, 1), (other, 1)])


def test_other_targets_splits_weights_and_vocabularies_are_refused(shared_cache, second, tmp_path, monkeypatch):
    first = open_cache(shared_cache)
    half = subset(first, tmp_path / "half", splits=["validation"]).directory
    with pytest.raises(
        PlanMismatchError, match=r"has the splits train, validation, .* validation: caches that are mixed"
    ):
        open_caches([(shared_cache, 1), (half, 1)])
    with pytest.raises(CacheError, match=r"the weight of .* should be above 0, found -1"):
        open_caches([(shared_cache, 2), (second, -1)])
    other = open_cache(second)
    changed = other.plan.tokenizer.model_copy(update={"fingerprint": "0" * 64})
    monkeypatch.setattr(other, "plan", other.plan.model_copy(update={"tokenizer": changed}))
    monkeypatch.setattr(other, "vocabulary", lambda: [*first.vocabulary()[:5], "else"])
    with pytest.raises(
        PlanMismatchError,
        match=r"different vocabularies \([\d,]+ and 6 tokens; id 5 is .* and 'else'\).*optimal transport",
    ):
        Mixture([(first, 1), (other, 1)])


def test_a_cache_whose_shards_are_not_its_plans_is_noticed(shared_cache, second, monkeypatch):
    cache = open_caches([(shared_cache, 1), (second, 1)])
    other = cache.parts[1]
    content = other.load(0)
    content.token_ids[3] += 1
    monkeypatch.setattr(other, "load", lambda index: content)
    monkeypatch.setattr(other, "shard", lambda index: content)
    with pytest.raises(CorruptCacheError, match="are not those that its plan states"):
        cache.split("train")[0]


def test_recipe_keys_of_a_mixture(values):
    values["cache"]["mixture"] = [{"directory": "a"}]
    assert parse_recipe(values).cache.places == ((values["cache"]["directory"], 1.0), ("a", 1.0))
    for mixture, message in (
        ([{"directory": "a", "weight": 0}], r"cache\.mixture\.0\.weight: .* greater than 0"),
        ([{"weight": 1}], r"lacks cache\.mixture\.0\.directory"),
        ([{"directory": "a", "wait": 1}], r"unknown recipe key cache\.mixture\.0\.wait"),
        ("a", r"cache\.mixture should be a list"),
    ):
        with pytest.raises(RecipeError, match=message):
            parse_recipe({**values, "cache": {**values["cache"], "mixture": mixture}})
    with pytest.raises(RecipeError, match=r"cache\.weight goes with cache\.mixture"):
        parse_recipe({**values, "cache": {"directory": "a", "weight": 2}})


def test_train_student_says_what_is_mixed(mixing, tmp_path):
    (tmp_path / "recipe.yaml").write_text(json.dumps(mixing))
    found = CliRunner().invoke(
        app, ["train-student", str(tmp_path / "recipe.yaml"), "training.max_steps=2"], catch_exceptions=False
    )
    said = " ".join(found.output.split())
    assert "a mixture of 2 caches: 0.25 of " in said
    assert "the weights were divided by their sum, 4" in said
    assert "is a lower bound" in said
    broken = copy.deepcopy(mixing)
    broken["cache"]["mixture"][0]["directory"] = str(tmp_path)
    with pytest.raises(KdcacheError, match="is not a cache"):
        distill(parse_recipe(broken))
