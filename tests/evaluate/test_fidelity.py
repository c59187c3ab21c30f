"""The fidelity report against dense float64 arithmetic, and its command on a cache and on a recipe."""

import json
import shutil

import numpy as np
import pytest
import torch

from kdcache.cache.reader import open_cache
from kdcache.errors import CacheError, PlanMismatchError, TokenizerError
from kdcache.evaluate.fidelity import FidelityMeter
from kdcache.evaluate.fidelity_run import cache_fidelity, recipe_fidelity
from kdcache.head import Head
from kdcache.recipe import parse_recipe
from kdcache.report import FIDELITY_COLUMNS, fidelity_rows, parts_rows, write_fidelity
from kdcache.teacher.capture import capture
from kdcache.teacher.estimate import estimate
from kdcache.teacher.select import Selection, select

V, N, D = 300, 40, 12
T12 = (1.0, 2.0)


@pytest.fixture(scope="module")
def logits():
    return torch.randn(N, V, generator=torch.Generator().manual_seed(0)) * 3


def rows_of(logits, selection, seed=0):
    uniforms = np.random.default_rng(seed).random((len(logits), selection.uniforms)) if selection.uniforms else None
    return select(logits, logits.argmax(dim=1), selection, uniforms).rows


def dense(rows, t):
    """[N, V] float64: the head as stored and what is left spread evenly, as the report rebuilds a distribution."""
    rebuilt = np.zeros((len(rows), V))
    log_z = rows.log_partition_at(t)
    for n in range(len(rows)):
        own = slice(rows.head_offsets[n], rows.head_offsets[n + 1])
        ids = rows.head_ids[own].astype(int)
        head = np.exp(rows.head_logits[own].astype(np.float64) / t - log_z[n])
        rebuilt[n] = (1 - head.sum()) / (V - len(ids))
        rebuilt[n, ids] = head
    return rebuilt


@pytest.mark.parametrize("temperature", [1.0, 1.5, 2.0])
def test_figures_are_those_of_dense_distributions(logits, temperature):
    rows = rows_of(logits, Selection("top_k", T12, k=9))
    meter = FidelityMeter((temperature,))
    for start in range(0, N, 16):
        meter.add(logits[start : start + 16], {"a": rows.slice(start, min(start + 16, N))})
    found = meter.results("a")[0]
    p = torch.softmax(logits.double() / temperature, dim=1).numpy()
    q = dense(rows, temperature)
    kl = (p * np.log(p / q)).sum(axis=1)
    mass = np.sort(p, axis=1)[:, -9:].sum(axis=1)
    assert found.kept_mass == pytest.approx(mass.mean(), abs=1e-5)
    assert found.kept_mass_p1 == pytest.approx(np.quantile(mass, 0.01), abs=1e-5)
    assert found.kl == pytest.approx(kl.mean(), abs=1e-4)
    assert found.kl_p99 == pytest.approx(np.quantile(kl, 0.99), abs=1e-3)
    assert found.total_variation == pytest.approx(0.5 * np.abs(p - q).sum(axis=1).mean(), abs=1e-5)
    assert found.top_1 == 1.0
    assert found.gradient_cosine is None


@pytest.mark.parametrize(
    "selection",
    [Selection("top_k", T12, k=9), Selection("threshold_sampling", T12, floors=(0.05, 0.05))],
    ids=lambda s: s.method,
)
def test_the_gradient_is_that_of_the_students_head(logits, selection):
    generator = torch.Generator().manual_seed(1)
    hidden, head = torch.randn(N, D, generator=generator), torch.randn(V, D, generator=generator)
    rows, t = rows_of(logits, selection), 2.0
    meter = FidelityMeter((t,), Head(head, None))
    meter.add(logits, {"a": rows}, hidden)
    found = meter.results("a")[0]

    def gradient(target, rest):
        leaf = head.double().requires_grad_(True)
        log_q = torch.log_softmax(hidden.double() @ leaf.T / t, dim=1)
        loss = -(target * log_q).sum()
        if rest is not None:
            outside, mass = rest
            loss = loss - (mass * torch.logsumexp(log_q.masked_fill(~outside, -torch.inf), dim=1)).sum()
        return torch.autograd.grad(t * t * loss, leaf)[0]

    full = gradient(torch.softmax(logits.double() / t, dim=1), None)
    log_z = rows.log_partition_at(t)
    head_weights, tail_weights = rows.log_weights_at(t, log_z)
    target = torch.zeros(N, V, dtype=torch.float64)
    for counts, ids, weights in (
        (rows.head, rows.head_ids, head_weights),
        (rows.tail, rows.tail_ids, tail_weights),
    ):
        owner = np.repeat(np.arange(N), counts)
        target[owner, ids.astype(int)] = torch.from_numpy(np.exp(weights.astype(np.float64)))
    rest = None if rows.design.sampled else (target == 0, 1 - target.sum(dim=1))
    ours = gradient(target, rest)
    assert found.gradient_error == pytest.approx(float((ours - full).norm() / full.norm()), rel=1e-3)
    assert found.gradient_cosine == pytest.approx(float((ours * full).sum() / (ours.norm() * full.norm())), abs=1e-4)


