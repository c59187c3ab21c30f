"""The numbers behind draws, and the positions that are kept: functions of the plan and the sequence alone."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdcache.data.tokens import TokenRow
from kdcache.teacher.draws import thin, uniforms
from tests.cache.samples import sample_rows

DIGEST = "0" * 63 + "1"


def token_row(ids=(5, 6, 7, 300), targets=(0, 1, 0, 1), index=0):
    return TokenRow(index, np.array(ids, dtype=np.uint32), np.array(targets, dtype=bool))


def test_numbers_are_those_of_plan_and_sequence_and_of_nothing_else():
    base = uniforms(DIGEST, token_row(), 3)
    assert base.shape == (2, 3)
    assert np.array_equal(base, uniforms(DIGEST, token_row(index=9), 3))
    others = [
        uniforms("0" * 63 + "2", token_row(), 3),
        uniforms(DIGEST, token_row(ids=(5, 6, 8, 300)), 3),
        uniforms(DIGEST, token_row(targets=(0, 0, 1, 1)), 3),
    ]
    for other in others:
        assert not np.isin(other, base).any()


def test_numbers_are_the_hash_that_the_format_names():
    # hashlib.shake_256(bytes.fromhex(DIGEST) + sequence digest).digest(16), upper 53 of 64 bits little-endian, each
    assert uniforms(DIGEST, token_row(), 1).ravel().tolist() == [0.6986979156387706, 0.20720856254766218]


def test_numbers_are_spread_evenly():
    row = token_row(ids=range(4001), targets=[0] + [1] * 4000)
    numbers = uniforms(DIGEST, row, 1)
    assert (numbers >= 0).all()
    assert (numbers < 1).all()
    counts = np.histogram(numbers, bins=20, range=(0, 1))[0]
    assert np.abs(counts - 200).max() < 70  # five standard deviations of a fair draw


@given(
    positions=st.integers(1, 40),
    eighths=st.integers(0, 7),
    by=st.sampled_from(["entropy", "loss"]),
    seed=st.integers(0, 50),
)
def test_the_share_that_teaches_most_is_kept_and_ties_go_to_the_earlier(positions, eighths, by, seed):
    rows = sample_rows(positions, seed=seed)
    entropy = np.random.default_rng(seed).integers(0, 6, positions).astype(np.float32)
    thinned = thin(rows, entropy, by=by, quantile=eighths / 8)
    score = entropy if by == "entropy" else -rows.label_log_prob
    kept = -(-positions * (8 - eighths) // 8)  # the ceiling
    best = sorted(range(positions), key=lambda i: (-score[i], i))[:kept]
    assert np.flatnonzero(thinned.kept).tolist() == sorted(best)
    assert np.array_equal(thinned.label_log_prob, rows.label_log_prob)
    for i in best:
        assert np.array_equal(thinned.slice(i, i + 1).head_ids, rows.slice(i, i + 1).head_ids)
        assert np.array_equal(thinned.slice(i, i + 1).tail_ids, rows.slice(i, i + 1).tail_ids)
        assert np.array_equal(thinned.rest[i], rows.rest[i])


@pytest.mark.parametrize("by", ["entropy", "loss"])
def test_a_sequence_never_loses_all_its_positions(by):
    rows = sample_rows(1)
    assert thin(rows, np.zeros(1, dtype=np.float32), by=by, quantile=0.999).kept.all()
