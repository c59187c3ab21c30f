"""A cache directory being written, resumed, read, verified and refused."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from kdcache.cache import layout
from kdcache.cache.manifest import parse_manifest, parse_plan
from kdcache.cache.reader import open_cache, shard_path
from kdcache.cache.strict_json import parse_object
from kdcache.cache.verify import verify
from kdcache.cache.writer import CacheWriter
from kdcache.errors import CacheError, CorruptCacheError, IncompleteCacheError, PlanMismatchError
from tests.cache.samples import SELECTIONS, TOKENS, sample_plan, sample_sequences, selection_plan, stored

CONTENTS = [sample_sequences(sequences=n, seed=n) for n in (3, 5, 2)]
PLAN = sample_plan(CONTENTS)


def write(directory, order=(0, 1, 2)):
    writer = CacheWriter(directory, PLAN, TOKENS)
    for index in order:
        writer.commit(index, CONTENTS[index])
    return writer


@pytest.fixture
def cache(tmp_path):
    write(tmp_path / "c").finalise()
    return tmp_path / "c"


def files(directory):
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("values", ["quantised", "half"])
@pytest.mark.parametrize("method", SELECTIONS)
def test_what_is_written_is_read_back(tmp_path, method, values):
    contents = [sample_sequences(sequences=n, seed=n, method=method) for n in (3, 5, 2)]
    writer = CacheWriter(tmp_path, sample_plan(contents, selection=selection_plan(method, values=values)), TOKENS)
    for index, content in enumerate(contents):
        writer.commit(index, content)
    writer.finalise()
    assert verify(tmp_path) == []
    opened = open_cache(tmp_path)
    train = opened.split("train")
    assert (len(train), len(opened.split("validation"))) == (8, 2)
    expected = [c[i] for c in (stored(c, values=values) for c in contents[:2]) for i in range(len(c))]
    for found, truth in zip(train, expected, strict=True):
        assert np.array_equal(found.token_ids, truth.token_ids)
        assert np.array_equal(found.targets, truth.targets)
        for field in dataclasses.fields(truth.rows):
            assert np.array_equal(getattr(found.rows, field.name), getattr(truth.rows, field.name)), field.name
    assert np.array_equal(train[-1].token_ids, expected[-1].token_ids)
    with pytest.raises(IndexError):
        train[8]
    with pytest.raises(CacheError, match="no split 'test'"):
        opened.split("test")
    assert opened.vocabulary() == TOKENS


def test_totals_in_the_manifest_are_those_of_the_rows(cache):
    summary = open_cache(cache).split("train").summary
    rows = [stored(c).rows for c in CONTENTS[:2]]
    assert summary.positions == summary.kept_positions == sum(map(len, rows))
    assert summary.entries == sum(r.entries for r in rows)
    assert summary.teacher_nll == pytest.approx(-sum(float(r.label_log_prob.astype(np.float64).sum()) for r in rows))
    mass = np.concatenate([r.kept_mass() for r in rows])
    assert summary.kept_mass_mean == pytest.approx(mass.mean(axis=0))
    assert summary.kept_mass_p1 == pytest.approx(np.quantile(mass, 0.01, axis=0), abs=0.03)


def test_positions_left_out_are_counted_and_masses_are_of_the_others(tmp_path):
    thinned = []
    for number, content in enumerate(CONTENTS):
        keep = np.arange(len(content.rows)) % 3 != 1 if number < 2 else np.ones(len(content.rows), dtype=bool)
        rows = content.rows.emptied(keep)
        design = dataclasses.replace(rows.design, some_empty=number < 2)
        thinned.append(dataclasses.replace(content, rows=dataclasses.replace(rows, design=design)))
    selection = selection_plan(positions="loss", quantile=0.5)
    writer = CacheWriter(tmp_path, sample_plan(thinned, selection=selection), TOKENS)
    for index, content in enumerate(thinned):
        writer.commit(index, content)
    writer.finalise()
    assert verify(tmp_path) == []
    train, validation = (open_cache(tmp_path).split(name).summary for name in ("train", "validation"))
    rows = [stored(c).rows for c in thinned[:2]]
    assert train.kept_positions == sum(int(r.kept.sum()) for r in rows) < train.positions
    mass = np.concatenate([r.kept_mass()[r.kept] for r in rows])
    assert train.kept_mass_mean == pytest.approx(mass.mean(axis=0))
    assert train.teacher_nll == pytest.approx(-sum(float(r.label_log_prob.astype(np.float64).sum()) for r in rows))
    assert validation.kept_positions == validation.positions


def test_an_empty_row_where_none_was_planned_is_refused(tmp_path):
    rows = CONTENTS[0].rows.emptied(np.arange(len(CONTENTS[0].rows)) != 1)
    writer = CacheWriter(tmp_path, PLAN, TOKENS)
    with pytest.raises(CorruptCacheError, match="invariant 5 "):
        writer.commit(0, dataclasses.replace(CONTENTS[0], rows=rows))


def test_a_shard_that_no_reader_would_unpack_is_not_written(tmp_path, monkeypatch):
    writer = CacheWriter(tmp_path, PLAN, TOKENS)
    monkeypatch.setattr(layout, "EXPANSION_FLOOR", 0)
    monkeypatch.setattr(layout, "EXPANSION_LIMIT", 1)
    with pytest.raises(CacheError, match=r"shard 0 packs .* lower the recipe key cache\.positions_per_shard"):
        writer.commit(0, CONTENTS[0])
    assert not list((tmp_path / "shards").iterdir())


def test_any_order_any_process_and_any_resume_end_in_the_same_bytes(tmp_path, cache):
    write(tmp_path / "a", order=(2, 0)).directory  # noqa: B018 (a first process makes two shards and dies)
    (tmp_path / "a" / "shards" / ".tmp-00001-dead").write_bytes(b"half a shard")
    again = CacheWriter(tmp_path / "a", PLAN, TOKENS)
    todo, complaints = again.survey()
    assert (todo, complaints) == ([1], [])
    again.commit(1, CONTENTS[1])
    again.finalise()
    assert files(tmp_path / "a") == files(cache)
    CacheWriter(cache, PLAN, TOKENS).finalise()
    assert files(tmp_path / "a") == files(cache)


def test_the_last_digits_of_another_processor_give_no_other_cache_id(cache):
    path = cache / layout.MANIFEST_FILE
    manifest = parse_manifest(path.read_bytes(), PLAN)
    moved = manifest.splits[0].model_copy(update={"teacher_nll": manifest.splits[0].teacher_nll + 1e-6})
    there = manifest.model_copy(update={"splits": (moved, *manifest.splits[1:])}).to_bytes()
    path.write_bytes(there)
    assert CacheWriter(cache, PLAN, TOKENS).finalise().cache_id == open_cache(cache).id
    assert path.read_bytes() == there
    wrong = moved.model_copy(update={"teacher_nll": moved.teacher_nll + 1.0})
    path.write_bytes(manifest.model_copy(update={"splits": (wrong, *manifest.splits[1:])}).to_bytes())
    assert CacheWriter(cache, PLAN, TOKENS).finalise() == manifest


@pytest.mark.parametrize("field", ["bytes", "raw_bytes"])
def test_a_manifest_that_promises_too_large_a_shard_is_refused(cache, field):
    manifest = json.loads((cache / layout.MANIFEST_FILE).read_text())
    manifest["shards"][1][field] = layout.SHARD_LIMIT + 1
    (cache / layout.MANIFEST_FILE).write_text(json.dumps(manifest))
    with pytest.raises(CorruptCacheError, match="shard 1 should have at most"):
        open_cache(cache)


def test_a_broken_shard_is_named_and_made_again(cache):
    whole = files(cache)
    path = shard_path(cache, 1)
    path.write_bytes(path.read_bytes()[:-5])
    writer = CacheWriter(cache, PLAN, TOKENS)
    todo, complaints = writer.survey()
    assert todo == [1]
    assert "00001" in complaints[0]
    writer.commit(1, CONTENTS[1])
    writer.finalise()
    assert files(cache) == whole


def test_another_plan_is_refused_naming_the_fields(cache):
    other = sample_plan(CONTENTS, dtype="bfloat16", batch_tokens=128)
    with pytest.raises(PlanMismatchError, match=r"teacher\.batch_tokens: 128 against 64; teacher\.dtype: 'bfloat16'"):
        CacheWriter(cache, other, TOKENS)


def test_a_directory_that_is_no_cache_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(CacheError, match=r"neither empty nor a cache.*thesis\.tex"):
        CacheWriter(tmp_path, PLAN, TOKENS)
    with pytest.raises(CacheError, match="not a cache"):
        open_cache(tmp_path)


def test_an_incomplete_cache_names_what_is_missing(tmp_path, cache):
    write(tmp_path / "part", order=(0,))
    with pytest.raises(IncompleteCacheError, match=r"2 of 3 shards are missing: 00001\S+, 00002"):
        open_cache(tmp_path / "part")
    (cache / layout.MANIFEST_FILE).unlink()
    with pytest.raises(IncompleteCacheError, match="no manifest"):
        open_cache(cache)
    with pytest.raises(CacheError, match="missing or broken"):
        CacheWriter(tmp_path / "part", PLAN, TOKENS).finalise()


def damage(kind, cache):
    path = shard_path(cache, 0)
    data = bytearray(path.read_bytes())
    if kind == "truncated":
        path.write_bytes(data[:-1])
    elif kind == "flipped":
        data[len(data) // 2] ^= 4
        path.write_bytes(data)
    elif kind == "swapped":
        other = shard_path(cache, 1)
        swapped = other.read_bytes()
        other.write_bytes(data)
        path.write_bytes(swapped)
    elif kind == "replayed":
        shutil.copy(shard_path(cache, 1), path)
    elif kind == "link":
        path.unlink()
        path.symlink_to(cache)


@pytest.mark.parametrize("kind", ["truncated", "flipped", "swapped", "replayed", "link"])
def test_a_damaged_shard_is_never_read(cache, kind):
    damage(kind, cache)
    with pytest.raises(CorruptCacheError, match="00000"):
        open_cache(cache).split("train")[0]
    assert "shards/00000.safetensors.zst" in {f.file for f in verify(cache)}


def test_a_shard_of_another_cache_is_refused_even_with_a_fitting_manifest(tmp_path, cache):
    other = sample_plan(CONTENTS, dtype="bfloat16")
    writer = CacheWriter(tmp_path / "other", other, TOKENS)
    for index, content in enumerate(CONTENTS):
        writer.commit(index, content)
    writer.finalise()
    shutil.copy(shard_path(tmp_path / "other", 0), shard_path(cache, 0))
    manifest = json.loads((cache / layout.MANIFEST_FILE).read_text())
    foreign = json.loads((tmp_path / "other" / layout.MANIFEST_FILE).read_text())
    manifest["shards"][0] = foreign["shards"][0]
    (cache / layout.MANIFEST_FILE).write_text(json.dumps(manifest))
    with pytest.raises(CorruptCacheError, match="belongs to plan"):
        open_cache(cache).split("train")[0]


def test_verify_is_silent_on_a_whole_cache_and_names_everything_else(cache):
    assert verify(cache) == []
    manifest = json.loads((cache / layout.MANIFEST_FILE).read_text())
    manifest["splits"][0]["teacher_nll"] += 1.0
    (cache / layout.MANIFEST_FILE).write_text(json.dumps(manifest))
    shard_path(cache, 2).unlink()
    (cache / layout.VOCABULARY_FILE).write_bytes(b"")
    found = {f.file for f in verify(cache)}
    assert found == {layout.VOCABULARY_FILE, "shards/00002.safetensors.zst"}
    shutil.rmtree(cache)


def test_verify_compares_totals(cache):
    manifest = json.loads((cache / layout.MANIFEST_FILE).read_text())
    manifest["splits"][0]["teacher_nll"] += 1.0
    (cache / layout.MANIFEST_FILE).write_text(json.dumps(manifest))
    assert [f.problem for f in verify(cache)] == ["the totals of split train are not those of its shards"]


@pytest.mark.parametrize(
    "text",
    [
        '{"a": 1, "a": 2}',
        '{"a": NaN}',
        '{"a": 1e999, "b": Infinity}',
        '{"a": %s}' % ("9" * 5000),
        '{"a":' + "[" * 100_000 + "]" * 100_000 + "}",
        '{"a": 1',
        "[]",
        "\udcff",
    ],
    ids=["duplicate", "nan", "infinity", "huge", "deep", "cut", "list", "encoding"],
)
def test_hostile_json_is_refused(text):
    with pytest.raises(CorruptCacheError):
        parse_object(text.encode("utf-8", "surrogateescape"), what="it")


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v.pop("teacher"),
        lambda v: v.update(extra=1),
        lambda v: v.update(version=7),
        lambda v: v.update(format="other"),
        lambda v: v["selection"].update(k="8"),
        lambda v: v["selection"].update(temperatures=[2.0, 1.0]),
        lambda v: v["selection"].update(floors=[0.1]),
        lambda v: v["selection"].update(floors=[0.1, 1e-9]),
        lambda v: v["selection"].update(method="random_sampling", floors=[]),
        lambda v: v["selection"].update(tail_logits=False),
        lambda v: v["selection"].update(draws=256),
        lambda v: v["selection"].update(values="exact"),
        lambda v: v["shards"].pop(),
        lambda v: v["shards"][0].update(start=1),
        lambda v: v["tokenizer"].update(vocab_size=2**63),
    ],
)
def test_a_changed_plan_is_refused(change):
    value = json.loads(PLAN.to_bytes())
    assert parse_plan(json.dumps(value).encode()) == PLAN
    change(value)
    with pytest.raises(CorruptCacheError, match=r"plan\.json"):
        parse_plan(json.dumps(value).encode())


def test_memory_holds_a_bounded_number_of_decoded_shards(cache):
    opened = open_cache(cache, keep=1)
    for split in opened.splits.values():
        for index in range(len(split)):
            split[index]
            assert len(opened._decoded) == 1
