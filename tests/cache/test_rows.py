"""Invariants of sparse rows, each broken on purpose, and the log-partition between declared temperatures."""

import dataclasses

import numpy as np
import pytest
import torch

from kdcache.cache.codec import decode, encode
from kdcache.cache.invariants import check_rows
from kdcache.cache.rows import concatenate
from kdcache.errors import CacheError
from kdcache.teacher.select import Selection, select
from tests.cache.samples import SELECTIONS, VOCAB, sample_rows, sample_sequences
from tests.reference import log_softmax


def changed(array, where, value):
    copy = array.copy()
    copy[where] = value
    return copy


def second_of_a_row(counts):
    """Place of the second entry of the first row that has two."""
    row = int(np.argmax(counts > 1))
    assert counts[row] > 1
    return int(counts[:row].sum()) + 1


def with_design(rows, **changes):
    return dataclasses.replace(rows, design=dataclasses.replace(rows.design, **changes))


def with_field(rows, name, where, value):
    return dataclasses.replace(rows, **{name: changed(getattr(rows, name), where, value)})


def drawn_from_the_head(rows):
    """The first drawn entry is one of its row's exact ones."""
    row = int(np.argmax(rows.tail > 0))
    return with_field(rows, "tail_ids", int(rows.tail_offsets[row]), rows.head_ids[rows.head_offsets[row]])


def swapped(rows, name):
    """Two neighbours of one row the wrong way round."""
    place = second_of_a_row(getattr(rows, name.removesuffix("_ids")))
    ids = getattr(rows, name)
    return with_field(rows, name, [place - 1, place], ids[[place, place - 1]])


BROKEN = {
    "4 head": lambda r: with_field(r, "head", 0, r.head[0] + 1),
    "4 tail": lambda r: with_field(r, "tail", 0, r.tail[0] + 1),
    "4 logits": lambda r: dataclasses.replace(r, tail_logits=r.tail_logits[:-1]),
    "5 empty": lambda r: r.emptied(np.arange(len(r)) != 2),
    "5 draws alone": lambda r: with_design(
        dataclasses.replace(
            r, head=changed(r.head, 0, 0), head_ids=r.head_ids[r.head[0] :], head_logits=r.head_logits[r.head[0] :]
        ),
        some_empty=True,
    ),
    "5 nothing is drawn": lambda r: with_design(r, floors=()),
    "6 head": lambda r: with_field(r, "head_ids", 0, VOCAB),
    "6 tail": lambda r: with_field(r, "tail_ids", -1, VOCAB),
    "7 head twice": lambda r: with_field(
        r, "head_ids", second_of_a_row(r.head), r.head_ids[second_of_a_row(r.head) - 1]
    ),
    "7 head falls": lambda r: swapped(r, "head_ids"),
    "7 tail falls": lambda r: swapped(r, "tail_ids"),
    "7 in both": drawn_from_the_head,
    "8 head nan": lambda r: with_field(r, "head_logits", 1, np.nan),
    "8 tail above": lambda r: with_field(r, "tail_logits", 0, 0.25),
    "8 tail infinite": lambda r: with_field(r, "tail_logits", 0, -np.inf),
    "9": lambda r: dataclasses.replace(r, head_logits=r.head_logits - np.float32(2**-10)),
    "10 nan": lambda r: with_field(r, "rest", (0, 0), np.nan),
    "10 above": lambda r: with_field(r, "rest", (1, 1), 32.5),
    "10 below": lambda r: with_field(r, "rest", (1, 0), -np.inf),
    "11 above": lambda r: with_field(r, "label_log_prob", 0, 0.5),
    "11 infinite": lambda r: with_field(r, "label_log_prob", 0, -np.inf),
}


@pytest.mark.parametrize("case", sorted(BROKEN))
def test_each_invariant_is_held_by_its_number(case):
    rows = sample_rows(positions=5)
    check_rows(rows)
    with pytest.raises(CacheError, match=rf"invariant {case.split()[0]} "):
        check_rows(BROKEN[case](rows))


@pytest.mark.parametrize("name", ["head_counts", "tail_counts"])
def test_draws_that_do_not_add_up_are_refused(name):
    rows = sample_rows(positions=5, method="random_sampling")
    check_rows(rows)
    with pytest.raises(CacheError, match="invariant 12 "):
        check_rows(with_field(rows, name, 0, getattr(rows, name)[0] + 1))


@pytest.mark.parametrize("method", SELECTIONS)
def test_rows_of_every_method_hold_the_invariants_and_thinned_ones_too(method):
    rows = sample_rows(positions=12, method=method)
    check_rows(rows)
    assert (rows.tail.sum() > 0) == rows.design.sampled
    keep = np.arange(12) % 3 != 1
    thinned = with_design(rows.emptied(keep), some_empty=True)
    check_rows(thinned)
    assert np.array_equal(thinned.kept, keep)
    assert np.array_equal(thinned.label_log_prob, rows.label_log_prob)
    assert not thinned.kept_mass()[~keep].any()
    assert np.array_equal(thinned.kept_mass()[keep], rows.kept_mass()[keep])


