"""Caches made from caches: what is kept, what is refused, what the new plan says, and that nothing stored changes."""

import dataclasses
import shutil

import numpy as np
import pytest

from kdcache.cache.codec import decode, encode
from kdcache.cache.derive import cut_shards
from kdcache.cache.merge import merge
from kdcache.cache.reader import open_cache, shard_path
from kdcache.cache.subset import keep_largest, subset
from kdcache.cache.verify import verify
from kdcache.cache.writer import CacheWriter
from kdcache.errors import CacheError, CorruptCacheError, PlanMismatchError
from kdcache.progress import Silent
from tests.cache.samples import SELECTIONS, TOKENS, sample_plan, sample_sequences, selection_plan, stored

METHODS = [(m, v) for m in SELECTIONS for v in ("quantised", "half")]


class Recorder(Silent):
    """Keeps warnings and counts progress."""

    def __init__(self):
        self.warnings, self.done = [], []

    def warning(self, text):
        self.warnings.append(text)

    def begin(self, task, total, unit):
        self.done.append([task, total, 0])

    def advance(self, amount, note=""):
        self.done[-1][2] += amount


def contents_of(seed, method, sizes=(3, 5, 2)):
    return [sample_sequences(n, seed=seed + i, method=method) for i, n in enumerate(sizes)]


def make(directory, *, method="top_k", seed=0, contents=None, teacher=None, **selection):
    contents = contents or contents_of(seed, method)
    plan = sample_plan(contents, selection=selection_plan(method, **selection), **(teacher or {}))
    writer = CacheWriter(directory, plan, TOKENS)
    for index, content in enumerate(contents):
        writer.commit(index, content)
    writer.finalise()
    return open_cache(directory)


def thinned(directory, seed=0):
    """A cache whose first split selects positions."""
    contents = []
    for number, content in enumerate(contents_of(seed, "top_k")):
        keep = np.arange(len(content.rows)) % 3 != 1 if number < 2 else np.ones(len(content.rows), dtype=bool)
        rows = content.rows.emptied(keep)
        design = dataclasses.replace(rows.design, some_empty=number < 2)
        contents.append(dataclasses.replace(content, rows=dataclasses.replace(rows, design=design)))
    return make(directory, contents=contents, positions="loss", quantile=0.3)


def assert_same_rows(found, truth, *, but=("design",)):
    for field in dataclasses.fields(truth):
        if field.name not in but:
            a, b = getattr(found, field.name), getattr(truth, field.name)
            assert (a is None) == (b is None), field.name
            assert a is None or (a.dtype == b.dtype and np.array_equal(a, b)), field.name


def assert_same(found, truth):
    assert np.array_equal(found.token_ids, truth.token_ids)
    assert np.array_equal(found.targets, truth.targets)
    assert_same_rows(found.rows, truth.rows)


def files(directory):
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


@pytest.mark.parametrize(("method", "values"), METHODS)
def test_what_was_stored_is_stored_again_bit_for_bit(method, values):
    once = stored(sample_sequences(6, seed=3, method=method), values=values)
    arrays = encode(once, values=values)
    twice = decode(arrays, design=once.rows.design, values=values)
    assert_same_rows(twice.rows, once.rows)
    for name, array in encode(twice, values=values).items():
        assert np.array_equal(array, arrays[name]), name


