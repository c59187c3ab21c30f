"""Caches pushed to and pulled from a real S3 server, a web server and directories, over good networks and bad ones."""

import errno
import json
import os
import shutil
import sys
import time
from types import SimpleNamespace

import fsspec.config
import pytest
import yaml
import zstandard
from markdown_it import MarkdownIt

from kdcache.cache import layout, remote
from kdcache.cache.card import data_card, with_licence
from kdcache.cache.pace import Retry
from kdcache.cache.reader import open_cache
from kdcache.cache.receive import fetch_shard
from kdcache.cache.remote import parse_location
from kdcache.cache.shard import decompress
from kdcache.cache.share import fetcher, pull, push
from kdcache.cache.transfer import Transfer
from kdcache.cache.verify import verify
from kdcache.errors import (
    CacheError,
    CorruptCacheError,
    DamagedObjectError,
    IncompleteCacheError,
    StorageError,
    TransferError,
)
from tests.cache.fault_proxy import Fault, FaultProxy, never
from tests.cache.servers import KEYS, s3_client, s3_server, web_server
from tests.cache.transfer_trials import files, make_cache, run_trials

QUICK = Retry(attempts=4, first=0.001, ceiling=0.01)
MANIFEST, PLAN, CARD = layout.MANIFEST_FILE, layout.PLAN_FILE, layout.CARD_FILE
SHARD = "shards/00001.safetensors.zst"


@pytest.fixture(scope="module")
def server():
    with s3_server() as url:
        yield url


@pytest.fixture(scope="module")
def proxied(server):
    with FaultProxy(server) as proxy:
        yield proxy


@pytest.fixture
def s3(server, proxied, monkeypatch, request):
    """A bucket of this test's own that is reached through a proxy without faults; ``proxy`` and ``client`` beside it."""

    class Bucket:
        proxy = proxied
        client = s3_client(server)
        name = f"bucket-{time.monotonic_ns()}"
        url = f"s3://{name}/some/cache"

        def names(self):
            found = self.client.list_objects_v2(Bucket=self.name).get("Contents", [])
            return sorted(o["Key"].removeprefix("some/cache/") for o in found)

        def hold(self, cache):
            """Put a cache there, by another library than the one that is tested."""
            for name, data in files(cache).items():
                self.put(name, data)

        def put(self, name, data):
            self.client.put_object(Bucket=self.name, Key=f"some/cache/{name}", Body=data)

        def delete(self, name):
            self.client.delete_object(Bucket=self.name, Key=f"some/cache/{name}")

        def calls(self, method):
            return [
                c.path.split("/some/cache/")[1]
                for c in proxied.calls
                if c.method == method and "/some/cache/" in c.path
            ]

    for key in [k for k in os.environ if k.startswith("AWS_")]:
        monkeypatch.delenv(key)
    for key, value in {**KEYS, "AWS_ENDPOINT_URL": proxied.url}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(fsspec.config, "conf", {})
    bucket = Bucket()
    bucket.client.create_bucket(Bucket=bucket.name)
    proxied.choose = never
    proxied.calls.clear()
    proxied.counts.clear()
    yield bucket
    proxied.choose = never


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("made") / "cache")


@pytest.fixture(scope="module")
def another(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("another") / "cache", sizes=(4, 5, 2, 1))


@pytest.fixture
def cache(made, tmp_path):
    """A cache that the test may change."""
    return shutil.copytree(made, tmp_path / "cache")


def once(fault, name, times=1):
    """The fault for the first reads of one object."""
    left = [times]

    def choose(call):
        if call.method != "GET" or not call.path.endswith(name) or not left[0]:
            return None
        left[0] -= 1
        return fault

    return choose


def test_a_round_trip_over_s3_is_byte_identical_and_ends_with_the_manifest(s3, made, tmp_path):
    sent = push(made, s3.url, retry=QUICK)
    written = s3.calls("PUT")
    assert written[-1] == MANIFEST
    assert {w.partition("/")[0] for w in written[:3]} == {"shards"}
    assert (sent.objects, sent.kept, sent.cache_id) == (7, 0, open_cache(made).id)
    got = pull(s3.url, tmp_path / "arrived", retry=QUICK)
    assert (got.cache_id, got.kept) == (sent.cache_id, 0)
    assert files(tmp_path / "arrived") == files(made)
    assert verify(tmp_path / "arrived") == []
    assert not list((tmp_path / "arrived").glob(".tmp-*"))


