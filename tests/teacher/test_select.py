"""Selection against dense float64 arithmetic, on ordinary and adversarial rows."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kdcache.cache.invariants import check_rows
from kdcache.teacher import masses, threshold_sampling
from kdcache.teacher import select as module
from kdcache.teacher.forward import length_buckets
from kdcache.teacher.select import Selection, select
from kdcache.teacher.top_k import top_k
from tests.reference import log_softmax

T12 = (1.0, 2.0)
METHODS = {
    "top_k": Selection("top_k", T12, k=9, entropy=True),
    "threshold": Selection("threshold", T12, k=9, floors=(0.05, 0.02)),
    "threshold_sampling": Selection("threshold_sampling", T12, floors=(0.05, 0.02)),
    "random_sampling": Selection("random_sampling", (2.0,), draws=12),
    "ids_alone": Selection("threshold_sampling", (1.0,), floors=(0.05,), tail_logits=False),
}


@pytest.fixture(params=["compiled", "arrays"], scope="module")
def way(request):
    """Threshold sampling as the CPU does it, and as a GPU does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_is_compiled", lambda logits: request.param == "compiled")
        yield request.param


both_ways = pytest.mark.usefixtures("way")


def run(logits, selection, seed=0):
    """Rows of dense logits, the largest of each row as its label."""
    uniforms = np.random.default_rng(seed).random((len(logits), selection.uniforms))
    return select(logits, logits.argmax(dim=1), selection, uniforms).rows


def randn(rows, width, *, seed=0, scale=3.0):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * scale


def probabilities(logits, temperature):
    return np.exp(log_softmax(logits.numpy(), temperature))


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


def test_rows_hold_exact_masses_and_labels():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(20, 300, generator=g) * 4
    labels = torch.randint(300, (20,), generator=g)
    rows = select(logits, labels, Selection("top_k", T12, k=16)).rows
    check_rows(rows)
    relative = logits.double().numpy() - logits.double().numpy().max(axis=1, keepdims=True)
    for t in T12:
        exact = np.log(np.exp(relative / t).sum(axis=1))
        assert np.allclose(rows.log_partition_at(t), exact, rtol=1e-6, atol=1e-5)
    assert np.allclose(rows.label_log_prob, log_softmax(logits.numpy())[np.arange(20), labels], atol=1e-5)
    ids = rows.head_ids.reshape(20, 16).astype(np.int64)
    # Ids rise, and are those of the largest.
    assert np.array_equal(ids, np.sort(np.argsort(-relative, axis=1, kind="stable")[:, :16], axis=1))
    assert np.allclose(rows.head_logits.reshape(20, 16), np.take_along_axis(relative, ids, axis=1), atol=1e-5)
    for column, t in enumerate(T12):
        mass = np.take_along_axis(probabilities(logits, t), ids, axis=1).sum(axis=1)
        assert np.allclose(rows.kept_mass()[:, column], mass, atol=1e-6)


def test_a_small_rest_does_not_drown_in_a_difference():
    logits = randn(20, 500, scale=1.0)
    logits[:, :4] += 25
    rows = run(logits, Selection("top_k", T12, k=4))
    outside = np.sort(probabilities(logits, 1.0), axis=1)[:, :-4].sum(axis=1)
    assert outside.max() < 1e-7
    assert np.allclose(1 / (1 + np.exp(-rows.rest[:, 0].astype(np.float64))), outside, rtol=1e-4, atol=0)


def test_threshold_keeps_what_reaches_the_floor_at_any_temperature_up_to_the_cap():
    logits = randn(30, 200, seed=1)
    rows = run(logits, Selection("threshold", T12, k=14, floors=(0.015, 0.015)))
    check_rows(rows)
    for row in range(30):
        reach = np.maximum(*(probabilities(logits[row], t) / f for t, f in ((1.0, 0.015), (2.0, 0.015))))
        best = rank(logits[row].tolist())
        expected = sorted(v for v in best[:14] if reach[v] >= 1 or v == best[0])
        assert rows.slice(row, row + 1).head_ids.tolist() == expected
    assert len(set(rows.head.tolist())) > 1
    assert rows.head.max() == 14


