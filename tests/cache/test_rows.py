"""Invariants of sparse rows, each broken on purpose, and the log-partition between declared temperatures."""

import dataclasses

import numpy as np
import pytest
import torch

from kdcache.cache.codec import decode, encode
from kdcache.errors import CacheError
from kdcache.teacher.select import Selection, select
from tests.cache.samples import sample_rows, sample_sequences


def changed(array, where, value):
    copy = array.copy()
    copy[where] = value
    return copy


BROKEN = {
    "4": lambda r: dataclasses.replace(r, head=changed(r.head, 0, r.head[0] + 1)),
    "5": lambda r: dataclasses.replace(r, head=changed(r.head, 0, 0), tail=changed(r.tail, 0, r.head[0])),
    "6": lambda r: dataclasses.replace(r, ids=changed(r.ids, 3, r.vocab_size)),
    "7": lambda r: dataclasses.replace(r, ids=changed(r.ids, 1, r.ids[0])),
    "8": lambda r: dataclasses.replace(r, logits=changed(r.logits, 2, np.nan)),
    "9": lambda r: dataclasses.replace(r, logits=changed(r.logits, 2, 0.0)),
    "9 first": lambda r: dataclasses.replace(r, logits=changed(r.logits, 0, -0.001)),
    "10": lambda r: dataclasses.replace(r, log_partition=changed(r.log_partition, (0, 0), np.inf)),
    "10 order": lambda r: dataclasses.replace(r, log_partition=r.log_partition[:, ::-1]),
    "11": lambda r: dataclasses.replace(r, label_log_prob=changed(r.label_log_prob, 0, 0.5)),
    "12": lambda r: dataclasses.replace(r, log_partition=r.log_partition * 0),
}


@pytest.mark.parametrize("case", sorted(BROKEN))
def test_each_invariant_is_held_by_its_number(case):
    rows = sample_rows(positions=5)
    rows.check()
    with pytest.raises(CacheError, match=rf"invariant {case.split()[0]} "):
        BROKEN[case](rows).check()


def test_encode_then_decode_gives_the_same_content():
    content = sample_sequences(sequences=4)
    back = decode(encode(content), temperatures=(1.0, 2.0), vocab_size=content.rows.vocab_size)
    assert np.array_equal(back.token_ids, content.token_ids)
    assert np.array_equal(back.targets, content.targets)
    for field in dataclasses.fields(content.rows):
        assert np.array_equal(getattr(back.rows, field.name), getattr(content.rows, field.name)), field.name
    for index in range(4):
        one = content[index]
        assert int(one.targets.sum()) == len(one.rows)


@pytest.mark.parametrize(
    ("name", "change", "number"),
    [
        ("sequence.length", lambda a: changed(a, 0, a[0] + 1), 1),
        ("token.target", lambda a: changed(a, 1, 2), 2),
        ("token.target", lambda a: changed(a, 0, 1), 2),
        ("token.id", lambda a: changed(a, 0, 60000), 3),
        ("sequence.digest", lambda a: changed(a, (0, 0), a[0, 0] ^ 1), 13),
        ("token.id", lambda a: changed(a, 0, a[0] ^ 1), 13),
    ],
)
def test_sequence_invariants_are_held_by_number(name, change, number):
    content = sample_sequences(sequences=3)
    arrays = encode(content)
    arrays[name] = change(arrays[name])
    with pytest.raises(CacheError, match=f"invariant {number} "):
        decode(arrays, temperatures=(1.0, 2.0), vocab_size=content.rows.vocab_size)


def test_partition_is_exact_where_declared_and_interpolated_between():
    logits = torch.randn(200, 2000, generator=torch.Generator().manual_seed(0)) * 3
    rows = select(logits, torch.zeros(200, dtype=torch.int64), Selection("top_k", 64, 0.0, (1.0, 1.25, 1.5, 2.0)))
    relative = logits.double() - logits.double().amax(dim=1, keepdim=True)
    assert np.array_equal(rows.log_partition_at(2.0), rows.log_partition[:, 3].astype(np.float64))
    for t, bound in ((1.1, 0.01), (1.75, 0.01), (3.0, 0.05), (4.0, 0.05)):
        exact = torch.logsumexp(relative / t, dim=1).numpy()
        assert np.abs(rows.log_partition_at(t) - exact).max() < bound


def test_partition_below_the_smallest_temperature_is_refused():
    with pytest.raises(CacheError, match=r"temperature 0\.5 is below"):
        sample_rows(positions=2).log_partition_at(0.5)


def test_kept_everything_has_no_tail_at_any_temperature():
    logits = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    rows = select(logits, torch.zeros(4, dtype=torch.int64), Selection("top_k", 6, 0.0, (1.0, 2.0)))
    relative = logits.double() - logits.double().amax(dim=1, keepdim=True)
    exact = torch.logsumexp(relative / 3, dim=1).numpy()
    assert np.allclose(rows.log_partition_at(3.0), exact, atol=1e-3)


def test_shard_content_lays_sequences_end_to_end():
    content = sample_sequences(sequences=3)
    assert content.token_offsets[-1] == len(content.token_ids)
    assert content.row_offsets[-1] == len(content.rows)