class Counting:
    """What a progress bar would be told."""

    def __init__(self):
        self.tasks, self.running = [], False

    def begin(self, task, total, unit):
        self.tasks.append([task, total, 0])
        self.running = True

    def advance(self, amount, note=""):
        assert self.running
        self.tasks[-1][2] += amount

    def end(self):
        self.running = False

    def message(self, text):
        """Not of interest."""

    warning = message


def test_the_bytes_that_are_shown_add_up_whatever_had_to_be_tried_again(s3, made, tmp_path):
    progress = Counting()
    push(made, s3.url, retry=QUICK, progress=progress)
    s3.proxy.choose = once(Fault.TRUNCATED, SHARD, times=2)
    pull(s3.url, tmp_path / "arrived", retry=QUICK, progress=progress)
    sent, came = progress.tasks
    assert sent == ["push", sum(len(d) for n, d in files(made).items() if n != MANIFEST), sent[1]]
    assert came == ["pull", sum(len(d) for n, d in files(made).items() if n.startswith("shards/")), came[1]]
    assert not progress.running


def test_directories_and_file_urls_are_places_too(made, tmp_path):
    push(made, tmp_path / "there")
    push(made, f"file://{tmp_path}/elsewhere")
    pull(tmp_path / "there", tmp_path / "back")
    pull(f"file://{tmp_path}/elsewhere", f"file://{tmp_path}/again")
    for name in ("there", "elsewhere", "back", "again"):
        assert files(tmp_path / name) == files(made), name


def test_a_plain_web_server_without_listings_is_enough(made, tmp_path):
    with web_server(made.parent) as url, FaultProxy(url) as proxy:
        pull(f"{proxy.url}/cache/", tmp_path / "arrived", retry=QUICK)
        assert files(tmp_path / "arrived") == files(made)
        with pytest.raises(TransferError, match="no complete cache at"):
            pull(f"{proxy.url}/nothing", tmp_path / "n", retry=QUICK)
        with pytest.raises(TransferError, match="can only be pulled from"):
            push(made, proxy.url)


@pytest.mark.parametrize("fault", Fault)
def test_a_fault_that_passes_costs_a_second_try(s3, made, tmp_path, fault):
    s3.hold(made)
    s3.proxy.choose = once(fault, SHARD)
    pull(s3.url, tmp_path / "arrived", retry=QUICK)
    assert s3.proxy.counts == {fault: 1}
    assert files(tmp_path / "arrived") == files(made)


@pytest.mark.parametrize("name", [SHARD, MANIFEST, PLAN, layout.VOCABULARY_FILE, CARD])
def test_every_object_may_meet_a_fault_that_passes(made, tmp_path, name):
    with web_server(made.parent) as url, FaultProxy(url) as proxy:
        for fault in Fault:
            proxy.choose = once(fault, name)
            proxy.counts.clear()
            pull(f"{proxy.url}/cache", tmp_path / fault.name, retry=QUICK)
            assert proxy.counts == {fault: 1}, fault
            assert files(tmp_path / fault.name) == files(made), fault
            assert verify(tmp_path / fault.name) == []


@pytest.mark.parametrize("fault", Fault)
def test_a_fault_that_stays_is_a_typed_error_and_nothing_bad_gets_a_name(s3, made, tmp_path, fault):
    s3.hold(made)
    s3.proxy.choose = once(fault, SHARD, times=99)
    began = time.monotonic()
    with pytest.raises(TransferError, match="00001") as caught:
        pull(s3.url, tmp_path / "arrived", retry=QUICK)
    assert time.monotonic() - began < 10
    assert s3.proxy.counts == {fault: QUICK.attempts}
    assert isinstance(caught.value, DamagedObjectError) is (fault not in (Fault.ERROR, Fault.RESET, Fault.TRUNCATED))
    arrived = files(tmp_path / "arrived")
    assert MANIFEST not in arrived
    assert SHARD not in arrived
    assert all(files(made)[name] == data for name, data in arrived.items())
    with pytest.raises(IncompleteCacheError):
        open_cache(tmp_path / "arrived")
    s3.proxy.choose = never
    pull(s3.url, tmp_path / "arrived", retry=QUICK)
    assert files(tmp_path / "arrived") == files(made)