def test_a_setting_is_left_out_where_it_has_nothing_to_say(logits):
    rows = {
        "declared 1, 2": rows_of(logits, Selection("top_k", T12, k=9)),
        "ids alone": rows_of(logits, Selection("threshold_sampling", (2.0,), floors=(0.05,), tail_logits=False)),
    }
    meter = FidelityMeter((0.5, 1.0, 2.0, 4.0))
    meter.add(logits, rows)
    assert [f.temperature for f in meter.results("declared 1, 2")] == [1.0, 2.0, 4.0]
    assert [f.temperature for f in meter.results("ids alone")] == [2.0, 4.0]


def test_a_cache_that_holds_everything_is_perfect(logits):
    rows = rows_of(logits, Selection("top_k", T12, k=V))
    meter = FidelityMeter((1.0, 2.0))
    meter.add(logits, {"all": rows})
    for f in meter.results("all"):
        assert f.kept_mass == pytest.approx(1.0, abs=1e-5)
        assert f.kl == pytest.approx(0.0, abs=1e-5)
        assert f.total_variation == pytest.approx(0.0, abs=1e-5)


def test_a_report_on_a_cache_and_what_is_written_of_it(shared_cache, models, tmp_path):
    report = cache_fidelity(
        shared_cache, teacher=str(models / "teacher"), student=str(models / "student"), positions=120, compare=True
    )
    chosen = report.settings[0]
    assert chosen.name == "chosen"
    assert [f.temperature for f in chosen.figures] == [1.0, 1.5, 2.0, 4.0]
    assert all(f.gradient_error is not None for f in chosen.figures)
    assert len(report.settings) > 4
    # Its parts, compressed alone, come to about the whole.
    assert sum(chosen.parts.values()) == pytest.approx(chosen.bytes_per_position, rel=0.25)
    cells = fidelity_rows(report)
    assert all(len(row) == len(FIDELITY_COLUMNS) for row in cells)
    assert len(parts_rows(report)) == len(report.settings)
    paths = write_fidelity(report, tmp_path / "out")
    assert [p.name for p in paths] == ["fidelity.md", "fidelity.json", "fidelity.png"]
    assert json.loads(paths[1].read_text())["settings"][0]["name"] == "chosen"
    assert paths[2].read_bytes().startswith(b"\x89PNG")


def test_what_a_recipe_would_give_is_what_its_cache_gives(base_values, shared_cache, models):
    """The same sequences, from the recipe and from the cache: the same rows up to their draws."""
    everything = 10**6
    planned = recipe_fidelity(parse_recipe(base_values), student=None, positions=everything, compare=False)
    stored = cache_fidelity(
        shared_cache, teacher=str(models / "teacher"), student=None, positions=everything, compare=False
    )
    summary = open_cache(shared_cache).split("train").summary
    assert stored.positions == summary.positions
    for t, found in ((1.0, stored.settings[0].figures[0]), (2.0, stored.settings[0].figures[2])):
        column = open_cache(shared_cache).temperatures.index(t)
        assert found.kept_mass == pytest.approx(summary.kept_mass_mean[column], abs=1e-3)
        assert found.gradient_error is None
    # Both splits against one.
    assert planned.positions > stored.positions
    assert planned.settings[0].figures[0].kl == pytest.approx(stored.settings[0].figures[0].kl, rel=0.2)


def test_another_teacher_or_a_student_with_other_tokens_is_refused(shared_cache, models, tmp_path):
    options = {"positions": 50, "compare": False}
    with pytest.raises(CacheError, match="is not the teacher of"):
        cache_fidelity(shared_cache, teacher=str(models / "student"), student=None, **options)
    with pytest.raises(CacheError, match=r"is not found at /nowhere/model; say where it lies with --teacher"):
        cache_fidelity(shared_cache, teacher="/nowhere/model", student=None, **options)
    shutil.copytree(models / "student", tmp_path / "other")
    vocabulary = json.loads((tmp_path / "other" / "tokenizer.json").read_text())
    tokens = vocabulary["model"]["vocab"]
    first, second = sorted(tokens, key=tokens.get)[50:52]
    tokens[first], tokens[second] = tokens[second], tokens[first]
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(vocabulary))
    with pytest.raises(TokenizerError):
        cache_fidelity(shared_cache, teacher=str(models / "teacher"), student=str(tmp_path / "other"), **options)


def test_a_recipe_can_be_tried_while_a_cache_of_other_settings_is_there(base_values, shared_cache):
    values = {**base_values, "selection": {"bytes_per_position": 30}}
    report = recipe_fidelity(parse_recipe(values), student=None, positions=200, compare=False)
    assert report.settings[0].bytes_per_position < 40
    assert estimate(parse_recipe(values)).positions > 0
    with pytest.raises(PlanMismatchError, match=r"selection\.bytes_per_position"):
        capture(parse_recipe(values))