@both_ways
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["equal", "one_hot", "masked", "huge", "one_id"])
def test_adversarial_rows(name, method):
    logits = {
        "equal": torch.zeros(1, 50),
        "one_hot": torch.full((1, 50), -1e4).index_fill_(1, torch.tensor([7]), 0.0),
        "masked": torch.full((1, 50), -torch.inf).index_fill_(1, torch.tensor([3, 4]), 1.0),
        "huge": torch.linspace(-1, 1, 50)[None] * 1.5e38,
        "one_id": torch.full((1, 1), 2.0),
    }[name]
    rows = run(logits, METHODS[method])
    check_rows(rows)
    assert logits[0, rows.head_ids.astype(np.int64)].max() == logits.max()
    assert torch.isfinite(logits[0, np.concatenate([rows.head_ids, rows.tail_ids]).astype(np.int64)]).all()
    if method == "top_k":
        assert rows.head[0] == {"masked": 2, "one_id": 1}.get(name, 9)


def test_k_as_large_as_the_vocabulary_keeps_everything():
    rows = run(randn(3, 12, seed=2), Selection("top_k", (1.0,), k=12))
    check_rows(rows)
    assert np.allclose(rows.kept_mass(), 1.0, atol=1e-12)


@both_ways
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    width=st.one_of(st.integers(2, 150), st.sampled_from([128, 129, 256, 1000])),
    scale=st.sampled_from([0.0, 0.3, 2.0, 6.0]),
    floors=st.tuples(st.floats(0.002, 0.5), st.floats(0.002, 0.5)),
    masked=st.booleans(),
)
def test_threshold_sampling_keeps_what_reaches_a_floor_and_draws_the_rest_by_size(seed, width, scale, floors, masked):
    logits = randn(5, width, seed=seed, scale=scale)
    if masked:
        logits[:, 1::2] = -torch.inf
    rows = run(logits, Selection("threshold_sampling", T12, floors=floors), seed)
    check_rows(rows)  # no id twice, ids rise
    p = [probabilities(logits, t) for t in T12]
    reach = np.maximum(*(q / f for q, f in zip(p, floors, strict=True)))
    for row in range(5):
        own = rows.slice(row, row + 1)
        # What is within 2^-10 of the floor is taken for reaching it; no statement where rounding decides.
        border = 1 - 2.0**-10
        surely = set(np.flatnonzero(reach[row] > border + 1e-4)) | {int(logits[row].argmax())}
        maybe = surely | set(np.flatnonzero(reach[row] > border - 1e-4))
        assert surely <= set(own.head_ids.tolist()) <= maybe
        left = reach[row].copy()
        left[own.head_ids] = 0.0
        assert np.floor(left.sum() - 1e-3) <= own.tail[0] <= np.ceil(left.sum() + 1e-3)
        assert (left[own.tail_ids] > 0).all()
        inside = [q[row, own.head_ids].sum() for q in p]
        assert np.allclose(own.kept_mass()[0], inside, atol=1e-5)


# Every point of a fine grid in [0, 1) once: systematic draws have their exact expectation on it, but for one point.
GRID = 4096


def mean_weights(rows, temperature, width):
    """What each id stands for on average over the rows, with the partition taken out."""
    log_z = rows.log_partition_at(temperature)
    total = np.zeros(width)
    for ids, counts, log_weights in zip(
        (rows.head_ids, rows.tail_ids), (rows.head, rows.tail), rows.log_weights_at(temperature, log_z), strict=True
    ):
        np.add.at(total, ids, np.exp(log_weights + np.repeat(log_z, counts)))
    return total / len(rows)