@pytest.mark.parametrize("method", SELECTIONS)
def test_slices_laid_end_to_end_are_the_whole(method):
    rows = sample_rows(positions=9, method=method)
    whole = concatenate([rows.slice(0, 4), rows.slice(4, 4), rows.slice(4, 9)])
    for field in dataclasses.fields(rows):
        assert np.array_equal(getattr(whole, field.name), getattr(rows, field.name)), field.name


def test_a_sequence_has_as_many_rows_as_targets():
    content = sample_sequences(sequences=4)
    for index in range(4):
        one = content[index]
        assert int(one.targets.sum()) == len(one.rows)


@pytest.mark.parametrize(
    ("name", "change", "number"),
    [
        ("sequence.length", lambda a: changed(a, 0, a[0] + 1), 1),
        ("token.target", lambda a: changed(a, 1, 2), 2),
        ("token.target", lambda a: changed(a, 0, 1), 2),
        ("token.id", lambda a: changed(a, (slice(None), 0), 0xEA), 3),
        ("sequence.digest", lambda a: changed(a, (0, 0), a[0, 0] ^ 1), 13),
        ("token.id", lambda a: changed(a, (0, 0), a[0, 0] ^ 1), 13),
        ("row.head", lambda a: changed(a, (0, 0), a[0, 0] + 1), 4),
        ("row.tail", lambda a: changed(a, (0, 0), a[0, 0] + 1), 4),
        ("head.id", lambda a: changed(a, (1, 0), 0xEA), 6),
        ("head.value", lambda a: a | 1, 9),
        ("row.label", lambda a: changed(a, (1, 0), 0x7C), 11),
    ],
)
def test_sequence_invariants_are_held_by_number(name, change, number):
    content = sample_sequences(sequences=3)
    arrays = encode(content, values="quantised")
    decode(arrays, design=content.rows.design, values="quantised")
    arrays[name] = change(arrays[name])
    with pytest.raises(CacheError, match=f"invariant {number} "):
        decode(arrays, design=content.rows.design, values="quantised")


def test_partition_is_exact_where_declared_and_interpolated_between():
    logits = torch.randn(200, 2000, generator=torch.Generator().manual_seed(0)) * 3
    rows = select(logits, torch.zeros(200, dtype=torch.int64), Selection("top_k", (1.0, 1.25, 1.5, 2.0), k=64)).rows
    relative = logits.double() - logits.double().amax(dim=1, keepdim=True)
    bounds = ((1.0, 1e-5), (1.25, 1e-5), (2.0, 1e-5), (1.1, 0.01), (1.75, 0.01), (3.0, 0.05), (4.0, 0.05))
    for t, bound in bounds:
        exact = torch.logsumexp(relative / t, dim=1).numpy()
        assert np.abs(rows.log_partition_at(t) - exact).max() < bound, t


@pytest.mark.parametrize("method", SELECTIONS)
def test_what_entries_stand_for_is_their_probability_or_the_floor(method):
    rows = sample_rows(positions=40, method=method)
    logits = (torch.randn(40, VOCAB, generator=torch.Generator().manual_seed(0)) * 4).numpy()
    for t, floor in zip(rows.design.temperatures, rows.design.floors or [None] * 2, strict=False):
        head, tail = rows.log_weights_at(t, rows.log_partition_at(t))
        log_p = log_softmax(logits, t)
        if not rows.design.draws:
            assert np.allclose(head, log_p[np.repeat(np.arange(40), rows.head), rows.head_ids], atol=1e-4)
        if rows.design.floors and len(rows.design.temperatures) == 1:
            assert np.allclose(tail, np.log(floor), atol=1e-4)
        if rows.design.floors:
            # An entry stands for the floor where it is this temperature that it was drawn at, and for less elsewhere.
            assert (tail <= np.log(floor) + 1e-4).all()
        if rows.design.draws:
            total = np.exp(np.concatenate([head, tail], dtype=np.float64)).sum()
            assert total == pytest.approx(40, rel=1e-5)


def test_partition_below_the_smallest_temperature_is_refused():
    with pytest.raises(CacheError, match=r"temperature 0\.5 is below"):
        sample_rows(positions=2).log_partition_at(0.5)


def test_kept_everything_has_no_tail_at_any_temperature():
    logits = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    rows = select(logits, torch.zeros(4, dtype=torch.int64), Selection("top_k", (1.0, 2.0), k=6)).rows
    relative = logits.double() - logits.double().amax(dim=1, keepdim=True)
    for t in (1.0, 1.5, 3.0):
        exact = torch.logsumexp(relative / t, dim=1).numpy()
        assert np.allclose(rows.log_partition_at(t), exact, atol=1e-5)


def test_shard_content_lays_sequences_end_to_end():
    content = sample_sequences(sequences=3)
    assert content.token_offsets[-1] == len(content.token_ids)
    assert content.row_offsets[-1] == len(content.rows)


def test_one_row_cannot_hold_what_all_of_them_may():
    """Padding makes every row of a batch as wide as the widest: one long row among empty ones would fill the memory."""
    rows = sample_rows(positions=3, method="top_k")
    tight = dataclasses.replace(rows, design=dataclasses.replace(rows.design, k=int(rows.head.max()) - 1))
    with pytest.raises(CacheError, match="invariant 14 "):
        check_rows(tight)
    floors = dataclasses.replace(rows.design, floors=(0.5, 0.5))
    assert floors.entry_limit == 12
    assert dataclasses.replace(rows.design, draws=7).entry_limit == 8
