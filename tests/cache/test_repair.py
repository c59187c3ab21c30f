"""Every kind of damage, and what mends it: a copy, whoever makes shards, or the shards themselves."""

import errno
import json
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import yaml
import zstandard

import kdcache.commands.derive
from kdcache.cache import layout
from kdcache.cache.directory import read_plan
from kdcache.cache.manifest import Derivation
from kdcache.cache.reader import open_cache, shard_path
from kdcache.cache.repair import repair
from kdcache.cache.shard import decompress, read_file
from kdcache.cache.verify import verify
from kdcache.cache.writer import CacheWriter
from kdcache.cli import main
from kdcache.commands.derive import _remake
from kdcache.errors import CacheError, StorageError
from tests.cache.samples import TOKENS, sample_plan, sample_sequences

CONTENTS = [sample_sequences(n, seed=n) for n in (3, 5, 2)]
PLAN = sample_plan(CONTENTS)
SHARD = f"shards/{layout.shard_name(1)}"


def make(directory, plan=PLAN, contents=CONTENTS):
    writer = CacheWriter(directory, plan, TOKENS)
    for index in writer.survey()[0]:
        writer.commit(index, contents[index])
    writer.finalise()


@pytest.fixture
def cache(tmp_path):
    make(tmp_path / "c")
    return tmp_path / "c"


@pytest.fixture
def copy(tmp_path):
    make(tmp_path / "copy")
    return tmp_path / "copy"


def fetch_from(directory):
    return lambda name, limit: read_file(directory / name, limit=limit)


def files(directory):
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def truncate(path):
    path.write_bytes(path.read_bytes()[:-3])