@pytest.mark.parametrize(("method", "values"), METHODS)
def test_a_range_of_every_split_keeps_rows_and_verifies(tmp_path, method, values):
    parent = make(tmp_path / "a", method=method, values=values)
    progress = Recorder()
    made = subset(parent, tmp_path / "b", sequences=(1, 7), progress=progress)
    child = open_cache(tmp_path / "b")
    assert verify(tmp_path / "b") == []
    assert child.id == made.manifest.cache_id
    assert (len(child.split("train")), len(child.split("validation"))) == (6, 1)
    for name, numbers in (("train", range(1, 7)), ("validation", [1])):
        for found, number in zip(child.split(name), numbers, strict=True):
            assert_same(found, parent.split(name)[number])
    derived = child.plan.derived
    assert (derived.operation, derived.parents, derived.settings) == ("subset", (parent.id,), {"sequences": "1:7"})
    assert child.plan.data.splits[0].selected == "train sequences 1:7"
    largest = max(s.positions for s in parent.plan.shards)
    assert max(s.positions for s in child.plan.shards) <= largest
    positions = sum(s.positions for s in child.plan.data.splits)
    assert progress.done == [["read", 7, 7], ["write", positions, positions]]


@pytest.mark.parametrize(
    ("bounds", "expected"), [((None, 3), range(3)), ((-2, None), range(6, 8)), ((0, -5), range(3))]
)
def test_ranges_count_as_python_does(tmp_path, bounds, expected):
    parent = make(tmp_path / "a")
    made = subset(parent, tmp_path / "b", splits=["train"], sequences=bounds)
    found = open_cache(made.directory).split("train")
    assert [s.token_ids.tolist() for s in found] == [parent.split("train")[i].token_ids.tolist() for i in expected]


def test_splits_keep_the_order_of_the_parent_and_are_named_once(tmp_path):
    parent = make(tmp_path / "a")
    made = subset(parent, tmp_path / "b", splits=["validation", "train", "train"])
    assert list(open_cache(made.directory).splits) == ["train", "validation"]
    assert made.plan.derived.settings == {"splits": "train,validation"}
    alone = subset(parent, tmp_path / "c", splits=["validation"])
    assert [s.name for s in alone.plan.data.splits] == ["validation"]
    assert alone.plan.data.splits[0].fingerprint == parent.plan.data.splits[1].fingerprint
    assert verify(tmp_path / "c") == []


@pytest.mark.parametrize("method", SELECTIONS)
def test_longer_sequences_are_cut_and_those_without_a_target_dropped(tmp_path, method):
    contents = contents_of(0, method)
    # The first sequence learns only its last token.
    content, first = contents[0], int(contents[0].lengths[0])
    targets = content.targets.copy()
    targets[: first - 1] = False
    last = content.rows.slice(first - 2, len(content.rows))
    contents[0] = dataclasses.replace(content, targets=targets, rows=last)
    parent = make(tmp_path / "a", method=method, contents=contents)
    limit = first - 1
    made = subset(parent, tmp_path / "b", max_length=limit)
    assert verify(tmp_path / "b") == []
    expected = [s for s in parent.split("train") if s.targets[:limit].any()]
    assert len(expected) == 7
    for found, whole in zip(open_cache(tmp_path / "b").split("train"), expected, strict=True):
        assert np.array_equal(found.token_ids, whole.token_ids[:limit])
        assert np.array_equal(found.targets, whole.targets[:limit])
        assert_same_rows(found.rows, whole.rows.slice(0, int(whole.targets[:limit].sum())))
    split = made.plan.data.splits[0]
    assert (split.sequences, split.dropped_no_target) == (7, 1)
    assert split.truncated == sum(len(s.token_ids) > limit for s in expected) > 0
    assert made.plan.data.max_length == limit
    assert subset(parent, tmp_path / "c", max_length=1000).plan.data.max_length == parent.plan.data.max_length


