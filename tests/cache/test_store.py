"""Caches opened by URL: what the store keeps, what it lets go, and what it never touches."""

import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys

import pytest

from kdcache.cache import layout, remote, store
from kdcache.cache.leases import Shelf
from kdcache.cache.pace import Retry
from kdcache.cache.reader import open_cache as open_directory
from kdcache.cache.store import local_directory, open_cache, store_home, store_limit
from kdcache.errors import CacheError, CorruptCacheError, StorageError, TransferError
from tests.cache.fault_proxy import Fault, FaultProxy
from tests.cache.servers import web_server
from tests.cache.transfer_trials import files, make_cache

SIZES = {"first": (3, 5, 2), "second": (4, 5, 2), "third": (2, 6, 2)}
SHARD = f"shards/{layout.shard_name(0)}"
QUICK = Retry(attempts=2, first=0.001)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    for name, sizes in SIZES.items():
        make_cache(folder / name, sizes)
    return folder


@pytest.fixture
def site(made, tmp_path, monkeypatch):
    """A web server over copies of three caches, a proxy before it, and a store of this test's own."""
    monkeypatch.setenv("KDCACHE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("KDCACHE_STORE_LIMIT", raising=False)
    monkeypatch.setattr(store, "_for_good", [])
    monkeypatch.setattr("kdcache.cache.transfer.Retry", lambda: QUICK)
    shutil.copytree(made, tmp_path / "site")
    with web_server(tmp_path / "site") as url, FaultProxy(url) as proxy:
        proxy.folder = tmp_path / "site"
        yield proxy
    for lease in store._for_good:
        lease.release()


def read(site):
    """Names of the objects that were read since the last call."""
    names = [c.path.split("/", 2)[2] for c in site.calls if c.method == "GET"]
    site.calls.clear()
    return names


def stored():
    """Directories in the store."""
    return {p.name for p in store_home().iterdir() if p.is_dir()}


def size(made, *names):
    return sum(len(data) for name in names for data in files(made / name).values())


def test_a_url_is_brought_once_and_read_from_the_store(site, made):
    cache = open_cache(f"{site.url}/first")
    assert cache.id == open_directory(made / "first").id
    assert files(cache.directory) == files(made / "first")
    assert sorted(set(read(site))) == sorted(files(made / "first"))
    assert len(cache.split("train")[0].token_ids) > 0
    again = open_cache(f"{site.url}/first/")
    assert again.directory == cache.directory
    assert read(site) == [layout.MANIFEST_FILE, layout.PLAN_FILE]


def test_directories_are_opened_where_they_are(site, made):
    assert open_cache(made / "first").directory == made / "first"
    assert local_directory(made / "first") == made / "first"
    assert local_directory(f"file://{made}/first") == made / "first"
    assert open_cache(str(made / "first")).id == open_cache(f"file://{made}/first").id
    assert not store_home().exists()


def test_a_changed_remote_is_another_cache(site):
    before = open_cache(f"{site.url}/first")
    shutil.rmtree(site.folder / "first")
    (site.folder / "second").rename(site.folder / "first")
    after = open_cache(f"{site.url}/first")
    assert (after.id, after.directory) != (before.id, before.directory)
    assert before.directory.exists()


def test_what_was_used_longest_ago_goes_and_what_is_open_stays(site, made, monkeypatch):
    monkeypatch.setenv("KDCACHE_STORE_LIMIT", str(size(made, "first", "second") + 500))
    first, second = (open_cache(f"{site.url}/{name}") for name in ("first", "second"))
    gone = second.directory
    del second
    third = open_cache(f"{site.url}/third")
    assert not gone.exists()
    assert stored() == {first.directory.name, third.directory.name}
    assert files(first.directory) == files(made / "first")
    with pytest.raises(CacheError, match=r"does not fit into the store .* raise KDCACHE_STORE_LIMIT, or kdcache pull"):
        open_cache(f"{site.url}/second")
    assert stored() == {first.directory.name, third.directory.name}
    del first, third
    # Opened last, so it stays although it was brought first.
    kept = open_cache(f"{site.url}/first").directory
    open_cache(f"{site.url}/second")
    assert kept.exists()
    assert len(stored()) == 2


def test_a_cache_that_is_larger_than_the_limit_is_not_even_begun(site, made, monkeypatch):
    monkeypatch.setenv("KDCACHE_STORE_LIMIT", str(size(made, "first") - 1))
    with pytest.raises(CacheError, match="does not fit"):
        open_cache(f"{site.url}/first")
    assert set(read(site)) == {layout.MANIFEST_FILE, layout.PLAN_FILE}
    assert stored() == set()


def test_nothing_is_removed_for_a_cache_that_is_larger_than_the_limit(site, made, monkeypatch):
    *smaller, largest = sorted(SIZES, key=lambda name: size(made, name))
    monkeypatch.setenv("KDCACHE_STORE_LIMIT", str(size(made, *smaller) + 10))
    for name in smaller:
        open_cache(f"{site.url}/{name}")
    monkeypatch.setenv("KDCACHE_STORE_LIMIT", str(size(made, largest) - 1))
    with pytest.raises(CacheError, match="more than the limit of") as caught:
        open_cache(f"{site.url}/{largest}")
    assert "in use" not in str(caught.value)
    assert len(stored()) == 2
    assert {open_cache(f"{site.url}/{name}").id for name in smaller} == {open_directory(made / n).id for n in smaller}


def test_nothing_is_removed_where_that_would_not_be_enough(site, made, monkeypatch):
    idle = open_cache(f"{site.url}/first").directory
    held = open_cache(f"{site.url}/second")
    monkeypatch.setenv("KDCACHE_STORE_LIMIT", str(size(made, "second", "third") - 1))
    with pytest.raises(CacheError, match="the others are in use"):
        open_cache(f"{site.url}/third")
    assert files(idle) == files(made / "first")
    monkeypatch.setenv("KDCACHE_STORE_LIMIT", str(size(made, "second", "third")))
    open_cache(f"{site.url}/third")
    assert not idle.exists()
    assert held.directory.exists()


@pytest.mark.parametrize("stated", [10**30, layout.VOCABULARY_LIMIT + 1, -1])
def test_no_stated_size_breaks_the_store_or_its_books(site, made, monkeypatch, stated):
    monkeypatch.setattr(
        remote.Place,
        "size",
        lambda place, name, real=remote.Place.size: stated if "vocab" in name else real(place, name),
    )
    assert files(open_cache(f"{site.url}/first").directory) == files(made / "first")
    record = next(iter(Shelf(store_home(), store_limit()).records().values()))
    assert record.bytes == size(made, "first") - len(files(made / "first")[layout.VOCABULARY_FILE]) + (32 << 20)


def test_a_data_card_of_an_absurd_stated_size_is_a_typed_error(site, monkeypatch):
    monkeypatch.setattr(remote.Place, "size", lambda place, name: 10**30)
    with pytest.raises(TransferError, match=layout.CARD_FILE):
        open_cache(f"{site.url}/first")


def test_only_what_the_store_brought_is_ever_removed(site, made, tmp_path, monkeypatch):
    open_cache(f"{site.url}/first")
    ours = next(iter(stored()))
    home = store_home()
    # Somebody's cache, somebody's record, a record whose name leads elsewhere, and a link in place of a directory.
    shutil.copytree(made / "second", home / "my-own-cache")
    shutil.copytree(made / "second", home / ("a" * 32))
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.tex").write_text("mine")
    (home / ("b" * 32)).symlink_to(tmp_path / "precious")
    record = (home / f"{ours}.json").read_bytes()
    (home / f"{'b' * 32}.json").write_bytes(record)
    (home / "..json").write_bytes(record)
    (home / f"{'c' * 32}.json").write_bytes(record[:-5])
    monkeypatch.setenv("KDCACHE_STORE_LIMIT", str(size(made, "second") + 10))
    with pytest.raises(CacheError, match="does not fit"):
        open_cache(f"{site.url}/second")
    assert (home / ours).exists()
    monkeypatch.setenv("KDCACHE_STORE_LIMIT", str(size(made, "first", "second") + 10))
    open_cache(f"{site.url}/second")
    assert not (home / ours).exists()
    assert files(home / "my-own-cache") == files(home / ("a" * 32)) == files(made / "second")
    assert files(tmp_path / "precious") == {"thesis.tex": b"mine"}


def hold(url, ready, done):
    opened = open_cache(url)
    ready.set()
    done.wait(60)
    assert opened.split("train")[0] is not None


def test_another_process_keeps_what_it_has_open(site, made, monkeypatch):
    monkeypatch.setenv("KDCACHE_STORE_LIMIT", str(size(made, "first") + 500))
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    process = context.Process(target=hold, args=(f"{site.url}/first", ready, done))
    process.start()
    try:
        assert ready.wait(60)
        with pytest.raises(CacheError, match="the others are in use"):
            open_cache(f"{site.url}/third")
        assert len(stored()) == 1
    finally:
        done.set()
        process.join()
    assert process.exitcode == 0
    open_cache(f"{site.url}/third")
    assert len(stored()) == 1


def test_two_processes_bring_one_cache_once(site):
    code = "import sys; from kdcache.cache.store import local_directory; print(local_directory(sys.argv[1]))"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, f"{site.url}/first"]
    both = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert len({process.communicate()[0] for process in both}) == 1
    assert [process.returncode for process in both] == [0, 0]
    shards = [n for n in read(site) if n.startswith("shards/")]
    assert len(shards) == len(set(shards)) == 3


