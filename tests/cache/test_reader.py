"""Reading a cache: what is remembered, what is read ahead, and which files are not followed."""

import multiprocessing
import os
import pickle
import shutil

import numpy as np
import pytest

from kdcache.cache import layout, reader, shard
from kdcache.cache.reader import open_cache, shard_path
from kdcache.cache.verify import verify
from kdcache.cache.writer import CacheWriter
from kdcache.errors import CacheError, CorruptCacheError, StorageError
from tests.cache.samples import TOKENS, sample_plan, sample_sequences

CONTENTS = [sample_sequences(sequences=2, seed=n) for n in range(7)]


@pytest.fixture
def cache(tmp_path):
    writer = CacheWriter(tmp_path / "c", sample_plan(CONTENTS), TOKENS)
    for index, content in enumerate(CONTENTS):
        writer.commit(index, content)
    writer.finalise()
    return tmp_path / "c"


@pytest.fixture
def hashed(monkeypatch):
    """The content hashes that were taken, in order."""
    taken = []

    def counted(arrays):
        taken.append(shard_hash(arrays))
        return taken[-1]

    shard_hash = shard.content_hash
    monkeypatch.setattr(shard, "content_hash", counted)
    return taken


def ids(split):
    return [s.token_ids.tolist() for s in split]


def test_a_second_epoch_does_not_verify_again(cache, hashed):
    train = open_cache(cache, keep=1).split("train")
    first = ids(train)
    assert len(hashed) == 6
    assert ids(train) == first
    assert len(hashed) == 6


def test_a_file_that_changed_is_verified_again(cache, hashed):
    opened = open_cache(cache, keep=1)
    opened.load(0)
    path = shard_path(cache, 0)
    data = path.read_bytes()
    path.write_bytes(data)
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    opened.load(0)
    assert len(hashed) == 2
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(CorruptCacheError, match=r"00000.*damaged"):
        opened.load(0)


def test_a_damaged_shard_is_mended_once_where_somebody_can(cache):
    whole = shard_path(cache, 1).read_bytes()
    opened, asked = open_cache(cache), []

    def mend(index):
        asked.append(index)
        shard_path(cache, index).write_bytes(whole)

    shard_path(cache, 1).write_bytes(whole[:-1])
    opened.mend = mend
    assert np.array_equal(opened.shard(1).token_ids, CONTENTS[1].token_ids)
    shard_path(cache, 1).write_bytes(whole[:-1])
    with pytest.raises(CorruptCacheError, match="00001"):
        opened.load(1)
    assert asked == [1]


def test_a_shard_of_another_size_is_seen_at_once(cache):
    opened = open_cache(cache)
    opened.look_over()
    path = shard_path(cache, 5)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptCacheError, match="00005"):
        opened.look_over()


def test_what_is_decoded_again_is_the_same(cache):
    opened = open_cache(cache)
    first, again = opened.load(2), opened.load(2)
    assert first is not again
    for name in ("head_ids", "head_logits", "tail_ids", "rest", "label_log_prob"):
        assert np.array_equal(getattr(first.rows, name), getattr(again.rows, name)), name


def test_shards_read_ahead_count_as_memory_and_come_from_the_thread(cache, monkeypatch):
    opened = open_cache(cache, keep=4)
    read = []
    load = opened.load
    monkeypatch.setattr(opened, "load", lambda index: (read.append(index), load(index))[1])
    opened.read_ahead([1, 2, 3, 4, 5])
    for index in (1, 2, 3):
        opened.shard(index)
        assert len(opened._decoded) + len(opened._ahead) <= 4
    assert sorted(read) == [1, 2, 3]  # no more than fit beside the one in use, and none of them twice
    opened.read_ahead([4])
    opened.read_ahead([5])
    assert set(opened._ahead) == {5}
    assert np.array_equal(opened.shard(5).token_ids, CONTENTS[5].token_ids)


def test_an_error_ahead_is_raised_where_the_shard_is_wanted(cache):
    shard_path(cache, 1).write_bytes(b"no shard")
    train = open_cache(cache).split("train")
    sequences = iter(train)
    assert [next(sequences).token_ids.tolist() for _ in range(2)] == ids([CONTENTS[0][0], CONTENTS[0][1]])
    with pytest.raises(CorruptCacheError, match="00001"):
        next(sequences)