@pytest.mark.parametrize("values", ["quantised", "half"])
@pytest.mark.parametrize("method", ["top_k", "threshold"])
def test_fewer_entries_keep_the_largest_and_the_total_mass(tmp_path, method, values):
    parent = make(tmp_path / "a", method=method, values=values)
    made = subset(parent, tmp_path / "b", k=2)
    assert verify(tmp_path / "b") == []
    assert (made.plan.selection.k, made.plan.derived.settings) == (2, {"k": "2"})
    child = open_cache(tmp_path / "b")
    shorter = 0
    for name in ("train", "validation"):
        for found, whole in zip(child.split(name), parent.split(name), strict=True):
            assert np.array_equal(found.rows.label_log_prob, whole.rows.label_log_prob)
            assert np.array_equal(found.rows.head, np.minimum(whole.rows.head, 2))
            for row in range(len(whole.rows)):
                few, many = found.rows.slice(row, row + 1), whole.rows.slice(row, row + 1)
                best = sorted(zip(-many.head_logits, many.head_ids, strict=True))[:2]
                assert few.head_ids.tolist() == sorted(i for _, i in best)
                assert sorted(few.head_logits, reverse=True) == sorted((-x for x, _ in best), reverse=True)
                shorter += len(best) < int(many.head[0])
                for column, t in enumerate(many.design.temperatures):
                    # Each kept entry's probability is what it was: what is dropped went to the rest, and nowhere else.
                    assert few.log_partition_at(t) == pytest.approx(many.log_partition_at(t), abs=2**-10)
                    mass = np.exp(few.head_logits.astype(float) / t - many.log_partition_at(t)).sum()
                    log_odds = np.log1p(-mass) - np.log(mass)
                    # float32 in the partition, then half a step of rounding.
                    assert few.rest[0, column] == pytest.approx(log_odds, abs=2**-11 + 2e-5 / (1 - mass))
    assert shorter > 20


def test_rows_that_hold_fewer_stay_as_they_are():
    rows = stored(sample_sequences(6, seed=1, method="threshold")).rows
    limit = int(rows.head.min())
    assert limit < rows.head.max()
    fewer = keep_largest(rows, limit)
    same = np.flatnonzero(rows.head <= limit)
    assert np.array_equal(fewer.rest[same], rows.rest[same])
    for row in same:
        assert_same_rows(fewer.slice(row, row + 1), rows.slice(row, row + 1))
    assert_same_rows(keep_largest(rows.emptied(rows.head < 0), limit), rows.emptied(rows.head < 0))


@pytest.mark.parametrize("method", ["threshold_sampling", "random_sampling", "ids_alone"])
def test_a_smaller_draw_needs_the_teacher(tmp_path, method):
    with pytest.raises(CacheError, match="need the teacher"):
        subset(make(tmp_path / "a", method=method), tmp_path / "b", k=2)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "should be of some splits"),
        ({"sequences": (0, None)}, "should be of some splits"),
        ({"splits": ["test"]}, "no split 'test', only train, validation"),
        ({"sequences": (8, None)}, "nothing would be left of split train: it has 8 sequences, 0 of them"),
        ({"sequences": (5, None)}, "nothing would be left of split validation"),
        ({"k": 6}, "k should lie between 1 and 5"),
        ({"k": 0}, "k should lie between 1 and 5"),
        ({"max_length": 1}, "at least 2"),
    ],
)
def test_what_cannot_be_taken_is_refused_before_anything_is_written(tmp_path, options, message):
    with pytest.raises(CacheError, match=message):
        subset(make(tmp_path / "a"), tmp_path / "b", **options)
    assert not (tmp_path / "b").exists()


def test_the_same_subset_goes_on_and_another_is_refused(tmp_path):
    parent = make(tmp_path / "a")
    whole = subset(parent, tmp_path / "b", sequences=(0, 2))
    before = files(tmp_path / "b")
    assert subset(parent, tmp_path / "b", sequences=(None, 2)).shards_made == 0
    (tmp_path / "b" / "manifest.json").unlink()
    shard_path(tmp_path / "b", 1).write_bytes(b"half")
    progress = Recorder()
    again = subset(parent, tmp_path / "b", sequences=(0, 2), progress=progress)
    assert (again.shards_made, again.manifest) == (1, whole.manifest)
    assert "00001" in progress.warnings[0]
    assert files(tmp_path / "b") == before
    with pytest.raises(PlanMismatchError, match=r"derived\.settings\.sequences"):
        subset(parent, tmp_path / "b", sequences=(0, 1))
    with pytest.raises(PlanMismatchError, match="Give another destination"):
        subset(parent, tmp_path / "a", sequences=(0, 1))


