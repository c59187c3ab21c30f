"""Selection against dense float64 arithmetic, on ordinary and adversarial rows."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcache.teacher.forward import length_buckets
from kdcache.teacher.select import Selection, select, top_k
from tests.reference import log_softmax

T12 = (1.0, 2.0)


def rank(logits):
    """Ids by falling logit, ties by lowest id."""
    return sorted(range(len(logits)), key=lambda v: (-logits[v], v))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000), width=st.integers(2, 120), levels=st.sampled_from([1, 2, 3, 10, 1000]), data=st.data()
)
def test_top_k_is_exact_and_breaks_ties_by_lowest_id(seed, width, levels, data):
    k = data.draw(st.integers(1, width))
    logits = torch.from_numpy(np.random.default_rng(seed).integers(0, levels, (4, width)).astype(np.float32))
    values, ids = top_k(logits, k)
    for row in range(4):
        expected = rank(logits[row].tolist())[:k]
        assert ids[row].tolist() == expected
        assert values[row].tolist() == logits[row, expected].tolist()


def test_rows_hold_exact_partitions_and_labels():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(20, 300, generator=g) * 4
    labels = torch.randint(300, (20,), generator=g)
    rows = select(logits, labels, Selection("top_k", 16, 0.0, T12))
    rows.check()
    relative = logits.double().numpy() - logits.double().numpy().max(axis=1, keepdims=True)
    for column, t in enumerate(T12):
        exact = np.log(np.exp(relative / t).sum(axis=1))
        assert np.allclose(rows.log_partition[:, column], exact, rtol=1e-6, atol=1e-6)
    assert np.allclose(rows.label_log_prob, log_softmax(logits.numpy())[np.arange(20), labels], atol=1e-5)
    kept = rows.logits.reshape(20, 16).astype(np.float64)
    exact_kept = np.sort(relative, axis=1)[:, ::-1][:, :16]
    assert np.abs(kept - exact_kept).max() <= np.abs(exact_kept).max() * 2.0**-11
    mass = np.sort(np.exp(log_softmax(logits.numpy())), axis=1)[:, ::-1][:, :16].sum(axis=1)
    assert np.allclose(rows.kept_mass()[:, 0], mass, atol=1e-3)


def test_threshold_keeps_what_reaches_the_floor_at_any_temperature_up_to_the_cap():
    logits = torch.randn(30, 200, generator=torch.Generator().manual_seed(1)) * 3
    labels = torch.zeros(30, dtype=torch.int64)
    rows = select(logits, labels, Selection("threshold", 20, 0.01, T12))
    rows.check()
    for row in range(30):
        p = np.maximum(*(np.exp(log_softmax(logits[row].numpy(), t)) for t in T12))
        assert rows.head[row] == min(20, max(1, int((p >= 0.01).sum())))


@pytest.mark.parametrize("name", ["equal", "one_hot", "masked", "huge"])
def test_adversarial_rows(name):
    logits = {
        "equal": torch.zeros(1, 50),
        "one_hot": torch.full((1, 50), -1e4).index_fill_(1, torch.tensor([7]), 0.0),
        "masked": torch.full((1, 50), -torch.inf).index_fill_(1, torch.tensor([3, 4]), 1.0),
        "huge": torch.linspace(-1, 1, 50)[None] * 1.5e38,
    }[name]
    best = int(logits.argmax())
    rows = select(logits, torch.tensor([best]), Selection("top_k", 10, 0.0, T12))
    rows.check()
    assert rows.ids[0] == best
    assert rows.head[0] == {"masked": 2}.get(name, 10)


def test_k_as_large_as_the_vocabulary_keeps_everything():
    logits = torch.randn(3, 12, generator=torch.Generator().manual_seed(2))
    rows = select(logits, torch.tensor([0, 1, 2]), Selection("top_k", 12, 0.0, (1.0,)))
    rows.check()
    assert np.allclose(rows.kept_mass(), 1.0, atol=1e-3)


@given(st.lists(st.integers(2, 200), min_size=1, max_size=50), st.integers(16, 400))
def test_buckets_hold_every_row_once_within_the_token_budget(lengths, budget):
    buckets = length_buckets(lengths, budget)
    assert sorted(i for b in buckets for i in b) == list(range(len(lengths)))
    for bucket in buckets:
        assert len(bucket) == 1 or len(bucket) * max(lengths[i] for i in bucket) <= budget
