"""Every call that touches the disk fails once, in every way a disk fails: a typed error, nothing bad, and going on works."""

import errno
import os
import stat
from pathlib import Path

import pytest

from kdcache.cache import layout
from kdcache.cache.files import create_file, write_file
from kdcache.cache.writer import CacheWriter
from kdcache.errors import CacheError, StorageError
from kdcache.progress import Silent
from kdcache.recipe import parse_recipe
from kdcache.teacher.capture import capture
from tests.crash.faults import CODES, FaultyDisk, fail_each_call
from tests.crash.small_run import CALLS, bad_files, files, run


@pytest.mark.parametrize("done", [False, True], ids=["undone", "done"])
@pytest.mark.parametrize("code", CODES.values(), ids=CODES)
def test_any_call_that_fails_once_costs_no_byte(source, place, code, done):
    tally = fail_each_call(source, place, code, done=done)
    assert tally.wrong == []
    assert tally.refused > 60
    assert all(tally.faults[name] >= 2 for name in set(CALLS) - {"mkdir"})


def test_a_disk_that_stays_full_says_so_each_time_and_is_gone_on_with(source, tmp_path, monkeypatch):
    def full(descriptor, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        for _ in range(2):
            with pytest.raises(StorageError, match=r"No space left.*free some space and run the same command again"):
                run(source, tmp_path / "c")
            assert files(tmp_path / "c") == {}
    run(source, tmp_path / "c")
    assert files(tmp_path / "c") == source.files


def test_a_write_that_takes_a_part_only_is_gone_on_with(source, tmp_path, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:1000]))
    run(source, tmp_path / "c")
    assert files(tmp_path / "c") == source.files
    monkeypatch.setattr(os, "write", lambda descriptor, data: 0)
    with pytest.raises(StorageError, match="takes no bytes"):
        write_file(tmp_path / "file", b"x")


def test_a_file_system_without_links_or_directory_flushes_will_do(source, tmp_path, monkeypatch):
    real = os.fsync

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        real(descriptor)

    def link(*args, **kwargs):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "link", link)
    run(source, tmp_path / "c")
    assert files(tmp_path / "c") == source.files
    assert create_file(tmp_path / "c" / layout.PLAN_FILE, b"other") is None
    assert files(tmp_path / "c") == source.files


def test_an_error_while_tidying_up_does_not_hide_the_first(tmp_path, monkeypatch):
    def fail(code):
        def call(*args, **kwargs):
            raise OSError(code, os.strerror(code))

        return call

    monkeypatch.setattr(os, "fsync", fail(errno.EDQUOT))
    monkeypatch.setattr(os, "unlink", fail(errno.EIO))
    real = os.close
    monkeypatch.setattr(os, "close", lambda descriptor: (real(descriptor), fail(errno.EIO)()))
    with pytest.raises(StorageError, match=os.strerror(errno.EDQUOT)):
        write_file(tmp_path / "file", b"x")


@pytest.mark.parametrize(("mask", "file", "folder"), [(0o027, 0o640, 0o750), (0o002, 0o664, 0o775)])
def test_permissions_are_what_the_umask_leaves(source, tmp_path, mask, file, folder):
    old = os.umask(mask)
    try:
        run(source, tmp_path / "new" / "c")
    finally:
        os.umask(old)
    for path in (tmp_path / "new").rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (folder if path.is_dir() else file), path


def read_only(patch):
    """Nothing can be written, as in a directory of somebody else's. Root would not be stopped by permission bits."""
    real = os.open

    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    patch.setattr(os, "open", lambda path, flags, *rest: (refuse if flags & os.O_CREAT else real)(path, flags, *rest))
    for name in ("mkdir", "link", "rename", "unlink"):
        patch.setattr(os, name, refuse)


def test_a_complete_cache_needs_no_write_access_and_an_incomplete_one_says_so(source, tmp_path, monkeypatch):
    run(source, tmp_path)
    shards = tmp_path / layout.SHARD_DIRECTORY
    (shards / ".tmp-00000-dead").write_bytes(b"half")
    with monkeypatch.context() as patch:
        read_only(patch)
        assert run(source, tmp_path)
    (shards / "00001.safetensors.zst").unlink()
    with monkeypatch.context() as patch:
        read_only(patch)
        with pytest.raises(StorageError, match=r"Permission denied.*get write access to .*shards and run"):
            run(source, tmp_path)


def test_two_writers_with_other_content_are_told_apart_however_close_they_race(source, tmp_path, monkeypatch):
    first = CacheWriter(tmp_path, source.plan, source.vocabulary)
    second = CacheWriter(tmp_path, source.plan, source.vocabulary)
    other = source.contents[0]
    other = type(other)(other.lengths, other.token_ids.copy(), other.targets, other.rows)
    other.token_ids[0] ^= 1
    real = os.link

    def late(temporary, path):
        # The other one is there between the look and the link.
        monkeypatch.setattr(os, "link", real)
        first.commit(0, source.contents[0])
        real(temporary, path)

    monkeypatch.setattr(os, "link", late)
    with pytest.raises(CacheError, match="by another process with other content"):
        second.commit(0, other)
    assert bad_files(source, tmp_path) == []
    monkeypatch.setattr(os, "link", late)
    (tmp_path / layout.SHARD_DIRECTORY / "00000.safetensors.zst").unlink()
    assert second.commit(0, source.contents[0]) == len(source.files["shards/00000.safetensors.zst"])


def test_the_manifest_is_of_the_files_as_they_are_at_the_end(source, tmp_path):
    early = CacheWriter(tmp_path, source.plan, source.vocabulary)
    for index in (0, 1):
        early.commit(index, source.contents[index])
    assert early.unfinished() == [2, 3]
    shard = tmp_path / layout.SHARD_DIRECTORY / "00000.safetensors.zst"
    shard.write_bytes(shard.read_bytes()[:-1])
    late = CacheWriter(tmp_path, source.plan, source.vocabulary)
    for index in (2, 3):
        late.commit(index, source.contents[index])
    assert early.unfinished() == late.unfinished() == [0]
    with pytest.raises(CacheError, match="1 shards are missing or broken"):
        early.finalise()
    late.commit(0, source.contents[0])
    early.finalise()
    assert files(tmp_path) == source.files


class Counting(Silent):
    """How far a run came."""

    def __init__(self):
        self.total = self.done = 0

    def begin(self, task, total, unit):
        self.total = total

    def advance(self, amount, note=""):
        self.done += amount


@pytest.mark.parametrize(
    ("name", "point", "message"),
    [("link", 4, "No space left"), ("fsync", 9, "No space left"), ("commit", 2, "no memory")],
)
def test_a_teacher_run_whose_writer_fails_ends_at_once_and_goes_on_later(
    values, shared_cache, monkeypatch, name, point, message
):
    directory, progress = Path(values["cache"]["directory"]), Counting()
    real, calls = CacheWriter.commit, []

    def commit(self, index, content):
        calls.append(index)
        if name == "commit" and len(calls) > point:
            raise MemoryError("no memory")
        return real(self, index, content)

    monkeypatch.setattr(CacheWriter, "commit", commit)
    # No call of that name fails where the writer's thread dies by itself.
    with (
        FaultyDisk(point, errno.ENOSPC, names=[] if name == "commit" else [name]),
        pytest.raises((StorageError, MemoryError), match=message),
    ):
        capture(parse_recipe(values), progress)
    assert 0 < progress.done < progress.total
    assert not (directory / layout.MANIFEST_FILE).exists()
    monkeypatch.setattr(CacheWriter, "commit", real)
    capture(parse_recipe(values))
    assert files(directory) == files(shared_cache)