def test_without_a_network_only_a_pinned_cache_opens(site, made):
    own = open_directory(made / "first").id
    url = f"{site.url}/first"
    directory = open_cache(url).directory
    site.calls.clear()
    assert open_cache(f"{url}#cache-id={own[:12]}").directory == directory
    assert read(site) == []
    site.choose = lambda call: Fault.ERROR
    assert open_cache(f"{url}#cache-id={own}").directory == directory
    with pytest.raises(TransferError, match=rf"may be out of date; .* write {url}#cache-id={own[:16]}"):
        open_cache(url)
    with pytest.raises(TransferError, match="cannot be reached or fails"):
        open_cache(f"{url}#cache-id={'0' * 12}")


def test_an_interrupted_download_is_finished_and_counted(site, made, monkeypatch):
    site.choose = lambda call: Fault.ZEROS if call.path.endswith(layout.shard_name(1)) else None
    with pytest.raises(TransferError, match="00001"):
        open_cache(f"{site.url}/first")
    assert len(Shelf(store_home(), store_limit()).records()) == len(stored()) == 1
    site.choose = lambda call: None
    read(site)
    assert files(open_cache(f"{site.url}/first").directory) == files(made / "first")
    assert [n for n in read(site) if n.startswith("shards/")] != []
    # A half that nobody finished can be removed like everything else of the store's.
    site.choose = lambda call: Fault.ZEROS if call.path.endswith(layout.shard_name(1)) else None
    monkeypatch.setenv("KDCACHE_STORE_LIMIT", str(max(size(made, "second"), size(made, "third")) + 10))
    with pytest.raises(TransferError):
        open_cache(f"{site.url}/second")
    site.choose = lambda call: None
    open_cache(f"{site.url}/third")
    assert len(stored()) == 1