# A row of many blocks of the vocabulary, most of which hold nothing that comes near a floor, and one of a single block.
@both_ways
@pytest.mark.parametrize("width", [60, 1500])
@pytest.mark.parametrize("temperatures", [(1.0,), (2.0,), T12, (0.7, 1.0, 3.0)])
def test_threshold_sampling_is_unbiased_for_every_entry_at_every_temperature(temperatures, width):
    floors = (0.04, 0.03, 0.05)[: len(temperatures)]
    row = randn(1, width, seed=width)
    row[0, 60:] -= 4
    row[0, 5] = -torch.inf
    row[0, 300:340] = -torch.inf
    uniforms = (np.arange(GRID)[:, None] + 0.5) / GRID
    selection = Selection("threshold_sampling", temperatures, floors=floors)
    rows = select(row.repeat(GRID, 1), torch.zeros(GRID, dtype=torch.int64), selection, uniforms).rows
    assert rows.tail.min() > 0
    assert rows.tail.max() - rows.tail.min() <= 1
    relative = row[0].double().numpy() - float(row.max())
    reach = np.max([probabilities(row, t)[0] / f for t, f in zip(temperatures, floors, strict=True)], axis=0)
    for t in (*temperatures, temperatures[0] * 1.3, 5.0):
        truth = np.exp(relative / t)
        # One grid point more or less that falls on an entry, and rounding.
        bound = 1.01 * truth / np.maximum(reach, 1e-30) / GRID + 1e-4 * truth
        assert (np.abs(mean_weights(rows, t, width) - truth) <= bound).all(), t
    if len(temperatures) == 1:
        _, tail = rows.log_weights_at(temperatures[0], rows.log_partition_at(temperatures[0]))
        assert np.allclose(tail, np.log(floors[0]), atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_random_sampling_draws_by_probability(temperature):
    width, draws = 60, 8
    row = randn(1, width, seed=3)
    row[0, :3] = -torch.inf
    points = (np.arange(GRID * draws) + 0.5) / (GRID * draws)
    uniforms = np.random.default_rng(0).permutation(points).reshape(GRID, draws)
    selection = Selection("random_sampling", (temperature,), draws=draws)
    rows = select(row.repeat(GRID, 1), torch.full((GRID,), 9), selection, uniforms).rows
    check_rows(rows)  # counts add up to the draws
    drawn = np.zeros(width)
    np.add.at(drawn, rows.head_ids, rows.head_counts)
    np.add.at(drawn, rows.tail_ids, rows.tail_counts)
    p = probabilities(row, temperature)[0]
    assert drawn.sum() == GRID * draws
    # Each strip of [0, 1) holds one point.
    assert np.abs(drawn - p * GRID * draws).max() <= 1.1
    assert (rows.head_ids == int(row.argmax())).all()
    # What entries stand for is their share of the draws.
    partition = np.exp(rows.log_partition_at(temperature)[0])
    assert mean_weights(rows, temperature, width) == pytest.approx(drawn / (GRID * draws) * partition, rel=1e-4)


@both_ways
def test_drawn_ids_alone_share_the_mean_of_their_logits():
    logits = randn(20, 100, seed=4)
    own = run(logits, Selection("threshold_sampling", (1.0,), floors=(0.05,)))
    alone = run(logits, METHODS["ids_alone"])
    assert np.array_equal(own.tail_ids, alone.tail_ids)
    for row in range(20):
        kept, shared = own.slice(row, row + 1), alone.slice(row, row + 1)
        if kept.tail[0]:
            assert np.allclose(shared.tail_logits, kept.tail_logits.mean(), rtol=1e-6)
    weights = alone.log_weights_at(1.0, alone.log_partition_at(1.0))[1]
    assert np.allclose(weights, np.log(0.05), atol=1e-5)


@both_ways
def test_entropy_is_the_teachers_and_only_where_asked_for():
    logits = randn(20, 100, seed=5)
    logits[:, 7] = -torch.inf
    logits[3] = torch.full((100,), -torch.inf).index_fill_(0, torch.tensor([2]), 0.0)
    labels = torch.full((20,), 2)
    for temperatures in ((1.0, 2.0), (2.0,)):
        found = select(logits, labels, Selection("top_k", temperatures, entropy=True)).entropy
        log_p = log_softmax(logits.numpy())
        p = np.exp(log_p)
        exact = -np.sum(np.where(p > 0, p * np.where(p > 0, log_p, 0.0), 0.0), axis=1)
        assert np.allclose(found, exact, atol=1e-5)
    assert not select(logits, labels, Selection("top_k", (1.0,))).entropy.any()


@both_ways
@pytest.mark.parametrize("method", METHODS)
def test_blocks_of_rows_are_as_one_block(method, monkeypatch):
    logits = randn(23, 301, seed=6)
    whole = run(logits, METHODS[method])
    monkeypatch.setattr(module, "_BLOCK_BYTES", 4 * 301 * 5)
    parts = run(logits, METHODS[method])
    for field in dataclasses.fields(whole):
        assert np.array_equal(getattr(whole, field.name), getattr(parts, field.name)), field.name


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    scale=st.sampled_from([0.0, 1.0, 3.0, 5.0]),
    temperatures=st.sampled_from([(1.0,), T12, (0.5, 1.0), (1.0, 3.0)]),
    floors=st.tuples(st.floats(0.001, 0.5), st.floats(0.001, 0.5)),
)
@example(seed=0, scale=1.0, temperatures=T12, floors=(0.4, 0.002))
def test_blocks_of_the_vocabulary_that_are_passed_over_hold_nothing_that_counts(seed, scale, temperatures, floors):
    logits = randn(6, 1500, seed=seed, scale=scale)
    logits[3:, 200:] -= 8
    selection = Selection("threshold_sampling", temperatures, floors=floors[: len(temperatures)])
    found = []
    for most in (-1.0, 2.0):  # look at every block, or never at more than is needed
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(masses, "_MOST", most)
            patch.setattr(module, "_is_compiled", lambda logits: False)
            found.append(run(logits, selection, seed))
    for name in ("head", "head_ids", "head_logits", "rest"):
        assert np.array_equal(getattr(found[0], name), getattr(found[1], name)), name
    # Sums in another order may move a draw to a neighbour, and no more than a few.
    assert np.abs(found[0].tail - found[1].tail).max() <= 1
    same = np.isin(*(np.repeat(np.arange(6), r.tail) * 1500 + r.tail_ids for r in found))
    assert same.sum() >= len(same) - max(2, len(same) // 50)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    width=st.sampled_from([1, 2, 255, 256, 257, 3000, 151_936]),
    scale=st.sampled_from([0.0, 1.0, 3.0, 6.0, 40.0]),
    temperatures=st.sampled_from([(1.0,), T12, (0.5, 1.0), (1.0, 3.0), (0.7, 1.0, 3.0)]),
    floors=st.tuples(*[st.floats(0.001, 0.5)] * 3),
)
@example(seed=0, width=3000, scale=1.0, temperatures=T12, floors=(0.4, 0.002, 0.1))
def test_the_compiled_pass_finds_what_the_arrays_do(seed, width, scale, temperatures, floors):
    logits = randn(4, width, seed=seed, scale=scale)
    logits[2:, width // 3 :] -= 8
    selection = Selection("threshold_sampling", temperatures, floors=floors[: len(temperatures)])
    found = []
    for compiled in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "_is_compiled", lambda logits, compiled=compiled: compiled)
            found.append(run(logits, selection, seed))
    for row in range(4):
        ours, theirs = (rows.slice(row, row + 1) for rows in found)
        # Where rounding decides whether an entry reaches the floor, both may be right.
        p = [probabilities(logits[row], t) for t in temperatures]
        reach = np.max([q / f for q, f in zip(p, floors, strict=False)], axis=0)
        differing = np.setxor1d(ours.head_ids, theirs.head_ids).astype(np.int64)
        if scale > 0:
            assert (np.abs(reach[differing] - (1 - 2.0**-10)) < 1e-4).all()
        if not len(differing):
            assert abs(ours.tail[0] - theirs.tail[0]) <= 1
        # Nearer to the truth than float32 sums over a large vocabulary.
        exact = log_softmax(logits[row].numpy())[int(logits[row].argmax())]
        assert ours.label_log_prob[0] == pytest.approx(exact, abs=2e-5)
        for q, rest in zip(p, ours.rest[0], strict=True):
            inside = q[ours.head_ids].sum()
            q[ours.head_ids] = 0.0
            assert q.sum() < 1e-13 or rest == pytest.approx(np.log(q.sum() / inside), abs=3e-6)