def test_where_every_answer_is_bad_it_ends_soon(s3, made, tmp_path):
    s3.hold(made)
    for fault in Fault:
        s3.proxy.choose = lambda call, fault=fault: fault
        began = time.monotonic()
        with pytest.raises(TransferError):
            pull(s3.url, tmp_path / fault.name, retry=QUICK)
        assert time.monotonic() - began < 10, fault
        assert not (tmp_path / fault.name / MANIFEST).exists()
    for fault in (Fault.ERROR, Fault.RESET):
        s3.proxy.choose = lambda call, fault=fault: fault
        with pytest.raises(TransferError):
            push(made, f"{s3.url}-{fault.name}", retry=QUICK)


def test_twenty_transfers_over_a_bad_network_arrive_whole_or_say_so(s3, server, made):
    outcomes, faults = run_trials(10, server=server, seed=5, cache=made)
    assert outcomes["wrong"] == 0
    assert outcomes["ok"] >= 9
    assert faults[Fault.ERROR] > 10
    assert sum(faults.values()) - faults[Fault.ERROR] >= 2
    assert run_trials(2, server=server, seed=4, rates={Fault.ERROR: 0.9}, cache=made)[0] == {"typed": 2}


def test_a_broken_pull_goes_on_where_it_stopped(s3, made, tmp_path):
    s3.hold(made)
    s3.proxy.choose = once(Fault.ERROR, SHARD, times=99)
    with pytest.raises(TransferError):
        pull(s3.url, tmp_path / "arrived", workers=1, retry=QUICK)
    s3.proxy.choose = never
    s3.proxy.calls.clear()
    # A shard that was damaged on this disk meanwhile is fetched again too.
    first = tmp_path / "arrived" / "shards" / layout.shard_name(0)
    first.write_bytes(bytes(first.stat().st_size))
    pull(s3.url, tmp_path / "arrived", retry=QUICK)
    assert sorted(n for n in s3.calls("GET") if n not in (MANIFEST, PLAN)) == [
        f"shards/{layout.shard_name(i)}" for i in range(3)
    ]
    assert files(tmp_path / "arrived") == files(made)
    s3.proxy.calls.clear()
    assert pull(s3.url, tmp_path / "arrived", retry=QUICK).objects == 0
    assert s3.calls("GET") == [MANIFEST, PLAN]


def test_a_broken_push_goes_on_where_it_stopped(s3, made):
    s3.proxy.choose = lambda call: Fault.ERROR if call.method == "PUT" and call.path.endswith(PLAN) else None
    with pytest.raises(TransferError):
        push(made, s3.url, retry=QUICK)
    assert MANIFEST not in s3.names()
    s3.proxy.choose = never
    s3.put(SHARD, bytes(len(files(made)[SHARD])))
    s3.proxy.calls.clear()
    push(made, s3.url, retry=QUICK)
    assert s3.calls("PUT") == [SHARD, PLAN, MANIFEST]
    s3.proxy.calls.clear()
    assert push(made, s3.url, retry=QUICK).objects == 0
    assert s3.calls("PUT") == s3.calls("DELETE") == []


def test_objects_that_went_missing_are_sent_again_and_the_manifest_after_them(s3, made):
    push(made, s3.url, retry=QUICK)
    s3.delete(SHARD)
    s3.proxy.calls.clear()
    push(made, s3.url, retry=QUICK)
    assert s3.calls("DELETE") == [MANIFEST]
    assert s3.calls("PUT") == [SHARD, MANIFEST]


def test_overwrite_repairs_what_has_the_right_size_and_other_bytes(s3, made, tmp_path):
    push(made, s3.url, retry=QUICK)
    s3.put(SHARD, bytes(len(files(made)[SHARD])))
    with pytest.raises(DamagedObjectError, match="push --overwrite"):
        pull(s3.url, tmp_path / "arrived", retry=QUICK)
    push(made, s3.url, overwrite=True, retry=QUICK)
    pull(s3.url, tmp_path / "arrived", retry=QUICK)
    assert files(tmp_path / "arrived") == files(made)