def rot(path):
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("pinned", [False, True])
def test_a_shard_that_rots_in_the_store_is_fetched_again_once(site, made, pinned):
    url = f"{site.url}/first" + (f"#cache-id={open_directory(made / 'first').id}" if pinned else "")
    rot(open_cache(url).directory / SHARD)
    cache = open_cache(url)
    read(site)
    # A worker process gets the cache by pickling.
    elsewhere = pickle.loads(pickle.dumps(cache))
    expected = open_directory(made / "first").split("train")[0]
    assert (elsewhere.split("train")[0].token_ids == expected.token_ids).all()
    assert read(site) == [SHARD]
    assert files(cache.directory) == files(made / "first")
    assert (cache.split("train")[0].token_ids == expected.token_ids).all()
    assert read(site) == []
    rot(cache.directory / SHARD)
    cache.load(0)
    rot(cache.directory / SHARD)
    with pytest.raises(CorruptCacheError, match="00000"):
        cache.load(0)


@pytest.mark.parametrize("fault", [Fault.ERROR, Fault.OTHER, Fault.SHORT, Fault.LONG])
def test_a_shard_that_is_not_to_be_had_again_is_named_with_its_url(site, fault):
    cache = open_cache(f"{site.url}/first")
    rot(cache.directory / SHARD)
    before = files(cache.directory)
    site.choose = lambda call: fault
    with pytest.raises(
        CorruptCacheError, match=f"{cache.directory}/{SHARD} is damaged.* {site.url}/first/{SHARD}"
    ) as caught:
        cache.split("train")[0]
    assert "\n" not in str(caught.value)
    assert files(cache.directory) == before
    site.choose = lambda call: None
    assert open_cache(f"{site.url}/first").split("train")[0] is not None


def test_a_shard_of_a_cache_that_its_url_no_longer_holds_is_not_taken(site):
    cache = open_cache(f"{site.url}/first")
    rot(cache.directory / SHARD)
    shutil.rmtree(site.folder / "first")
    (site.folder / "second").rename(site.folder / "first")
    with pytest.raises(CorruptCacheError, match="00000"):
        cache.split("train")[0]


@pytest.mark.parametrize("name", [layout.PLAN_FILE, layout.MANIFEST_FILE, layout.VOCABULARY_FILE])
@pytest.mark.parametrize("harm", [rot, lambda path: path.write_bytes(b""), lambda path: path.unlink()])
def test_small_files_that_rot_in_the_store_are_brought_again(site, made, name, harm):
    directory = open_cache(f"{site.url}/first").directory
    harm(directory / name)
    read(site)
    assert open_cache(f"{site.url}/first").directory == directory
    assert files(directory) == files(made / "first")
    assert not any(n.startswith("shards/") for n in read(site))


def test_a_copy_that_is_open_and_rots_is_named_and_not_waited_for(site):
    cache = open_cache(f"{site.url}/first")
    rot(cache.directory / layout.VOCABULARY_FILE)
    with pytest.raises(CacheError, match=f"{cache.directory}.* damaged while it is in use"):
        open_cache(f"{site.url}/first")
    del cache
    assert len(open_cache(f"{site.url}/first").vocabulary()) > 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1000000", 1_000_000), ("20GiB", 20 << 30), ("1.5 MiB", 3 << 19), ("500MB", 500_000_000), ("", 20 << 30)],
)
def test_the_limit_is_read_as_people_write_it(monkeypatch, text, expected):
    monkeypatch.setenv("KDCACHE_STORE_LIMIT", text)
    assert store_limit() == expected


@pytest.mark.parametrize("text", ["much", "-1", "10 XB", "nan"])
def test_a_limit_that_is_none_is_refused(monkeypatch, text):
    monkeypatch.setenv("KDCACHE_STORE_LIMIT", text)
    with pytest.raises(StorageError, match="KDCACHE_STORE_LIMIT should be"):
        store_limit()