def test_the_compiled_exponentials_are_good_to_the_last_places():
    for x in np.linspace(-86, -1, 400, dtype=np.float32):
        row = torch.tensor([[0.0, float(x)]])
        found = threshold_sampling.sample(row, (1.0,), (0.9,), np.zeros(1))
        assert found.left[0, 0] == pytest.approx(np.exp(np.float64(x)), rel=3e-7)


def test_threads_and_strides_change_nothing():
    wide = randn(11, 700, seed=8)
    numbers = np.random.default_rng(0).random(11)
    alone = threshold_sampling.sample(wide[:, :600].contiguous(), T12, (0.02, 0.02), numbers)
    before = torch.get_num_threads()
    try:
        for threads in (1, 3, 16):
            torch.set_num_threads(threads)
            for logits in (wide[:, :600], wide.T.contiguous().T[:, :600]):
                found = threshold_sampling.sample(logits, T12, (0.02, 0.02), numbers)
                for name, ours, theirs in zip(found._fields, found, alone, strict=True):
                    assert np.array_equal(ours, theirs), name
    finally:
        torch.set_num_threads(before)


@both_ways
@pytest.mark.parametrize("temperatures", [T12, (2.0,)])
def test_logits_of_other_types_are_taken_as_float32(temperatures):
    selection = Selection("threshold_sampling", temperatures, floors=(0.02,) * len(temperatures))
    logits = randn(5, 300, seed=9).bfloat16()
    expected = run(logits.float(), selection)
    for other in (logits, logits.double(), logits.float().requires_grad_()):
        found = run(other, selection)
        check_rows(found)
        for field in dataclasses.fields(expected):
            assert np.array_equal(getattr(found, field.name), getattr(expected, field.name)), field.name


