"""Order of samples: every sequence once, the same global batches however they are cut, found anywhere at once."""

import copy
from bisect import bisect_right
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdcache.cache.reader import Cache, open_cache
from kdcache.recipe import parse_recipe
from kdcache.student import batches as batches_module
from kdcache.student.batches import MicroBatches, OrderOptions, SplitDataset, first_sizes
from kdcache.student.sampler import CHUNK, BatchPlan, EpochOrder, MicroBatchNumbers
from kdcache.teacher.capture import capture

SIZES = st.lists(st.integers(1, 20), min_size=1, max_size=12)


def order_of(sizes, **options):
    order = EpochOrder(sizes, **{"cache_id": "c", "seed": 0, "epoch": 0, **options})
    return order.between(0, len(order))


@given(SIZES, st.integers(0, 5), st.integers(0, 5), st.integers(1, 5), st.booleans())
def test_every_sequence_comes_once_and_few_shards_are_open_at_a_time(sizes, seed, epoch, window, grouped):
    lengths = (lambda shard: np.arange(sizes[shard]) * 7 % 5) if grouped else None
    order = order_of(sizes, seed=seed, epoch=epoch, window=window, lengths=lengths, global_batch=4)
    assert sorted(order.tolist()) == list(range(sum(sizes)))
    shard_of = np.repeat(np.arange(len(sizes)), sizes)[order]
    first = {s: int(np.argmax(shard_of == s)) for s in range(len(sizes))}
    last = {s: len(order) - 1 - int(np.argmax(shard_of[::-1] == s)) for s in range(len(sizes))}
    for place in range(len(order)):
        assert sum(first[s] <= place <= last[s] for s in first) <= window


@given(SIZES, st.integers(1, 4), st.data())
def test_any_part_of_the_order_is_found_without_what_lies_before_it(sizes, window, data):
    whole = order_of(sizes, window=window)
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, len(whole)))
    fresh = EpochOrder(sizes, cache_id="c", seed=0, epoch=0, window=window)
    assert fresh.between(start, stop).tolist() == whole[start:stop].tolist()


@given(SIZES, st.integers(1, 4))
def test_the_shards_of_a_window_are_those_of_its_sequences(sizes, window):
    order = EpochOrder(sizes, cache_id="c", seed=0, epoch=0, window=window)
    shard_of = np.repeat(np.arange(len(sizes)), sizes)
    for place in range(len(order)):
        shards = order.shards_of(order.window_at(place))
        assert int(shard_of[order.between(place, place + 1)[0]]) in shards
        assert len(shards) <= window


