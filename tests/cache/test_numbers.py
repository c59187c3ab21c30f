"""Numbers and the bytes they become: what is kept exactly, and how far the rest may be off."""

import dataclasses

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from kdcache.cache.invariants import check_rows
from kdcache.cache.layout import HEAD_STEP, REST_LIMIT, TAIL_STEP
from kdcache.cache.numbers import (
    decode_half,
    decode_rest,
    decode_values,
    encode_half,
    encode_rest,
    encode_values,
    from_planes,
    id_steps,
    ids_of_steps,
    to_planes,
)
from kdcache.errors import CorruptCacheError
from tests.cache.samples import VOCAB, sample_rows

LARGEST_ID = (1 << 24) - 1
rising = st.lists(st.integers(0, LARGEST_ID), max_size=8, unique=True).map(sorted)
# Zero, smaller than any step, a tie between two steps, ordinary, next to the limits, far beyond them.
ADVERSARIAL = [0.0, -1e-30, -1e-9, -(2.0**-5), -(2.0**-2), -0.03125001, -17.3, -4095.9, -4096.1, -65504.0, -1e9]


def float32s(low, high):
    return arrays.arrays(
        np.float32, st.integers(0, 20), elements=st.floats(np.float32(low), np.float32(high), width=32)
    )


def offsets(counts):
    return np.concatenate(([0], np.cumsum(counts, dtype=np.int64)))


@given(width=st.integers(1, 4), data=st.data())
def test_planes_hold_every_number_of_their_width(width, data):
    numbers = data.draw(st.lists(st.integers(0, 256**width - 1), max_size=20))
    planes = to_planes(np.array(numbers, dtype=np.uint32), width)
    assert planes.shape == (width, len(numbers))
    assert from_planes(planes).tolist() == numbers
    for place in range(width):
        assert planes[place].tolist() == [n >> (8 * place) & 255 for n in numbers]


@given(rows=st.lists(rising, max_size=6))
@example(rows=[])
@example(rows=[[], [LARGEST_ID], [], [0, LARGEST_ID], [LARGEST_ID - 1, LARGEST_ID], []])
def test_id_steps_round_trip_over_empty_and_single_rows(rows):
    counts = np.array([len(r) for r in rows], dtype=np.int64)
    ids = np.array([i for r in rows for i in r], dtype=np.uint32)
    steps = id_steps(ids, offsets(counts))
    # The first of a row, then how much further each next one lies.
    assert steps.tolist() == [b - a for r in rows for a, b in zip([0, *r], r, strict=False)]
    kept = from_planes(to_planes(steps, 3))
    assert np.array_equal(ids_of_steps(kept, counts), ids)


@given(
    seed=st.integers(0, 10_000), place=st.integers(0, 10_000), flip=st.integers(1, (1 << 16) - 1), tail=st.booleans()
)
def test_damaged_id_steps_give_other_ids_or_are_refused_as_ids(seed, place, flip, tail):
    """Two planes of a small vocabulary: steps that leave it or stand still are never taken for ids."""
    rows = sample_rows(4, seed=seed % 7)
    name = "tail" if tail else "head"
    ids, counts = getattr(rows, f"{name}_ids"), getattr(rows, name)
    steps = id_steps(ids, offsets(counts))
    steps[place % len(steps)] ^= flip
    back = dataclasses.replace(rows, **{f"{name}_ids": ids_of_steps(steps, counts)})
    row_of = np.repeat(np.arange(4), counts)
    damaged = getattr(back, f"{name}_ids").astype(np.int64)
    twice = set(zip(np.repeat(np.arange(4), back.head), back.head_ids.tolist(), strict=True)) & set(
        zip(np.repeat(np.arange(4), back.tail), back.tail_ids.tolist(), strict=True)
    )
    falls = (np.diff(damaged) <= 0) & (np.diff(row_of) == 0)
    if (damaged >= VOCAB).any() or falls.any() or twice:
        with pytest.raises(CorruptCacheError, match=r"invariant [67] "):
            check_rows(back)
    else:
        check_rows(back)
        assert not np.array_equal(damaged, ids)