def test_a_damaged_parent_is_never_taken_over(tmp_path):
    make(tmp_path / "a")
    path = shard_path(tmp_path / "a", 1)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptCacheError, match="00001"):
        subset(open_cache(tmp_path / "a"), tmp_path / "b", sequences=(0, 8))


def test_selected_positions_stay_with_the_first_split(tmp_path):
    parent = thinned(tmp_path / "a")
    both = subset(parent, tmp_path / "b", sequences=(0, 2))
    assert verify(tmp_path / "b") == []
    assert both.plan.selection.positions == "loss"
    assert both.manifest.splits[0].kept_positions < both.manifest.splits[0].positions
    subset(parent, tmp_path / "c", splits=["train"], k=3)
    assert verify(tmp_path / "c") == []
    rest = subset(parent, tmp_path / "d", splits=["validation"])
    assert verify(tmp_path / "d") == []
    assert (rest.plan.selection.positions, rest.plan.selection.quantile) == ("all", 0.0)
    assert not rest.plan.design(0).some_empty


def test_a_subset_of_a_subset_names_its_own_parent(tmp_path):
    parent = make(tmp_path / "a")
    subset(parent, tmp_path / "b", sequences=(0, 6), k=4)
    middle = open_cache(tmp_path / "b")
    made = subset(middle, tmp_path / "c", splits=["train"], sequences=(2, 4), k=2)
    assert made.plan.derived.parents == (middle.id,)
    assert verify(tmp_path / "c") == []


def test_shards_stay_within_the_limit_and_tile():
    sizes = [(9, 4), (9, 4), (5, 2), (30, 12), (2, 1), (2, 1)]
    shards = cut_shards(1, sizes, tokens_limit=100, positions_limit=8)
    assert [(s.start, s.sequences, s.tokens, s.positions) for s in shards] == [
        (0, 2, 18, 8), (2, 1, 5, 2), (3, 1, 30, 12), (4, 2, 4, 2),
    ]  # fmt: skip
    assert {s.split for s in shards} == {1}
    by_tokens = cut_shards(1, sizes, tokens_limit=18, positions_limit=100)
    assert [(s.start, s.sequences, s.tokens) for s in by_tokens] == [(0, 2, 18), (2, 1, 5), (3, 1, 30), (4, 2, 4)]


@pytest.mark.parametrize(("method", "values"), METHODS)
def test_a_merge_carries_shards_over_whole(tmp_path, method, values):
    parents = [make(tmp_path / str(i), method=method, seed=10 * i, values=values) for i in range(3)]
    progress = Recorder()
    made = merge(parents, tmp_path / "m", progress=progress)
    assert verify(tmp_path / "m") == []
    merged = open_cache(tmp_path / "m")
    for name in ("train", "validation"):
        expected = [s for parent in parents for s in parent.split(name)]
        for found, truth in zip(merged.split(name), expected, strict=True):
            assert_same(found, truth)
    order = [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1), (0, 2), (1, 2), (2, 2)]
    assert [s.content_sha256 for s in made.manifest.shards] == [
        parents[i].manifest.shards[s].content_sha256 for i, s in order
    ]
    derived = made.plan.derived
    assert (derived.operation, derived.parents) == ("merge", tuple(p.id for p in parents))
    assert made.plan.data.splits[0].examples == 24
    assert progress.warnings == []
    before = files(tmp_path / "m")
    assert merge(parents, tmp_path / "m").shards_made == 0
    assert files(tmp_path / "m") == before


