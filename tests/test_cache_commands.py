"""Commands on a finished cache as a user types them: what they refuse, and what they print where they cannot."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import kdcache
from kdcache.cache.reader import open_cache
from kdcache.cache.subset import subset
from kdcache.errors import CacheError, PlanMismatchError, StorageError, TransferError
from kdcache.recipe import parse_recipe
from kdcache.student.agreement import refuse_other_cache
from kdcache.student.distill import distill

ROOT = Path(__file__).parent.parent


@pytest.fixture
def cache(shared_cache, tmp_path):
    """A cache of its own for a test that may damage it."""
    return Path(shutil.copytree(shared_cache, tmp_path / "cache"))


def kdcache_(*argv, stdout=subprocess.PIPE, **variables):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(
        [sys.executable, "-m", "kdcache", *map(str, argv)], env=environment, stdout=stdout, stderr=subprocess.PIPE,
        text=True, check=False,
    )  # fmt: skip


def refused(ran, *expected):
    assert ran.returncode == 2, ran.stderr
    assert ran.stderr.count("\n") == 1, ran.stderr
    for text in expected:
        assert text in ran.stderr
    return True


def test_a_page_is_never_written_over_a_cache(cache, tmp_path):
    before = (cache / "manifest.json").read_bytes()
    assert refused(kdcache_("inspect", cache, "--html", cache / "manifest.json"), "belongs to a cache")
    assert refused(kdcache_("inspect", cache, "--html", cache / "shards" / "page.html"), "belongs to a cache")
    assert (cache / "manifest.json").read_bytes() == before
    assert refused(kdcache_("inspect", cache, "--html", tmp_path / "none" / "page.html"), "a directory that is there")


def test_options_that_would_do_nothing_are_refused(cache):
    assert refused(kdcache_("inspect", cache, "--split", "train"), "--sequence and --html")
    assert refused(kdcache_("verify", cache, "--teacher", "x"), "--rescore")


def test_what_is_no_cache_is_told_apart(cache, tmp_path):
    assert refused(kdcache_("inspect", cache / "manifest.json"), "is a file; give the directory")
    assert refused(kdcache_("inspect", tmp_path / "none"), "does not exist")
    (cache / "plan.json").unlink()
    assert refused(kdcache_("verify", cache), "has no plan.json", "kdcache repair --from")


def test_a_terminal_with_few_letters_shows_others_for_them(cache):
    ran = kdcache_("inspect", cache, "--sequence", 0, LC_ALL="C", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert ran.returncode == 0, ran.stderr
    assert "sequence 0 of" in ran.stdout
    assert ran.stdout.isascii()


def test_an_output_that_is_full_is_one_line(cache):
    if not Path("/dev/full").exists():
        pytest.skip("this machine has no /dev/full")
    with Path("/dev/full").open("w") as full:
        assert refused(kdcache_("inspect", cache, stdout=full), "cannot write the output")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may look into every directory")
def test_a_directory_that_may_not_be_looked_into(cache):
    cache.chmod(0)
    try:
        assert refused(kdcache_("verify", cache), "get access to it")
    finally:
        cache.chmod(0o755)


def test_a_subset_is_trained_by_the_recipe_of_its_parent(shared_cache, values, tmp_path):
    made = subset(open_cache(shared_cache), tmp_path / "part", sequences=(0, 4), max_length=24)
    recipe = parse_recipe({**values, "cache": {"directory": str(made.directory)}})
    refuse_other_cache(recipe, open_cache(made.directory))
    other = parse_recipe({**values, "data": {**values["data"], "system": "Be brief."}})
    with pytest.raises(PlanMismatchError, match=r"data\.system"):
        refuse_other_cache(other, open_cache(made.directory))
    alone = subset(open_cache(shared_cache), tmp_path / "alone", splits=["train"])
    with pytest.raises(CacheError, match=r"has no split validation, only train; .* take a cache that has both"):
        distill(parse_recipe({**values, "cache": {"directory": str(alone.directory)}}))


def test_a_teacher_writes_into_a_directory(values, tmp_path):
    values = {**values, "cache": {"directory": "s3://bucket/cache"}}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(values))
    assert refused(kdcache_("teacher-cache", recipe), "writes into a directory", "kdcache push")
    assert refused(kdcache_("teacher-cache", recipe, "--dry-run"), "writes into a directory")


def test_the_library_shows_itself(shared_cache):
    cache = kdcache.open_cache(shared_cache)
    assert {"open_cache", "views", "push"} <= set(dir(kdcache))
    assert kdcache.views.to_torch(cache["train"])[0]["input_ids"].ndim == 1
    assert repr(cache).startswith(f"<Cache {cache.id[:12]}")
    assert [name for name, _ in cache.items()] == list(cache.keys()) == list(cache)
    assert cache.get("test") is None
    with pytest.raises(KeyError, match="the splits are train"):
        cache["test"]
    assert {cache: 1}[cache] == 1


def test_a_pin_holds_for_directories_too(shared_cache, tmp_path):
    wrong = f"file://{shared_cache}#cache-id=deadbeefdead"
    with pytest.raises(CacheError, match=r"holds the cache .* not deadbeefdead"):
        kdcache.open_cache(wrong)
    assert refused(kdcache_("verify", wrong), "not deadbeefdead")
    own = kdcache.open_cache(shared_cache).id
    assert kdcache.open_cache(f"file://{shared_cache}#cache-id={own[:16].upper()}").id == own
    with pytest.raises(TransferError, match="names another cache id"):
        kdcache.pull(wrong, tmp_path / "d", cache_id=own[:12])


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (("push", "CACHE", "file://host/x"), "whole path"),
        (("push", "CACHE", "file:relative"), "a URL has //"),
        (("push", "CACHE", "CACHE/inner"), "within it"),
        (("subset", "CACHE", "s3://bucket/part", "--split", "train"), "directory of this machine"),
        (("merge", "CACHE", "CACHE", "s3://bucket/both"), "directory of this machine"),
        (("repair", "https://host/cache"), "kdcache pull"),
    ],
)
def test_addresses_that_cannot_be_meant(cache, monkeypatch, tmp_path, command, expected):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    assert refused(kdcache_(*(str(word).replace("CACHE", str(cache)) for word in command)), expected)
    assert sorted(tmp_path.iterdir()) == before


def test_a_spoilt_copy_is_seen_when_it_is_pushed_to_again(cache, tmp_path):
    copy = tmp_path / "with space"
    assert kdcache_("push", cache, f"file://{tmp_path}/with%20space").returncode == 0
    shard = copy / "shards/00001.safetensors.zst"
    data = bytearray(shard.read_bytes())
    data[50] ^= 1
    shard.write_bytes(data)
    assert kdcache_("push", cache, copy).returncode == 0
    assert kdcache_("verify", copy).returncode == 0


def test_the_store_is_a_directory_of_this_machine(monkeypatch):
    from kdcache.cache.store import store_home

    monkeypatch.setenv("KDCACHE_HOME", "~/caches")
    assert store_home() == Path("~/caches/store").expanduser()
    monkeypatch.setenv("KDCACHE_HOME", "https://host/store")
    with pytest.raises(StorageError, match="KDCACHE_HOME should be a directory"):
        store_home()