@pytest.mark.parametrize("fault", [RuntimeError("no locator available"), OSError("no space left"), EOFError()])
def test_where_nothing_can_be_kept_a_process_compiles_for_itself(monkeypatch, fault):
    asked, real = [], threshold_sampling.njit

    def njit(*signature, cache=False, **options):
        asked.append(cache)
        if cache:
            raise fault
        return real(*signature, **options)

    expected = threshold_sampling.sample(randn(3, 50), T12, (0.05, 0.05), np.full(3, 0.5))
    monkeypatch.setattr(threshold_sampling, "njit", njit)
    threshold_sampling._compiled.cache_clear()
    found = threshold_sampling.sample(randn(3, 50), T12, (0.05, 0.05), np.full(3, 0.5))
    threshold_sampling._compiled.cache_clear()
    assert asked == [True, False]
    assert np.array_equal(found.tail_ids, expected.tail_ids)


def test_entries_without_room_are_refused_and_not_written():
    kernel, room = threshold_sampling._compiled(), np.empty(1, np.int32)
    flat = torch.zeros(40).numpy()
    for uniform, floor in ((0.5, 0.02), (0.0, 0.5)):
        numbers = [np.empty(1, np.int64), np.empty(1, np.int64), room[:0], room[:0], np.empty(1, np.float32)]
        numbers += [np.empty((1, 1)) for _ in range(3)]
        if floor > 1 / 40:  # the largest alone is kept, and there is room for it
            numbers[2] = room
        with pytest.raises(IndexError, match="kept" if floor < 1 / 40 else "drawn"):
            kernel(
                flat, flat.view(np.int32), 40, 40, np.ones(1, np.float32), np.array([floor]), False, 1.0,
                np.array([uniform]), *numbers,
            )  # fmt: skip


# Bounds taken as logits, and not as distances to the largest, are rounded away where that is large or the temperature low.
@both_ways
@pytest.mark.parametrize(
    ("value", "temperatures"),
    [(-1e9, T12), (1e8, (1.0,)), (float(torch.finfo(torch.float32).min), T12), (6.0, (1e-5, 2e-5)), (30.0, (1e-5,))],
)
@pytest.mark.parametrize("one", [0.0, -8.0])
def test_rows_far_from_zero_keep_no_more_than_their_floors_leave_room_for(value, temperatures, one):
    logits = torch.full((3, 2000), value)
    logits[1, 7] = torch.nextafter(logits[1, 7], torch.tensor(torch.inf))
    logits[2] += torch.tensor(one)
    logits[2, 9] = value
    for floor in (0.05, 0.01, 0.001):
        rows = run(logits, Selection("threshold_sampling", temperatures, floors=(floor,) * len(temperatures)))
        check_rows(rows)
        for row in range(3):
            own, p = rows.slice(row, row + 1), probabilities(logits[row], temperatures[0])
            reach = max(q.max() for q in (p, probabilities(logits[row], temperatures[-1]))) / floor
            assert own.head[0] <= 1 / (floor * (1 - 2.0**-9)) * len(temperatures) + 1
            assert reach >= 0.9 or own.head[0] == 1


@both_ways
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_no_distribution_has_a_rest_that_is_not_finite(method, bad):
    logits = randn(3, 50, seed=7)
    clean = run(logits, METHODS[method])
    logits[1, slice(None) if bad == -torch.inf else 11] = bad
    rows = run(logits, METHODS[method])
    assert np.isfinite(rows.rest).all(axis=1).tolist() == [True, False, True]
    for row in (0, 2):
        assert np.array_equal(rows.slice(row, row + 1).head_ids, clean.slice(row, row + 1).head_ids)
        assert np.array_equal(rows.slice(row, row + 1).tail_ids, clean.slice(row, row + 1).tail_ids)


@pytest.mark.parametrize("method", ["threshold_sampling", "random_sampling"])
def test_draws_without_their_numbers_are_refused(method):
    with pytest.raises(ValueError, match=f"{method} needs"):
        select(randn(2, 9), torch.zeros(2, dtype=torch.int64), METHODS[method])


@both_ways
@pytest.mark.parametrize("method", METHODS)
def test_no_rows_are_no_rows(method):
    selection = METHODS[method]
    uniforms = np.zeros((0, selection.uniforms))
    rows = select(torch.zeros(0, 20), torch.zeros(0, dtype=torch.int64), selection, uniforms).rows
    check_rows(rows)
    assert len(rows) == rows.entries == 0


@given(st.lists(st.integers(2, 200), min_size=1, max_size=50), st.integers(16, 400))
def test_buckets_hold_every_row_once_within_the_token_budget(lengths, budget):
    buckets = length_buckets(lengths, budget)
    assert sorted(i for b in buckets for i in b) == list(range(len(lengths)))
    for bucket in buckets:
        assert len(bucket) == 1 or len(bucket) * max(lengths[i] for i in bucket) <= budget