def test_splits_that_some_parents_lack_are_joined_by_name(tmp_path):
    first, second = make(tmp_path / "a"), make(tmp_path / "b", seed=10)
    subset(first, tmp_path / "c", splits=["validation"])
    made = merge([open_cache(tmp_path / "c"), second], tmp_path / "m")
    assert verify(tmp_path / "m") == []
    assert {s.name: s.sequences for s in made.plan.data.splits} == {"validation": 4, "train": 8}


def test_repeated_sequences_are_kept_and_counted(tmp_path):
    first, second = contents_of(0, "top_k"), contents_of(10, "top_k")
    second[0] = first[0]  # three of train again
    second[2] = first[1]  # five of train in validation
    parents = [make(tmp_path / "a", contents=first), make(tmp_path / "b", contents=second)]
    progress = Recorder()
    made = merge(parents, tmp_path / "m", progress=progress)
    assert made.plan.data.splits[0].sequences == 16
    repeated, shared = progress.warnings
    assert "3 of 16 sequences of split train repeat" in repeated
    assert "5 sequences stand in more than one of the splits" in shared


@pytest.mark.parametrize(
    ("change", "fields"),
    [
        ({"teacher": {"fingerprint": "1" * 64, "dtype": "bfloat16"}}, ["teacher.fingerprint", "teacher.dtype"]),
        ({"k": 7}, ["selection.k: 6 against 7"]),
        ({"values": "half"}, ["selection.values: 'quantised' against 'half'"]),
        ({"method": "threshold"}, ["selection.method", "selection.floors", "can be given to another recipe"]),
    ],
)
def test_caches_of_another_family_are_refused_naming_every_field(tmp_path, change, fields):
    parents = [make(tmp_path / "a"), make(tmp_path / "b", seed=10, **change)]
    with pytest.raises(PlanMismatchError) as refused:
        merge(parents, tmp_path / "m")
    assert all(field in str(refused.value) for field in fields), str(refused.value)
    assert not (tmp_path / "m").exists()


def test_the_budget_of_the_floors_and_the_batch_size_are_no_part_of_the_family(tmp_path):
    second = make(tmp_path / "b", seed=10, bytes_per_position=48.0, teacher={"batch_tokens": 128, "name": "elsewhere"})
    merge([make(tmp_path / "a"), second], tmp_path / "m")
    assert verify(tmp_path / "m") == []


def test_selected_positions_merge_where_they_lie_in_one_split(tmp_path):
    parents = [thinned(tmp_path / "a"), thinned(tmp_path / "b", seed=10)]
    made = merge(parents, tmp_path / "m")
    assert verify(tmp_path / "m") == []
    kept = [sum(p.manifest.splits[i].kept_positions for p in parents) for i in range(2)]
    assert [s.kept_positions for s in made.manifest.splits] == kept
    plan = parents[1].plan
    renamed = tuple(s.model_copy(update={"name": n}) for s, n in zip(plan.data.splits, ("other", "train"), strict=True))
    changed = plan.model_copy(update={"data": plan.data.model_copy(update={"splits": renamed})})
    writer = CacheWriter(tmp_path / "c", changed, TOKENS)
    for index in range(len(plan.shards)):
        writer.commit(index, parents[1].shard(index))
    writer.finalise()
    with pytest.raises(PlanMismatchError, match="selects positions in its first split other"):
        merge([parents[0], open_cache(tmp_path / "c")], tmp_path / "n")


def test_one_cache_is_no_merge(tmp_path):
    with pytest.raises(CacheError, match="2 to 1,024 caches, found 1"):
        merge([make(tmp_path / "a")], tmp_path / "m")


def test_a_merge_of_a_damaged_parent_stops(tmp_path):
    parents = [make(tmp_path / "a"), make(tmp_path / "b", seed=10)]
    shutil.copy(shard_path(tmp_path / "a", 0), shard_path(tmp_path / "b", 0))
    with pytest.raises(CorruptCacheError, match="00000"):
        merge(parents, tmp_path / "m")