def test_another_cache_is_only_replaced_on_demand_and_never_mixed(s3, made, another, tmp_path):
    s3.hold(another)
    with pytest.raises(CacheError, match=r"another cache .* --overwrite"):
        push(made, s3.url, retry=QUICK)
    s3.proxy.calls.clear()
    push(made, s3.url, overwrite=True, retry=QUICK)
    order = [(c.method, c.path.split("/some/cache/")[-1]) for c in s3.proxy.calls if c.method in ("PUT", "DELETE")]
    assert order[0] == ("DELETE", MANIFEST)
    assert order[-1] == ("PUT", MANIFEST)
    assert s3.names() == sorted(files(made))
    pull(s3.url, tmp_path / "arrived", retry=QUICK)
    assert files(tmp_path / "arrived") == files(made)


def test_foreign_files_are_not_written_over(s3, made, tmp_path):
    s3.put("thesis.tex", b"x")
    with pytest.raises(CacheError, match=r"neither empty nor a cache .*thesis.tex"):
        push(made, s3.url, retry=QUICK)
    s3.delete("thesis.tex")
    s3.put(CARD, b"mine")
    with pytest.raises(CacheError, match=r"README.md"):
        push(made, s3.url, retry=QUICK)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(CacheError, match=r"notes\.txt"):
        pull(made, tmp_path / "full")
    assert files(tmp_path / "full") == {"notes.txt": b"mine"}


def test_another_cache_on_this_disk_stays(made, another, cache, tmp_path):
    with pytest.raises(CacheError, match="holds another cache"):
        pull(another, cache)
    assert files(cache) == files(made)
    # The same plan, and a good shard made by another teacher run: somebody's work.
    (cache / MANIFEST).unlink()
    elsewhere = make_cache(tmp_path / "elsewhere")
    pull(elsewhere, cache)
    assert files(cache) == files(made)


def test_a_good_shard_with_other_content_is_not_replaced(made, cache):
    shard = cache / SHARD
    raw = decompress(shard.read_bytes(), limit=layout.SHARD_LIMIT)
    shard.write_bytes(zstandard.ZstdCompressor(level=19, write_checksum=True, write_content_size=True).compress(raw))
    assert shard.read_bytes() != (made / SHARD).read_bytes()
    (cache / MANIFEST).unlink()
    with pytest.raises(CacheError, match="good shard of this plan with other content"):
        pull(made, cache)


def test_a_remote_that_is_replaced_midway_is_noticed(s3, made, another, tmp_path):
    s3.hold(made)

    def replace(call):
        if call.method == "GET" and call.path.endswith("shards/" + layout.shard_name(0)):
            for name, data in files(another).items():
                s3.put(name, data)
        return None

    s3.proxy.choose = replace
    with pytest.raises(TransferError, match=r"changed while it was pulled.*being replaced.*empty directory"):
        pull(s3.url, tmp_path / "arrived", workers=1, retry=QUICK)
    assert not (tmp_path / "arrived" / MANIFEST).exists()
    with pytest.raises(CacheError, match="another cache"):
        pull(s3.url, tmp_path / "arrived", retry=QUICK)
    pull(s3.url, tmp_path / "afresh", retry=QUICK)
    assert files(tmp_path / "afresh") == files(another)


def test_a_pin_refuses_every_other_cache(made, another, tmp_path):
    own = open_cache(made).id
    pull(made, tmp_path / "a", cache_id=own[:12])
    pull(f"file://{made}#cache-id={own}", tmp_path / "b")
    with pytest.raises(TransferError, match=f"pinned is {own[:12]}"):
        pull(another, tmp_path / "c", cache_id=own[:12])
    assert not (tmp_path / "c").exists()
    for pin in (own[:11], "x" * 12, own + "0"):
        with pytest.raises(TransferError, match="12 to 64 hex digits"):
            pull(made, tmp_path / "c", cache_id=pin)


def test_a_body_without_end_is_cut_off(s3, made, tmp_path, monkeypatch):
    s3.hold(made)
    monkeypatch.setattr("kdcache.cache.transfer.layout.JSON_LIMIT", 1 << 20)
    with pytest.raises(DamagedObjectError, match="expected at most 100 bytes"):
        fetcher(s3.url, retry=QUICK)(PLAN, 100)
    assert fetcher(s3.url, retry=QUICK)(PLAN, 1 << 20) == (made / PLAN).read_bytes()