def test_iterating_gives_what_indexing_gives(cache):
    train = open_cache(cache, keep=1).split("train")
    assert ids(train) == [train[i].token_ids.tolist() for i in range(len(train))]
    assert len(ids(train)) == len(train) == 12


def test_a_cache_is_a_mapping_of_sized_indexable_splits(cache):
    opened = open_cache(cache)
    assert list(opened) == ["train", "validation"]
    assert len(opened) == 2
    assert "test" not in opened
    with pytest.raises(KeyError):
        opened["test"]
    train = opened["train"]
    assert [s.token_ids.tolist() for s in train[1:-1:3]] == ids(train)[1:-1:3]
    assert train[-1].token_ids.tolist() == ids(train)[-1]


def _sum_in_child(opened, queue):
    queue.put(sum(int(s.token_ids.sum()) for s in opened.split("train")))


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_worker_processes_read_for_themselves(cache, method):
    opened = open_cache(cache)
    opened.read_ahead([1, 2])
    expected = sum(int(c.token_ids.astype(np.int64).sum()) for c in CONTENTS[:6])
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    child = context.Process(target=_sum_in_child, args=(opened, queue))
    child.start()
    assert queue.get(timeout=60) == expected
    child.join()
    assert child.exitcode == 0
    assert ids(pickle.loads(pickle.dumps(opened)).split("train")) == ids(opened.split("train"))


def test_a_read_only_directory_is_enough(cache):
    for path in [*cache.rglob("*"), cache]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        assert len(ids(open_cache(cache).split("train"))) == 12
        assert verify(cache) == []
    finally:
        for path in [cache, *cache.rglob("*")]:
            path.chmod(0o755)


def test_a_hub_snapshot_is_read_through_its_own_links(cache, tmp_path):
    blobs, snapshot = tmp_path / "datasets--me--c/blobs", tmp_path / "datasets--me--c/snapshots/abc"
    blobs.mkdir(parents=True)
    for number, path in enumerate(p for p in cache.rglob("*") if p.is_file()):
        shutil.copy(path, blobs / str(number))
        link = snapshot / path.relative_to(cache)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blobs / str(number), link.parent))
    assert ids(open_cache(snapshot).split("train")) == ids(open_cache(cache).split("train"))
    assert verify(snapshot) == []
    through = tmp_path / "shortcut"
    through.symlink_to(cache)  # where the reader is sent by its user is the user's business
    assert len(open_cache(through).split("train")) == 12


@pytest.mark.parametrize("what", ["shard", "folder", "manifest", "plan", "vocabulary"])
def test_a_link_out_of_the_cache_is_not_followed(cache, tmp_path, what):
    outside = tmp_path / "outside"
    shutil.copytree(cache, outside)
    name = {
        "shard": "shards/00001.safetensors.zst", "folder": "shards", "manifest": layout.MANIFEST_FILE,
        "plan": layout.PLAN_FILE, "vocabulary": layout.VOCABULARY_FILE,
    }[what]  # fmt: skip
    path = cache / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    path.symlink_to(outside / name)

    def use():
        opened = open_cache(cache)
        opened.vocabulary()
        ids(opened.split("train"))

    with pytest.raises(CorruptCacheError, match=r"link out of its cache.*copy the file"):
        use()


def test_pipes_circles_and_folders_are_refused_at_once(cache):
    path = shard_path(cache, 0)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(CorruptCacheError, match="not a regular file"):
        open_cache(cache).load(0)
    path.unlink()
    path.mkdir()
    with pytest.raises(CorruptCacheError, match="not a regular file"):
        open_cache(cache).load(0)
    path.rmdir()
    path.symlink_to(path)
    with pytest.raises(CacheError, match="00000"):
        open_cache(cache).load(0)


def test_a_file_that_grows_while_it_is_read_is_refused(cache, monkeypatch):
    path, read = shard_path(cache, 0), os.read

    def growing(descriptor, size):
        with path.open("ab") as f:
            f.write(b"more")
        return read(descriptor, size)

    opened = open_cache(cache)
    monkeypatch.setattr(os, "read", growing)
    with pytest.raises(CorruptCacheError, match="changed while it was read"):
        opened.load(0)


def test_an_unreadable_disk_is_a_storage_error(cache, monkeypatch):
    def failing(descriptor, size):
        raise OSError(5, "Input/output error")

    opened = open_cache(cache)
    monkeypatch.setattr(reader.os, "read", failing)
    with pytest.raises(StorageError, match="Input/output error"):
        opened.load(0)
