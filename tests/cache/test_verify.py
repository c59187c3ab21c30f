"""Everything that is wrong with a cache is named once; what merely lies about is a note."""

import json
import shutil

import pytest
from typer.testing import CliRunner

import kdcache.commands.caches  # noqa: F401 (registers the command)
from kdcache.cache import layout
from kdcache.cache.reader import open_cache, shard_path
from kdcache.cache.verify import examine, verify
from kdcache.cache.writer import CacheWriter
from kdcache.commands.app import app
from kdcache.errors import CacheError
from tests.cache.samples import TOKENS, sample_plan, sample_sequences

CONTENTS = [sample_sequences(5, seed=n) for n in range(5)]


@pytest.fixture
def cache(tmp_path):
    directory = tmp_path / "cache"
    writer = CacheWriter(directory, sample_plan(CONTENTS), TOKENS)
    for index, content in enumerate(CONTENTS):
        writer.commit(index, content)
    writer.finalise()
    return directory


def name(index):
    return f"shards/{layout.shard_name(index)}"


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def run(*arguments):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout


@pytest.mark.parametrize("threads", [1, 2, 5, 64])
def test_a_whole_cache_has_no_findings_whatever_the_threads(cache, threads):
    seen = []
    found = examine(cache, threads=threads, on_shard=seen.append)
    opened = open_cache(cache)
    assert (found.findings, found.notes, found.whole) == ([], [], True)
    assert (found.cache_id, found.plan_digest, found.shards) == (opened.id, opened.plan.digest, 5)
    assert seen == [s.bytes for s in opened.manifest.shards]
    assert found.bytes == sum(seen)


def test_missing_shards_are_named_once_each_and_the_others_checked(cache):
    for index in (1, 3):
        shard_path(cache, index).unlink()
    flip(shard_path(cache, 2))
    found = examine(cache)
    assert [(f.file, f.problem == "missing") for f in found.findings] == [
        (name(1), True),
        (name(2), False),
        (name(3), True),
    ]
    assert found.cache_id is not None


def test_without_a_manifest_the_shards_are_checked_all_the_same(cache):
    (cache / layout.MANIFEST_FILE).unlink()
    shard_path(cache, 4).unlink()
    flip(shard_path(cache, 0))
    found = examine(cache)
    assert [f.file for f in found.findings] == [layout.MANIFEST_FILE, name(0), name(4)]
    assert "the same command goes on where it stopped" in found.findings[0].problem
    assert layout.shard_name(4) not in found.findings[0].problem
    assert found.cache_id is None
    assert not found.whole


def test_a_broken_manifest_does_not_hide_the_rest(cache):
    (cache / layout.MANIFEST_FILE).write_text("{")
    (cache / layout.VOCABULARY_FILE).unlink()
    flip(shard_path(cache, 3))
    assert [f.file for f in verify(cache)] == [layout.VOCABULARY_FILE, layout.MANIFEST_FILE, name(3)]


def test_a_swapped_plan_leaves_nothing_good(cache):
    plan = json.loads((cache / layout.PLAN_FILE).read_text())
    plan["teacher"]["dtype"] = "bfloat16"
    (cache / layout.PLAN_FILE).write_text(json.dumps(plan))
    assert [f.file for f in verify(cache)] == [layout.MANIFEST_FILE, *(name(i) for i in range(5))]


def test_what_does_not_belong_is_a_note(cache):
    (cache / "notes.txt").write_text("mine")
    (cache / ".tmp-manifest.json-0a").write_text("half")
    (cache / "shards" / ".tmp-00001.safetensors.zst-0b").write_text("half")
    shutil.copy(shard_path(cache, 0), cache / name(7))
    (cache / layout.CARD_FILE).unlink()
    found = examine(cache)
    assert found.whole
    notes = {n.file: n.problem for n in found.notes}
    assert set(notes) == {
        "notes.txt", ".tmp-manifest.json-0a", "shards/.tmp-00001.safetensors.zst-0b", name(7), layout.CARD_FILE,
    }  # fmt: skip
    assert "stopped run" in notes[".tmp-manifest.json-0a"]
    assert "never read" in notes[name(7)]
    code, out = run("verify", cache)
    assert code == 0
    assert out.count("note: ") == 5
    assert "is whole" in out


def test_links_out_of_a_cache_are_findings_and_links_within_a_note(cache, tmp_path):
    inside = cache / "kept"
    shard_path(cache, 0).rename(inside)
    shard_path(cache, 0).symlink_to(inside)
    found = examine(cache)
    assert found.whole
    assert {n.file for n in found.notes} == {"kept", "."}
    outside = tmp_path / "outside"
    shutil.copy(shard_path(cache, 1), outside)
    shard_path(cache, 1).unlink()
    shard_path(cache, 1).symlink_to(outside)
    shard_path(cache, 2).unlink()
    shard_path(cache, 2).symlink_to(tmp_path / "nowhere")
    shard_path(cache, 3).unlink()
    shard_path(cache, 3).mkdir()
    (cache / layout.MANIFEST_FILE).rename(tmp_path / "manifest.json")
    (cache / layout.MANIFEST_FILE).symlink_to(tmp_path / "manifest.json")
    problems = {f.file: f.problem for f in verify(cache)}
    assert set(problems) == {layout.MANIFEST_FILE, name(1), name(2), name(3)}
    assert "link" in problems[name(1)]


def test_totals_that_are_not_the_shards(cache):
    manifest = json.loads((cache / layout.MANIFEST_FILE).read_text())
    manifest["splits"][1]["kept_mass_mean"][0] *= 0.5
    (cache / layout.MANIFEST_FILE).write_text(json.dumps(manifest))
    assert [(f.file, f.problem) for f in verify(cache)] == [
        (layout.MANIFEST_FILE, "the totals of split validation are not those of its shards")
    ]


def test_a_directory_that_is_no_cache_is_refused(tmp_path):
    with pytest.raises(CacheError, match="not a cache"):
        examine(tmp_path)


def test_json_is_all_that_is_printed(cache):
    opened = open_cache(cache)
    code, out = run("verify", cache, "--json")
    record = json.loads(out)
    assert code == 0
    assert record == {
        "cache": str(cache), "cache_id": opened.id, "plan_digest": opened.plan.digest, "whole": True, "findings": [],
        "notes": [], "shards": 5, "bytes": sum(s.bytes for s in opened.manifest.shards), "seconds": record["seconds"],
        "rescore": None,
    }  # fmt: skip
    flip(shard_path(cache, 2))
    code, out = run("verify", cache, "--json")
    record = json.loads(out)
    assert (code, record["whole"]) == (1, False)
    assert [f["file"] for f in record["findings"]] == [name(2)]
    assert set(record["findings"][0]) == {"file", "problem"}


def test_what_is_not_whole_is_not_scored_again(cache):
    flip(shard_path(cache, 2))
    code, out = run("verify", cache, "--rescore", 2)
    assert code == 1
    assert "1 finding\n" in out
    assert "not run again" in out