@pytest.mark.parametrize("steps", [[5, 0], [5, 2**32 - 3], [2**32 - 1, 1], [2**32 - 2, 4]])
def test_id_steps_that_wrap_around_are_refused(steps):
    rows = sample_rows(1)
    rows = dataclasses.replace(rows.slice(0, 1).emptied(np.array([False])), head=np.array([2]))
    ids = ids_of_steps(np.array(steps, dtype=np.uint32), np.array([2]))
    rows = dataclasses.replace(rows, head_ids=ids, head_logits=np.zeros(2, dtype=np.float32))
    with pytest.raises(CorruptCacheError, match=r"invariant [67] "):
        check_rows(rows)


def test_steps_of_three_planes_cannot_wrap_past_the_largest_vocabulary():
    """Each step is below 2^24: on the way round 2^32 an id stands beyond any vocabulary."""
    ids = ids_of_steps(np.full(300, LARGEST_ID, dtype=np.uint32), np.array([300]))
    assert ids[0] == LARGEST_ID
    assert (np.diff(ids.astype(np.int64)) < 0).any()
    assert int(ids.max()) > LARGEST_ID


@pytest.mark.parametrize("step", [HEAD_STEP, TAIL_STEP])
@given(logits=float32s(-1e4, 0.0))
@example(logits=np.array(ADVERSARIAL, dtype=np.float32))
@example(logits=np.array([-np.inf, -1e30], dtype=np.float32))
def test_quantised_values_are_off_by_half_a_step_down_to_the_limit(step, logits):
    planes = encode_values(logits, step, "quantised")
    back = decode_values(planes, step, "quantised")
    limit = -65535 * step
    assert np.abs(back - np.maximum(logits, limit)).max(initial=0.0) <= step / 2
    assert (back <= 0).all()
    assert np.array_equal(encode_values(back, step, "quantised"), planes)


@given(numbers=float32s(-1e5, 0.0))
@example(numbers=np.array(ADVERSARIAL, dtype=np.float32))
@example(numbers=np.array([-np.inf, -1e30, -65519.0], dtype=np.float32))
def test_half_precision_is_off_by_its_rounding_and_never_infinite(numbers):
    planes = encode_half(numbers)
    back = decode_half(planes)
    within = np.maximum(numbers, -65504.0).astype(np.float64)
    assert np.isfinite(back).all()
    assert (np.abs(back - within) <= np.maximum(2.0**-11 * np.abs(within), 2.0**-25)).all()
    assert np.array_equal(encode_half(back), planes)
    for values in (encode_values(numbers, HEAD_STEP, "half"), encode_values(numbers, TAIL_STEP, "half")):
        assert np.array_equal(values, planes)
        assert np.array_equal(decode_values(values, HEAD_STEP, "half"), back)


@given(
    rest=arrays.arrays(
        np.float32,
        st.tuples(st.integers(0, 6), st.integers(1, 4)),
        elements=st.floats(-REST_LIMIT, 31.0, width=32),
    )
)
@example(rest=np.array([[-32.0, 0.0], [2.0**-11, -(2.0**-11)], [31.99, -1e-9]], dtype=np.float32))
def test_the_rest_is_off_by_half_a_step_and_neither_mass_by_more_than_its_share(rest):
    planes = encode_rest(rest)
    assert planes.shape == (2, *rest.T.shape)
    back = decode_rest(planes)
    assert np.abs(back.astype(np.float64) - rest).max(initial=0.0) <= 2.0**-11
    for sign in (1.0, -1.0):
        truth, found = (-np.logaddexp(0.0, sign * x.astype(np.float64)) for x in (rest, back))
        assert np.abs(found - truth).max(initial=0.0) <= 2.0**-11
    assert np.array_equal(encode_rest(back), planes)


def test_log_odds_beyond_the_limit_become_the_limit():
    rest = np.array([[-40.0], [-np.inf], [40.0]], dtype=np.float32)
    assert decode_rest(encode_rest(rest)).ravel().tolist() == [-32.0, -32.0, 32.0 - 2.0**-10]