def test_an_incomplete_or_damaged_source_is_not_sent(s3, cache):
    data = (cache / SHARD).read_bytes()
    (cache / SHARD).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(CorruptCacheError, match="kdcache verify"):
        push(cache, s3.url, retry=QUICK)
    assert MANIFEST not in s3.names()
    (cache / SHARD).unlink()
    with pytest.raises(IncompleteCacheError):
        push(cache, s3.url, retry=QUICK)


def test_one_line_says_what_is_wrong_with_an_address(s3, made, tmp_path, monkeypatch):
    def refused(match, source, **environment):
        for key, value in environment.items():
            monkeypatch.setenv(key, value)
        with pytest.raises(TransferError, match=match) as caught:
            pull(source, tmp_path / "x", retry=QUICK)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "x").exists()

    refused("expected a directory or a URL with one of s3://", "ftp://host/cache")
    refused("expected a directory or a URL", "simplecache::s3://bucket/cache")
    refused("no complete cache", "s3://no-such-bucket-here/cache")
    refused("no complete cache", s3.url)
    refused("no complete cache", str(tmp_path / "nowhere"))
    refused("found a query", "https://host/cache?token=1")
    refused("cannot be reached", "http://127.0.0.1:9/cache")
    refused("HF_HUB_OFFLINE", "hf://datasets/user/name")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    refused("no credentials for s3://", s3.url)
    with pytest.raises(TransferError, match="not to s3://"):
        pull(made, s3.url)
    with pytest.raises(TransferError, match="push sends a directory"):
        push(s3.url, tmp_path / "x")


def test_a_missing_package_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    for url, extra in (("s3://bucket/cache", "s3"), ("gs://bucket/cache", "gcs")):
        with pytest.raises(TransferError, match=rf"pip install 'kdcache\[{extra}\]'"):
            pull(url, tmp_path / "x", retry=QUICK)


def test_a_refused_key_is_not_tried_again(s3, made, tmp_path):
    calls = []

    class Refusing(remote.Place):
        def download(self, name, target, guard):
            calls.append(name)
            raise PermissionError("Forbidden")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kdcache.cache.share.Place", Refusing)
        with pytest.raises(TransferError, match="refuses access"):
            pull(s3.url, tmp_path / "x", retry=QUICK)
    assert calls == [MANIFEST]


def test_a_full_disk_is_a_storage_error(made, tmp_path, monkeypatch):
    def full(self, name, target, guard):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(remote.Place, "download", full)
    with pytest.raises(StorageError, match="free some space"):
        pull(made, tmp_path / "x", retry=QUICK)


def test_a_pull_that_cannot_fit_is_refused_before_it_begins(made, tmp_path, monkeypatch):
    shards = sum(len(data) for name, data in files(made).items() if name.startswith("shards/"))
    free = shards - 1
    monkeypatch.setattr(
        "kdcache.cache.transfer.shutil.disk_usage", lambda path: SimpleNamespace(free=free) if path.exists() else None
    )
    with pytest.raises(StorageError, match=rf"{shards:,} more bytes .* has {free:,} left; free some space"):
        pull(made, tmp_path / "new" / "x")
    assert not (tmp_path / "new").exists()
    free = shards
    pull(made, tmp_path / "new" / "x")
    # What is there already takes no more room.
    free = len(files(made)[SHARD])
    (tmp_path / "new" / "x" / SHARD).unlink()
    pull(made, tmp_path / "new" / "x")
    assert files(tmp_path / "new" / "x") == files(made)


def test_an_endless_shard_takes_no_more_disk_than_the_manifest_states(made, tmp_path, monkeypatch):
    stated = {name: len(data) for name, data in files(made).items()}
    written = []

    def endless(self, name, target, guard, real=remote.Place.download):
        if not name.startswith("shards/"):
            return real(self, name, target, guard)
        with target.open("wb") as sink:
            for _ in range(1000):
                guard.relative_update(100)
                written.append((name, sink.write(bytes(100))))

    monkeypatch.setattr(remote.Place, "download", endless)
    with pytest.raises(DamagedObjectError, match="expected at most"):
        pull(made, tmp_path / "x", workers=1, retry=QUICK)
    assert written
    for name in {name for name, _ in written}:
        assert sum(size for other, size in written if other == name) <= QUICK.attempts * stated[name]
    assert set(files(tmp_path / "x")) == {PLAN, layout.VOCABULARY_FILE, CARD}


