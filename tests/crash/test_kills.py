"""Runs killed at every call and at random moments: what is there is always good, and going on ends in the same bytes."""

import os
import shutil
import signal
import threading

import pytest

from kdcache.cache.writer import CacheWriter
from tests.crash.small_run import ended, files, fork, killed, run


def test_a_small_run_ends_in_the_bytes_of_the_reference(source, tmp_path):
    assert run(source, tmp_path / "c")
    assert files(tmp_path / "c") == source.files


def test_a_kill_before_or_after_any_call_costs_no_byte(reference, place):
    tally = killed(reference, place)
    # Eight files, each opened, written, flushed, closed, named, its directory opened, flushed and closed at the least.
    assert tally.kills > 2 * 8 * 8
    assert tally.completions == tally.kills
    assert tally.differing == []


@pytest.mark.parametrize("workers", [1, 3])
def test_kills_at_random_moments_cost_no_byte(reference, place, workers):
    tally = killed(reference, place, "--random", "12", "--workers", str(workers), "--seed", str(workers))
    assert tally.kills >= 12
    assert tally.completions > 1
    assert tally.differing == []


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
def test_a_kill_at_a_system_call_costs_no_byte(reference, place):
    tally = killed(reference, place, "--system-calls", "19")
    assert tally.kills > 4
    assert tally.completions == tally.runs
    assert tally.differing == []


@pytest.mark.parametrize("count", [2, 3, 5])
def test_any_number_of_workers_at_once_makes_the_same_bytes(source, place, count):
    for _ in range(3):
        children = [fork(source, place / "c", index, count) for index in range(count)]
        assert [ended(child) for child in children] == [0] * count
        assert files(place / "c") == source.files


def test_workers_that_all_make_all_shards_agree(source, place):
    children = [fork(source, place / "c") for _ in range(4)]
    assert [ended(child) for child in children] == [0] * 4
    assert files(place / "c") == source.files


def test_what_a_live_writer_is_writing_is_left_alone_and_what_a_dead_one_left_is_not(source, tmp_path):
    """A process that ends the cache while another is in the middle of a file."""
    directory = tmp_path / "c"
    run(source, directory)
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        real = os.fsync
        os.fsync = lambda descriptor: (real(descriptor), os.write(writing, b"."), signal.pause())
        (directory / "shards" / "00001.safetensors.zst").unlink()
        CacheWriter(directory, source.plan, source.vocabulary).commit(1, source.contents[1])
        os._exit(0)
    assert os.read(reading, 1) == b"."
    os.close(reading)
    os.close(writing)
    run(source, directory)
    during = [name for name in files(directory) if name not in source.files]
    os.kill(child, signal.SIGKILL)
    assert ended(child) == -signal.SIGKILL
    assert len(during) == 1
    run(source, directory)
    assert files(directory) == source.files


def test_a_writer_whose_temporary_file_is_taken_away_writes_it_again(source, tmp_path, monkeypatch):
    writer = CacheWriter(tmp_path, source.plan, source.vocabulary)
    real, taken = os.link, []

    def link(temporary, path):
        if len(taken) < 3:
            taken.append(temporary)
            temporary.unlink()
        real(temporary, path)

    monkeypatch.setattr(os, "link", link)
    for index, content in enumerate(source.contents):
        writer.commit(index, content)
    writer.finalise()
    assert len(taken) == 3
    assert files(tmp_path) == source.files


def test_threads_of_one_process_that_make_the_same_cache_agree(source, tmp_path):
    failures = []

    def work():
        try:
            run(source, tmp_path / "c")
        except Exception as exc:
            failures.append(exc)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert files(tmp_path / "c") == source.files
