"""Order of samples: every sequence once, a function of cache id, seed and epoch alone."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kdcache.student.sampler import ShardSampler, epoch_order, epoch_windows


@given(st.lists(st.integers(1, 20), min_size=1, max_size=12), st.integers(0, 5), st.integers(0, 5), st.integers(1, 5))
def test_every_sequence_comes_once_and_windows_hold_few_shards(sizes, seed, epoch, window):
    order = epoch_order(sizes, cache_id="c", seed=seed, epoch=epoch, window=window)
    assert sorted(order.tolist()) == list(range(sum(sizes)))
    shard_of = np.repeat(np.arange(len(sizes)), sizes)[order]
    # A shard that was left is not met again: at most `window` shards are open at any time.
    first = {s: int(np.argmax(shard_of == s)) for s in range(len(sizes))}
    last = {s: len(order) - 1 - int(np.argmax(shard_of[::-1] == s)) for s in range(len(sizes))}
    for place in range(len(order)):
        assert sum(first[s] <= place <= last[s] for s in first) <= window


def test_order_changes_with_cache_seed_and_epoch_and_with_nothing_else():
    sizes = [30, 30, 30]
    base = epoch_order(sizes, cache_id="a", seed=0, epoch=0)
    assert np.array_equal(base, epoch_order(sizes, cache_id="a", seed=0, epoch=0))
    for other in ({"cache_id": "b"}, {"seed": 1}, {"epoch": 1}):
        changed = epoch_order(sizes, **{"cache_id": "a", "seed": 0, "epoch": 0, **other})
        assert not np.array_equal(base, changed)
    sampler = ShardSampler(sizes, cache_id="a", seed=0)
    assert list(sampler) == base.tolist()
    sampler.set_epoch(1)
    assert list(sampler) == epoch_order(sizes, cache_id="a", seed=0, epoch=1).tolist()
    assert len(sampler) == 90


def test_the_shards_of_the_next_window_are_told_when_a_window_begins():
    sizes = [3] * 10
    told = []
    sampler = ShardSampler(sizes, cache_id="a", seed=0, upcoming=told.append)
    indices = iter(sampler)
    windows = [members.tolist() for members, _ in epoch_windows(sizes, cache_id="a", seed=0, epoch=0)]
    next(indices)
    assert told == windows[1:2]
    assert len(list(indices)) == 29
    assert told == windows[1:]
    assert sorted(s for members in windows for s in members) == list(range(10))
