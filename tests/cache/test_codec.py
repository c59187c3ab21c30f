"""Content -> arrays -> content: what survives, how far the rest is off, and the very bytes."""

import dataclasses
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcache.cache.codec import ShardContent, decode, encode
from kdcache.cache.layout import HEAD_STEP, TAIL_STEP
from kdcache.cache.rows import RowDesign, SparseRows
from kdcache.teacher.select import Selection, select
from tests.cache.samples import stored

METHODS = ["top_k", "threshold", "threshold_sampling", "random_sampling", "ids_alone"]


def selection(method, *, k=5, floor=0.05, draws=7):
    if method == "ids_alone":
        return Selection("threshold_sampling", (2.0,), floors=(floor,), tail_logits=False)
    temperatures = (1.0,) if method == "random_sampling" else (1.0, 2.0)
    floors = (floor, floor / 2) if method.startswith("threshold") else ()
    return Selection(method, temperatures, k=k, floors=floors, draws=draws)


def random_logits(kind, positions, width, generator):
    normal = torch.from_numpy(generator.normal(size=(positions, width)).astype(np.float32))
    if kind == "ordinary":
        return normal * 4
    if kind == "ties":
        return (normal * 2).round()
    if kind == "flat":
        return torch.full_like(normal, 3.0)
    if kind == "one_hot":
        return torch.full_like(normal, -1e4).index_fill_(1, torch.tensor([width // 2]), 0.0)
    if kind == "masked":
        keep = torch.zeros(width, dtype=torch.bool)
        keep[generator.permutation(width)[: width // 2 + 1]] = True
        return torch.where(keep, normal * 3, -torch.inf)
    return normal * {"large": 1e4, "huge": 1e38}[kind]


def content_of(rows, generator):
    """The rows as those of one sequence."""
    targets = np.r_[False, np.ones(len(rows), dtype=bool)]
    ids = generator.integers(0, rows.design.vocab_size, len(targets)).astype(np.uint32)
    return ShardContent(np.array([len(targets)], dtype=np.int64), ids, targets, rows)


def random_content(method, kind, *, seed=0, width=60, positions=6):
    generator = np.random.default_rng(seed)
    logits = random_logits(kind, positions, width, generator)
    chosen = selection(method)
    # The label has a probability, as any token of a training text should.
    rows = select(logits, logits.argmax(dim=1), chosen, generator.random((positions, chosen.uniforms))).rows
    return content_of(rows, generator)


def assert_within_bounds(found, truth, values):
    for ours, exact, step in (
        (found.head_logits, truth.head_logits, HEAD_STEP),
        (found.tail_logits, truth.tail_logits, TAIL_STEP),
    ):
        half = values == "half" or (step == TAIL_STEP and not truth.design.tail_logits)
        exact = np.maximum(exact.astype(np.float64), -65504.0 if half else -65535.0 * step)
        bound = np.maximum(2.0**-11 * np.abs(exact), 2.0**-25) if half else np.full(len(exact), step / 2)
        assert (np.abs(ours - exact) <= bound).all()


@pytest.mark.parametrize("values", ["quantised", "half"])
@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=15, deadline=None)
@given(
    kind=st.sampled_from(["ordinary", "ties", "flat", "one_hot", "masked", "large"]),
    seed=st.integers(0, 10_000),
    width=st.integers(2, 90),
)
def test_round_trip(method, values, kind, seed, width):
    content = random_content(method, kind, seed=seed, width=width)
    rows, back = content.rows, stored(content, values=values)
    found = back.rows
    for name in ("lengths", "token_ids", "targets"):
        assert np.array_equal(getattr(back, name), getattr(content, name)), name
    for name in ("head", "tail", "head_ids", "tail_ids", "head_counts", "tail_counts", "design"):
        assert np.array_equal(getattr(found, name), getattr(rows, name)), name
    assert_within_bounds(found, rows, values)
    label = rows.label_log_prob.astype(np.float64)
    assert (np.abs(found.label_log_prob - label) <= np.maximum(2.0**-11 * np.abs(label), 2.0**-25)).all()
    # The head's mass is what it was, however coarse its logits are now; and it and the rest are all there is.
    mass = rows.kept_mass()
    assert np.abs(found.kept_mass() / mass - 1).max() <= np.expm1(2.0**-11) + 1e-6
    for column, t in enumerate(rows.design.temperatures):
        log_z = found.log_partition_at(t)
        inside = np.exp(found.head_log_sum(t) - log_z)
        assert np.allclose(inside, found.kept_mass()[:, column], rtol=1e-9)
        outside = np.exp(found.head_log_sum(t) + found.rest[:, column] - log_z)
        assert np.allclose(inside + outside, 1.0, rtol=1e-12)
    again = encode(back, values=values)
    for name, array in encode(content, values=values).items():
        assert again[name].dtype == array.dtype, name
        assert np.array_equal(again[name], array), name


@pytest.mark.parametrize("values", ["quantised", "half"])
@pytest.mark.parametrize("method", METHODS)
def test_logits_near_the_largest_float_are_cut_and_not_an_overflow(method, values):
    content = random_content(method, "huge")
    found = stored(content, values=values).rows
    assert np.array_equal(found.head_ids, content.rows.head_ids)
    assert_within_bounds(found, content.rows, values)


@pytest.mark.parametrize("method", METHODS)
def test_rows_left_empty_stay_empty(method):
    content = random_content(method, "ordinary")
    for keep in (np.arange(6) % 2 == 0, np.zeros(6, dtype=bool)):
        rows = content.rows.emptied(keep)
        rows = dataclasses.replace(rows, design=dataclasses.replace(rows.design, some_empty=True))
        found = stored(dataclasses.replace(content, rows=rows)).rows
        assert np.array_equal(found.kept, keep)
        assert found.entries == rows.entries
        assert not found.rest[~keep].any()
        assert np.array_equal(found.label_log_prob, stored(content).rows.label_log_prob)


def test_a_large_vocabulary_takes_three_planes_and_keeps_its_last_ids():
    width, generator = 151_936, np.random.default_rng(0)
    logits = torch.from_numpy(generator.normal(size=(3, width)).astype(np.float32)) * 2
    logits[:, -1] += 30
    logits[:, -3:-1] += 20
    chosen = Selection("threshold_sampling", (1.0, 2.0), floors=(0.02, 0.02))
    rows = select(logits, torch.tensor([0, width - 1, width - 2]), chosen, generator.random((3, 1))).rows
    content = content_of(rows, generator)
    content.token_ids[-1] = width - 1
    arrays = encode(content, values="quantised")
    for name in ("token.id", "head.id", "tail.id"):
        assert arrays[name].shape[0] == 3, name
    back = decode(arrays, design=rows.design, values="quantised")
    for row in range(3):
        assert back.rows.slice(row, row + 1).head_ids[-1] == width - 1
    assert int(rows.tail_ids.max()) > 1 << 16
    assert np.array_equal(back.rows.tail_ids, rows.tail_ids)
    assert back.token_ids[-1] == width - 1
    small = random_content("threshold_sampling", "ordinary")
    assert encode(small, values="quantised")["head.id"].shape[0] == 2


# Golden bytes: literal content, literal hex. A change of one of these is a change of the format.
f32 = partial(np.array, dtype=np.float32)
u32 = partial(np.array, dtype=np.uint32)
i64 = partial(np.array, dtype=np.int64)


def tiny(**changes):
    """Two sequences, three rows: two exact and two drawn entries, one exact alone, and an empty row."""
    design = RowDesign((1.0, 2.0), vocab_size=1000, floors=(0.25, 0.125), some_empty=True)
    rows = SparseRows(
        head=i64([2, 1, 0]),
        tail=i64([2, 0, 0]),
        head_ids=u32([3, 700, 999]),
        head_logits=f32([-1.5, 0.0, 0.0]),
        tail_ids=u32([1, 258]),
        tail_logits=f32([-6.25, -300.0]),
        rest=f32([[-1.0, 0.5], [-32.0, -8.25], [0.0, 0.0]]),
        label_log_prob=f32([-0.25, -3.0, 0.0]),
        design=design,
    )
    return ShardContent(
        lengths=i64([3, 2]),
        token_ids=u32([5, 300, 999, 0, 7]),
        targets=np.array([0, 1, 1, 0, 1], dtype=bool),
        rows=dataclasses.replace(rows, **changes),
    )


def counted():
    return tiny(
        design=RowDesign((1.0,), vocab_size=1000, draws=4, some_empty=True),
        rest=f32([[-1.0], [-32.0], [0.0]]),
        head_counts=np.array([1, 0, 4], dtype=np.uint8),
        tail_counts=np.array([1, 2], dtype=np.uint8),
    )


def ids_alone():
    return tiny(
        design=RowDesign((2.0,), vocab_size=1000, floors=(0.125,), tail_logits=False, some_empty=True),
        rest=f32([[0.5], [-8.25], [0.0]]),
        tail_logits=f32([-6.25, -6.25]),
    )


COMMON = {
    "sequence.length": "0300000002000000",
    "sequence.digest": "04c690e2502dee58c947a558318cc82123105068f9fd47b04f21bdbc3cad5a4b",
    "token.id": "052ce700070001030000",
    "token.target": "0001010001",
    "row.head": "020100000000",
    "row.tail": "020000000000",
    "row.label": "000000b4c200",
    "head.id": "03b9e7000203",
    "tail.id": "01010001",
}
TWO_RESTS, ONE_REST = "0000000000007c0080825f80", "0000007c0080"
STEPS = {"head.value": "180000000000", "tail.value": "0c580002"}
GOLDEN = {
    "quantised": (tiny, "quantised", {"row.rest": TWO_RESTS, **STEPS}),
    "half": (tiny, "half", {"row.rest": TWO_RESTS, "head.value": "000000be0000", "tail.value": "40b0c6dc"}),
    "ids_alone": (
        ids_alone,
        "quantised",
        {"row.rest": "000000825f80", "head.value": STEPS["head.value"], "row.tail_value": "400000c60000"},
    ),
    "counted": (
        counted,
        "quantised",
        {"row.rest": ONE_REST, **STEPS, "head.count": "010004", "tail.count": "0102"},
    ),
}


@pytest.mark.parametrize("case", GOLDEN)
def test_golden_bytes(case):
    make, values, own = GOLDEN[case]
    arrays = encode(make(), values=values)
    assert {name: array.tobytes().hex() for name, array in arrays.items()} == {**COMMON, **own}
    back = decode(arrays, design=make().rows.design, values=values)
    assert np.array_equal(back.rows.head_ids, make().rows.head_ids)
    assert np.array_equal(back.rows.tail_ids, make().rows.tail_ids)