DAMAGE = {
    "truncated": lambda c: truncate(c / SHARD),
    "missing": lambda c: (c / SHARD).unlink(),
    "replayed": lambda c: shutil.copy(shard_path(c, 0), c / SHARD),
    "link": lambda c: ((c / SHARD).unlink(), (c / SHARD).symlink_to(c)),
    "all shards": lambda c: shutil.rmtree(c / "shards"),
    "manifest": lambda c: (c / layout.MANIFEST_FILE).write_text("{}"),
    "no manifest": lambda c: (c / layout.MANIFEST_FILE).unlink(),
    "vocabulary": lambda c: (c / layout.VOCABULARY_FILE).write_bytes(b""),
    "no vocabulary": lambda c: (c / layout.VOCABULARY_FILE).unlink(),
    "plan": lambda c: (c / layout.PLAN_FILE).write_text("{"),
    "no plan": lambda c: (c / layout.PLAN_FILE).unlink(),
    "another plan": lambda c: (c / layout.PLAN_FILE).write_bytes(sample_plan(CONTENTS, dtype="bfloat16").to_bytes()),
    "shard and manifest": lambda c: (truncate(c / SHARD), truncate(c / layout.MANIFEST_FILE)),
    "all but the plan": lambda c: (shutil.rmtree(c / "shards"), (c / "manifest.json").unlink(), truncate(c / "vocabulary.json.zst")),
    "card": lambda c: (c / layout.CARD_FILE).unlink(),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_copy_mends_everything_to_the_same_bytes(cache, copy, kind):
    whole = files(cache)
    DAMAGE[kind](cache)
    done = repair(cache, fetch=fetch_from(copy))
    assert done.after.whole
    assert done.refused == []
    assert verify(cache) == []
    assert files(cache) == whole
    assert kind in ("card", "plan", "no plan", "another plan") or done.before


@pytest.mark.parametrize("kind", ["manifest", "no manifest", "card"])
def test_manifest_and_card_follow_from_the_shards(cache, kind):
    whole = files(cache)
    DAMAGE[kind](cache)
    assert repair(cache).after.whole
    assert files(cache) == whole


def test_wrong_totals_are_summed_again(cache):
    whole = files(cache)
    manifest = json.loads((cache / layout.MANIFEST_FILE).read_text())
    manifest["splits"][0]["teacher_nll"] += 1.0
    (cache / layout.MANIFEST_FILE).write_text(json.dumps(manifest))
    assert repair(cache).after.whole
    assert files(cache) == whole


def test_a_whole_cache_is_left_alone(cache):
    (cache / layout.CARD_FILE).write_text("with a licence")
    before = {p: p.stat().st_mtime_ns for p in cache.rglob("*") if p.is_file()}
    done = repair(cache, fetch=lambda name, limit: pytest.fail(name), make=lambda: pytest.fail("made"))
    assert (done.after.whole, done.before, done.fetched) == (True, [], [])
    assert {p: p.stat().st_mtime_ns for p in cache.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("kind", ["truncated", "vocabulary", "shard and manifest"])
def test_without_help_damage_stays_named_and_untouched(cache, kind):
    DAMAGE[kind](cache)
    before = files(cache)
    done = repair(cache)
    assert not done.after.whole
    assert done.after.findings == done.before
    assert files(cache) == before


@pytest.mark.parametrize("manifest", [True, False])
@pytest.mark.parametrize("offered", ["truncated", "another cache's", "another shard", "too long", "absent"])
def test_a_bad_copy_of_a_shard_is_not_taken(cache, copy, offered, manifest):
    theirs = copy / SHARD
    if offered == "truncated":
        truncate(theirs)
    elif offered == "another cache's":
        plan = sample_plan(CONTENTS, dtype="bfloat16")
        make(copy.parent / "other", plan)
        shutil.copy(copy.parent / "other" / SHARD, theirs)
    elif offered == "another shard":
        shutil.copy(shard_path(copy, 2), theirs)
    elif offered == "too long":
        theirs.write_bytes(theirs.read_bytes() + b"0")
    else:
        theirs.unlink()
    if not manifest:
        (cache / layout.MANIFEST_FILE).unlink()
    truncate(cache / SHARD)
    before = files(cache)
    done = repair(cache, fetch=fetch_from(copy))
    assert [f.file for f in done.refused] == [SHARD]
    assert files(cache) == before
    assert not done.after.whole


def test_one_bad_file_of_the_copy_does_not_hold_up_the_others(cache, copy):
    shutil.rmtree(cache / "shards")
    truncate(copy / SHARD)
    done = repair(cache, fetch=fetch_from(copy))
    assert [f.file for f in done.refused] == [f.file for f in done.after.findings] == [SHARD]
    assert len(done.fetched) == 2


@pytest.fixture
def nudged(cache, copy):
    """Cache and copy with a manifest that is right and not the one that this machine would sum up."""
    manifest = json.loads((cache / layout.MANIFEST_FILE).read_text())
    manifest["splits"][0]["teacher_nll"] *= 1 + 1e-9
    for directory in (cache, copy):
        (directory / layout.MANIFEST_FILE).write_text(json.dumps(manifest))
        assert verify(directory) == []
    return cache


@pytest.mark.parametrize("kind", ["manifest", "no manifest", "shard and manifest", "all but the plan"])
def test_a_lost_manifest_is_the_copys_so_that_the_id_stays(nudged, copy, kind):
    whole = files(nudged)
    DAMAGE[kind](nudged)
    done = repair(nudged, fetch=fetch_from(copy), make=lambda: pytest.fail("made"))
    assert done.after.whole
    assert layout.MANIFEST_FILE in done.fetched
    assert done.refused == []
    assert files(nudged) == whole


def test_a_manifest_of_other_shards_is_not_taken(nudged, copy):
    theirs = copy / SHARD
    raw = decompress(theirs.read_bytes(), limit=layout.SHARD_LIMIT)
    theirs.write_bytes(zstandard.ZstdCompressor(level=19, write_checksum=True, write_content_size=True).compress(raw))
    (copy / layout.MANIFEST_FILE).unlink()
    assert repair(copy).after.whole
    (nudged / layout.MANIFEST_FILE).unlink()
    shards = {name: data for name, data in files(nudged).items() if "shards/" in name}
    done = repair(nudged, fetch=fetch_from(copy))
    assert done.after.whole
    assert [(f.file, "is a good shard" in f.problem) for f in done.refused] == [(layout.MANIFEST_FILE, True)]
    assert {name: data for name, data in files(nudged).items() if "shards/" in name} == shards
    assert open_cache(nudged).id != open_cache(copy).id


def test_a_copys_manifest_waits_for_all_of_its_shards(nudged, copy):
    DAMAGE["shard and manifest"](nudged)
    (nudged / layout.MANIFEST_FILE).unlink()
    truncate(copy / SHARD)
    done = repair(nudged, fetch=fetch_from(copy))
    assert not done.after.whole
    assert [f.file for f in done.refused] == [SHARD]
    assert not (nudged / layout.MANIFEST_FILE).exists()


def test_a_copy_of_another_cache_gives_no_plan(cache, copy):
    shutil.rmtree(copy)
    make(copy, sample_plan(CONTENTS, dtype="bfloat16"))
    (cache / layout.PLAN_FILE).unlink()
    before = files(cache)
    with pytest.raises(CacheError, match=r"no manifest or shard in .* belongs to it"):
        repair(cache, fetch=fetch_from(copy))
    with pytest.raises(CacheError, match="can only come from another copy"):
        repair(cache)
    assert files(cache) == before


@pytest.mark.parametrize("kind", ["truncated", "missing", "link", "all shards", "vocabulary", "shard and manifest"])
def test_whoever_makes_shards_mends_them(cache, kind):
    whole = files(cache)
    DAMAGE[kind](cache)
    assert repair(cache, make=lambda: make(cache)).after.whole
    assert files(cache) == whole


def test_a_shard_that_decodes_and_is_not_the_promised_one_is_made_again(cache):
    whole = files(cache)
    manifest = json.loads((cache / layout.MANIFEST_FILE).read_text())
    manifest["shards"][1]["sha256"] = "0" * 64
    (cache / layout.MANIFEST_FILE).write_text(json.dumps(manifest))
    seen = []

    def remake():
        seen.append((cache / SHARD).exists())
        make(cache)

    assert repair(cache, make=remake).after.whole
    assert seen == [False]
    assert files(cache) == whole


def test_a_run_that_fails_leaves_what_was_there(cache):
    truncate(cache / SHARD)
    before = files(cache)

    def fail():
        raise StorageError("the disk is full")

    with pytest.raises(StorageError, match="full"):
        repair(cache, make=fail)
    assert files(cache) == before


def test_what_a_run_fails_with_is_not_blamed_on_the_moving_of_shards(cache, monkeypatch):
    truncate(cache / SHARD)
    before = files(cache)

    def fail():
        raise OSError("the teacher's file is gone")

    with pytest.raises(OSError, match="the teacher's file is gone"):
        repair(cache, make=fail)
    assert files(cache) == before

    def refuse(path, target):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(StorageError, match=r"cannot move damaged shards .* aside: Permission denied"):
        repair(cache, make=lambda: pytest.fail("made"))
    assert files(cache) == before


def test_other_sequences_than_the_plan_promises_cannot_be_mended(tmp_path):
    plan = sample_plan([CONTENTS[0], CONTENTS[1], CONTENTS[2]])
    splits = (plan.data.splits[0].model_copy(update={"fingerprint": "0" * 64}), plan.data.splits[1])
    make(tmp_path / "c", plan.model_copy(update={"data": plan.data.model_copy(update={"splits": splits})}))
    done = repair(tmp_path / "c")
    assert [f.file for f in done.after.findings] == [layout.PLAN_FILE]


@pytest.fixture
def run(monkeypatch, capsys):
    def call(*argv):
        assert kdcache.commands.derive.repair
        monkeypatch.setattr(sys, "argv", ["kdcache", *map(str, argv)])
        with pytest.raises(SystemExit) as exited:
            main()
        out, err = capsys.readouterr()
        return exited.value.code or 0, out, err

    return call


def test_the_command_says_what_helps_and_does_it(run, cache, copy):
    whole = files(cache)
    DAMAGE["truncated"](cache)
    code, out, err = run("repair", cache)
    assert (code, err) == (1, "")
    assert SHARD in out
    assert f"kdcache repair {cache} --from COPY" in out
    assert f"kdcache repair {cache} --recipe RECIPE" in out
    code, out, err = run("repair", cache, "--from", copy)
    assert (code, err) == (0, "")
    assert f"{SHARD}: fetched" in out
    size = sum(len(data) for name, data in whole.items() if "shards/" in name)
    assert f"is whole: 3 shards, {size / 1024:.1f} KiB, cache id {open_cache(cache).id}" in out
    assert files(cache) == whole
    truncate(copy / SHARD)
    DAMAGE["truncated"](cache)
    code, out, err = run("repair", cache, "--from", copy)
    assert code == 1
    assert f"{SHARD}: not taken from {copy}" in out


def test_a_url_serves_as_the_copy(run, cache, copy):
    whole = files(cache)
    DAMAGE["all but the plan"](cache)
    code, out, err = run("repair", cache, "--from", f"file://{copy}")
    assert (code, err) == (0, ""), out
    assert files(cache) == whole
    DAMAGE["missing"](cache)
    code, out, _ = run("repair", cache, "--from", f"file://{copy}-elsewhere")
    assert code == 1
    assert f"{SHARD}: not taken" in out


def test_a_url_is_not_mended_in_place(run, cache):
    code, _, err = run("repair", "https://user:secret@host/some/cache", "--from", cache)
    assert code == 2
    assert err.startswith(
        "error: repair mends a directory of this machine, not https://host/some/cache; kdcache pull https://"
    )
    assert "secret" not in err
    code, out, _ = run("repair", f"file://{cache}")
    assert code == 0
    assert "is whole" in out


def test_a_command_to_paste_holds_nothing_of_a_strangers_but_quoted_values(run, tmp_path):
    settings = {
        "splits": "train;reboot,b",
        "sequences": "$(id):",
        "k": "`id`",
        "max_length": "6\n7",
        "x; reboot #": "y",
    }
    derived = Derivation(operation="subset", parents=("a" * 64,), settings=settings)
    directory = tmp_path / "it's a cache"
    make(directory, PLAN.model_copy(update={"derived": derived}))
    truncate(directory / SHARD)
    text = _remake(directory, read_plan(directory))
    assert shlex.split(text.removesuffix(" makes them again")) == [
        "kdcache", "subset", f"CACHE-{'a' * 12}", str(directory), "--split", "train;reboot", "--split", "b", "--k", "`id`",
        "--max-length", "6\n7", "--sequences", "$(id):",
    ]  # fmt: skip
    code, out, _ = run("repair", directory)
    assert code == 1
    assert f"kdcache repair {shlex.quote(str(directory))} --from COPY" in out
    assert "#" not in out.partition("--from COPY")[2]


def test_the_recipe_makes_damaged_shards_again(run, values, shared_cache, tmp_path):
    directory = tmp_path / "cache"
    shutil.copytree(shared_cache, directory)
    whole = files(directory)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(values))
    truncate(shard_path(directory, 1))
    (directory / layout.VOCABULARY_FILE).unlink()
    code, out, err = run("repair", directory, "--recipe", recipe)
    assert (code, err) == (0, ""), out
    assert f"shards/{layout.shard_name(1)}: made again" in out
    assert files(directory) == whole
    truncate(shard_path(directory, 1))
    other = {**values, "teacher": {**values["teacher"], "batch_tokens": 256}}
    recipe.write_text(yaml.safe_dump(other))
    code, _, err = run("repair", directory, "--recipe", recipe)
    assert code == 2
    assert "teacher.batch_tokens" in err
    assert shard_path(directory, 1).exists()
    code, _, err = run("repair", tmp_path / "copy", "--recipe", recipe)
    assert code == 2
    assert "give the recipe that made it" in err


def test_derived_caches_are_made_by_commands(run, cache, tmp_path):
    parent = open_cache(cache)
    child = tmp_path / "child"
    options = ["--split", "train", "--max-length", 6, "--sequences", "-7:-1"]
    code, out, err = run("subset", cache, child, *options)
    assert (code, err) == (0, "")
    made = open_cache(child)
    assert f"train: {len(made.split('train'))} sequences" in out
    assert made.plan.derived.settings == {"splits": "train", "sequences": "-7:-1", "max_length": "6"}
    assert f"cache id {made.id}" in out
    assert "complete already" in run("subset", cache, child, *options)[1]
    truncate(shard_path(child, 0))
    code, out, _ = run("repair", child)
    assert code == 1
    command = f"kdcache subset CACHE-{parent.id[:12]} {child} --split train --max-length 6 --sequences -7:-1"
    assert f"{command} makes them again" in out
    assert run(*command.replace(f"CACHE-{parent.id[:12]}", str(cache)).split()[1:])[0] == 0
    assert verify(child) == []
    code, out, err = run("merge", cache, cache, tmp_path / "m")
    assert (code, err) == (0, "")
    assert "warning: 8 of 16 sequences of split train repeat" in out
    assert "train: 16 sequences" in out
    for argv, message in (
        (["subset", cache, tmp_path / "d"], "should be of some splits"),
        (["subset", cache, tmp_path / "d", "--k", 3], "need the teacher"),
        (["subset", cache, tmp_path / "d", "--sequences", "5"], "should be A:B"),
        (["merge", cache, tmp_path / "d"], "at least two caches"),
        (["subset", tmp_path / "none", tmp_path / "d", "--sequences", ":1"], "is not a cache"),
    ):
        code, _, err = run(*argv)
        assert code == 2, argv
        assert message in err, (argv, err)
        assert err.count("\n") == 1