@pytest.mark.parametrize("window", [1, 2, 3, 8])
def test_a_batch_anywhere_needs_two_shards_at_most_and_a_longer_stretch_all_of_the_window(window):
    sizes = [8 * CHUNK + 7 * i for i in range(20)]
    order = order_of(sizes, window=window)
    shard_of = np.repeat(np.arange(len(sizes)), sizes)[order]
    for size, most in ((CHUNK, 2), (CHUNK // 4, 2)):
        assert max(len(set(shard_of[start : start + size].tolist())) for start in range(len(order) - size)) == most
    middle = slice(len(order) // 2, len(order) // 2 + 4 * 8 * CHUNK)
    assert len(set(shard_of[middle].tolist())) > window


def test_few_shards_are_shuffled_as_a_whole():
    sizes = [512] * 6
    shard_of = order_of(sizes)[: 32 * 16].reshape(-1, 16) // 512
    assert np.mean([len(set(row)) for row in shard_of.tolist()]) > 5


def test_order_changes_with_cache_seed_and_epoch_and_with_nothing_else():
    sizes = [30, 30, 30]
    base = order_of(sizes, cache_id="a")
    assert np.array_equal(base, order_of(sizes, cache_id="a", global_batch=16))
    for other in ({"cache_id": "b"}, {"seed": 1}, {"epoch": 1}):
        assert not np.array_equal(base, order_of(sizes, **{"cache_id": "a", **other}))


def test_the_order_of_a_release_stays_the_order():
    """A resumed run must go on with the same batches after an update."""
    assert order_of([5, 4, 6], cache_id="a", seed=1, epoch=2).tolist() == [
        3,
        11,
        0,
        8,
        2,
        14,
        5,
        12,
        7,
        1,
        4,
        9,
        13,
        10,
        6,
    ]
    larger = order_of([150, 140, 130], cache_id="a", seed=1, epoch=2, window=2)
    assert larger[100:106].tolist() == [22, 59, 146, 142, 117, 116]


def test_grouping_makes_global_batches_of_one_length_and_keeps_them_random():
    sizes, size = [256] * 8, 16
    lengths = np.random.default_rng(0).integers(16, 512, sum(sizes))
    starts = np.concatenate(([0], np.cumsum(sizes)))

    def padding(order):
        rows = lengths[order].reshape(-1, size)
        return 1 - rows.sum() / (rows.max(axis=1) * size).sum()

    def grouped(**options):
        return order_of(sizes, lengths=lambda s: lengths[starts[s] : starts[s + 1]], global_batch=size, **options)

    assert padding(grouped()) < 0.1 < 0.3 < padding(order_of(sizes))
    assert not np.array_equal(grouped(), grouped(epoch=1))
    means = lengths[grouped()].reshape(-1, size).mean(axis=1)
    assert abs(np.corrcoef(means[1:], means[:-1])[0, 1]) < 0.3  # long and short batches in no order


CUTS = [(b, a, w) for b, a, w in product((1, 2, 3, 4, 6, 12), repeat=3) if b * a * w == 12]


@pytest.mark.parametrize("sequences", [1, 2, 11, 12, 13, 23, 24, 25, 100])
def test_global_batches_are_the_same_for_every_cut(sequences):
    expected = [list(range(start, min(start + 12, sequences))) for start in range(0, sequences, 12)]
    for batch, accumulation, world in CUTS:
        plans = [BatchPlan(sequences, batch, accumulation, world, rank) for rank in range(world)]
        assert len({(p.micro_batches, p.steps, p.global_batch) for p in plans}) == 1
        found = [[] for _ in expected]
        for plan in plans:
            numbers = [number for [(_, number)] in MicroBatchNumbers(plan)]
            assert numbers == list(range(plan.micro_batches))
            for number in numbers:
                start, stop = plan.span(number)
                assert 0 <= stop - start <= batch
                assert start < sequences  # a filler is a sequence that exists
                found[number // accumulation] += range(start, stop)
        assert [sorted(f) for f in found] == expected, (batch, accumulation, world)


@pytest.fixture(scope="module")
def many_shards(base_values, tmp_path_factory):
    own = copy.deepcopy(base_values)
    own["cache"] = {"directory": str(tmp_path_factory.mktemp("many") / "cache"), "positions_per_shard": 30}
    return capture(parse_recipe(own)).directory


@pytest.mark.parametrize("fraction", [0.01, 0.4, 1.0])
@pytest.mark.parametrize("grouped", [False, True])
def test_a_fraction_learns_from_the_first_sequences_and_from_each_once(many_shards, fraction, grouped):
    split = open_cache(many_shards)["train"]
    dataset = SplitDataset(split, fraction)
    assert len(dataset) == max(1, round(fraction * len(split)))
    plan = BatchPlan(len(dataset), 4, 1)
    batches = MicroBatches(
        split, plan, OrderOptions(window=2, group_by_length=grouped), lambda pairs, temperature: {"i": [i for i, _ in pairs]},
        lambda step: 1.0,
    )  # fmt: skip
    for epoch in (0, 1):
        seen = [i for number in range(plan.micro_batches) for i in batches[epoch, number]["i"]]
        assert sorted(seen) == list(range(len(dataset)))


def test_sizes_of_the_first_sequences_leave_out_shards_behind_them():
    assert first_sizes([5, 4, 3], 7) == [5, 2]
    assert first_sizes([5, 4, 3], 9) == [5, 4]
    assert first_sizes([5, 4, 3], 12) == [5, 4, 3]


# Shards of three sequences have none left in the later ones of eight windows.
@pytest.mark.parametrize(
    ("window", "workers", "batch"), [(1, 1, 4), (2, 1, 4), (3, 2, 2), (8, 1, 1), (8, 1, 4), (8, 3, 1)]
)
@pytest.mark.parametrize("order", ["0" * 64, "2" * 64, "u" * 64])
def test_every_shard_is_read_once_an_epoch_by_each_worker(many_shards, monkeypatch, window, workers, batch, order):
    monkeypatch.setattr(batches_module, "order_id", lambda cache: order)
    cache = open_cache(many_shards, keep=window + 2)
    split = cache["train"]
    assert len(split.shards) >= 12
    loads = []
    real = Cache.load
    monkeypatch.setattr(Cache, "load", lambda self, index: (loads.append(index), real(self, index))[1])
    plan = BatchPlan(len(split), batch, 1)
    for worker in range(workers):
        loads.clear()
        batches = MicroBatches(
            split, plan, OrderOptions(window=window), lambda pairs, temperature: {"i": [i for i, _ in pairs]}, lambda step: 1.0
        )  # fmt: skip
        needed = set()
        for number in range(worker, plan.micro_batches, workers):
            needed |= {split.shards[bisect_right(split.starts, i) - 1] for i in batches[0, number]["i"]}
        # What is still being read ahead. Nothing may be where a batch reaches past a window of small shards by itself.
        assert cache._reader is not None or batch > 1
        if cache._reader is not None:
            cache._reader.shutdown()
        # A shard that the other workers alone need may be passed before its turn to be read ahead came.
        assert needed <= set(loads) <= set(split.shards)
        assert len(loads) == len(set(loads))
        assert workers > 1 or needed == set(split.shards)
        cache._start_empty()