def test_a_manifest_cannot_raise_the_limit_of_a_shard(made, cache, tmp_path, monkeypatch):
    manifest = json.loads((cache / MANIFEST).read_text())
    manifest["shards"][1]["bytes"] = 3 << 30
    (cache / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(TransferError, match="no good plan and manifest"):
        pull(cache, tmp_path / "x", retry=QUICK)
    assert not (tmp_path / "x").exists()
    # Nor would it, were it let through.
    limits = []
    entry = open_cache(made).manifest.shards[1].model_copy(update={"bytes": 3 << 30})
    transfer = Transfer(remote.Place(parse_location(made)))
    monkeypatch.setattr(transfer, "fetch", lambda name, path, *, scratch, limit, check: limits.append((name, limit)))
    fetch_shard(transfer, tmp_path / "shard", entry, 1, scratch=tmp_path)
    assert limits == [(SHARD, layout.SHARD_LIMIT)]


def test_one_pull_at_a_time_into_a_directory(made, tmp_path, monkeypatch):
    seen = []

    def meanwhile(self, name, target, guard, real=remote.Place.download):
        if name.startswith("shards/") and not seen:
            seen.append(name)
            with pytest.raises(CacheError, match="another process is pulling"):
                pull(made, tmp_path / "x")
        real(self, name, target, guard)

    monkeypatch.setattr(remote.Place, "download", meanwhile)
    pull(made, tmp_path / "x", workers=1)
    assert seen
    assert files(tmp_path / "x") == files(made)


def test_the_card_has_no_link_of_a_strangers(made):
    opened = open_cache(made)
    link = "[click](https://evil.example)"
    plan = opened.plan.model_copy(
        update={
            "teacher": opened.plan.teacher.model_copy(update={"name": link, "architecture": f"a]{link}"}),
            "data": opened.plan.data.model_copy(
                update={
                    "prompt": link,
                    "splits": tuple(
                        s.model_copy(update={"source": link, "selected": f"{s.name}[:10]"})
                        for s in opened.plan.data.splits
                    ),
                }
            ),
        }
    )
    card = data_card(plan, opened.manifest)
    assert r"# Teacher cache: \[click\]\(https://evil.example\)" in card
    page = MarkdownIt().enable("table").render(card.split("---\n", 2)[2])
    assert "<a" not in page
    assert page.count("<td>[click](https://evil.example)</td>") == 2
    assert "<td>train[:10]</td>" in page


def test_what_is_shown_of_a_url_has_no_password():
    assert str(parse_location("https://user:secret@host/cache/")) == "https://host/cache"


def test_the_card_says_what_the_hub_and_people_need(made):
    opened = open_cache(made)
    plan = opened.plan.model_copy(
        update={"teacher": opened.plan.teacher.model_copy(update={"name": "a: [b\n---", "revision": "f" * 40})}
    )
    header = yaml.safe_load(data_card(plan, opened.manifest).split("---\n")[1])
    assert header == {"license": "unknown", "tags": ["knowledge-distillation", "kdcache"], "size_categories": ["n<1K"]}
    named = opened.plan.model_copy(update={"teacher": plan.teacher.model_copy(update={"name": "user/model-1.5"})})
    card = data_card(named, opened.manifest)
    assert yaml.safe_load(card.split("---\n")[1])["base_model"] == "user/model-1.5"
    for words in ("discloses its training text", "kept mass", "open_cache", "## Licence", "teacher perplexity"):
        assert words in card
    ours = with_licence(card.replace("tags:", "# ours\ntags:"), "cc-by-4.0")
    assert yaml.safe_load(ours.split("---\n")[1])["license"] == "cc-by-4.0"
    assert "# ours" in ours
    assert ours.split("---\n", 2)[2] == card.split("---\n", 2)[2]
    with pytest.raises(CacheError, match="licence identifier"):
        with_licence(card, "mine: all\nmine")
