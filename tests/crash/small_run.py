"""A small writing run without a model, to be killed: it makes the shards of a reference cache again, from its contents.

A parent that has imported everything forks one process per run, so that a thousand kills take a minute or two. Runs can
be killed at a moment, or just before or after the n-th call that changes the file system.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random

from kdcache.cache.codec import ShardContent
from kdcache.cache.layout import TEMPORARY_PREFIX
from kdcache.cache.manifest import Plan
from kdcache.cache.reader import decode_shard, open_cache, shard_path
from kdcache.cache.writer import CacheWriter

# Calls by which a writing run touches the file system.
CALLS = ("mkdir", "open", "read", "write", "fsync", "close", "link", "rename", "unlink")


@dataclass(frozen=True)
class Source:
    """What a reference cache was made from, and its files."""

    plan: Plan
    vocabulary: list[str | None]
    contents: list[ShardContent]
    files: dict[str, bytes]

    @classmethod
    def of(cls, directory: Path) -> Source:
        cache = open_cache(directory, keep=1 << 20)
        contents = [cache.shard(i) for i in range(len(cache.plan.shards))]
        return cls(cache.plan, cache.vocabulary(), contents, files(directory))


def files(directory: Path) -> dict[str, bytes]:
    """Every file, temporary ones too, by its name within ``directory``."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def committed(directory: Path) -> dict[str, bytes]:
    """Files under final names; temporary ones come and go while others write."""
    found = {}
    for path in sorted(directory.rglob("*")):
        if not path.name.startswith(TEMPORARY_PREFIX) and path.is_file():
            found[str(path.relative_to(directory))] = path.read_bytes()
    return found


def run(source: Source, directory: Path, index: int = 0, count: int = 1) -> bool:
    """One worker's run as ``kdcache.teacher.capture`` goes about it. Whether the cache is finished."""
    writer = CacheWriter(directory, source.plan, source.vocabulary)
    for number in writer.survey(range(index, len(source.contents), count))[0]:
        writer.commit(number, source.contents[number])
    if count > 1 and (writer.settled() is not None or writer.unfinished()):
        return False
    writer.finalise()
    return True


def bad_files(source: Source, directory: Path) -> list[str]:
    """Files under final names that are not those of the reference: there is to be none at any time."""
    bad = []
    for name, data in committed(directory).items():
        if data != source.files.get(name):
            bad.append(name)
    for index in range(len(source.contents)):
        path = shard_path(directory, index)
        if path.exists():
            decode_shard(path, path.read_bytes(), source.plan, index)
    return bad


def fork(
    source: Source,
    directory: Path,
    index: int = 0,
    count: int = 1,
    *,
    kill_at: int | None = None,
    stopped: bool = False,
) -> int:
    """Start a run in a process of its own; with ``kill_at`` it kills itself at that point of `CALLS`."""
    child = os.fork()
    if child:
        return child
    status = 70
    try:
        if kill_at is not None:
            _kill_at(kill_at)
        if stopped:
            os.kill(os.getpid(), signal.SIGSTOP)
        run(source, directory, index, count)
        status = 0
    finally:
        os._exit(status)


def ended(child: int) -> int:
    """Wait for a run: 0 when it ended well, -9 when it was killed."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _kill_at(point: int) -> None:
    """Die just before call number ``point // 2`` (even points) or just after it (odd points)."""
    seen = -1

    def guarded(real):
        def call(*args, **kwargs):
            nonlocal seen
            seen += 1
            own = seen
            if own == point // 2 and point % 2 == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                return real(*args, **kwargs)
            finally:
                if own == point // 2:
                    os.kill(os.getpid(), signal.SIGKILL)

        return call

    for name in CALLS:
        setattr(os, name, guarded(getattr(os, name)))


@dataclass
class Tally:
    """What a series of kills came to."""

    kills: int = 0
    runs: int = 0
    completions: int = 0
    differing: list[str] = field(default_factory=list)
    seconds: float = 0.0


def killed(reference: Path, place: Path, *options: str) -> Tally:
    """What `main` counts, in a process of its own."""
    command = [sys.executable, "-m", "tests.crash.small_run", str(reference), str(place), *options]
    root = Path(__file__).parent.parent.parent
    return Tally(**json.loads(subprocess.run(command, cwd=root, stdout=subprocess.PIPE, check=True).stdout))


def kill_everywhere(source: Source, directory: Path) -> Tally:
    """Kill a run before and after each of its calls in turn; after each kill go on undisturbed, and compare."""
    tally, started, point = Tally(), time.monotonic(), 0
    while True:
        place = directory / str(point)
        tally.runs += 1
        status = ended(fork(source, place, kill_at=point))
        if status == 0:
            break
        if status != -signal.SIGKILL:
            raise AssertionError(f"the run should be killed at point {point}, it ended with {status}")
        tally.kills += 1
        _finish(source, place, tally)
        point += 1
    tally.seconds = time.monotonic() - started
    return tally


def kill_at_system_calls(source: Source, directory: Path, *, stride: int = 1) -> Tally:
    """Kill a run at the entry of every ``stride``-th of its system calls, whatever they are; needs strace, on Linux.

    Raises:
        OSError: strace may not look at processes here.
    """
    tally, started = Tally(), time.monotonic()
    directory.mkdir(parents=True, exist_ok=True)
    log = directory / "log"
    if _traced(source, directory / "whole", f"--output={log}") != 0:
        raise AssertionError("a run that is looked at should end well")
    calls = Counter(re.findall(r"^(\w+)\(", log.read_text(), flags=re.MULTILINE))
    # The last call is the exit itself; who has called it is done.
    points = [(name, n + 1) for name, count in calls.items() if not name.startswith("exit") for n in range(count)]
    for name, number in points[::stride]:
        place = directory / f"{name}-{number}"
        tally.runs += 1
        status = _traced(source, place, "--output=/dev/null", f"--inject={name}:signal=KILL:when={number}")
        if status not in (0, -signal.SIGKILL):
            raise AssertionError(f"the run should be killed at {name} {number}, it ended with {status}")
        tally.kills += status != 0
        _finish(source, place, tally)
    tally.seconds = time.monotonic() - started
    return tally


def _traced(source: Source, place: Path, *options: str) -> int:
    child = fork(source, place, stopped=True)
    os.waitpid(child, os.WUNTRACED)
    with subprocess.Popen(["strace", "-qq", "-p", str(child), *options], stderr=subprocess.DEVNULL) as tracer:
        while _tracer_of(child) == 0:
            if tracer.poll() is not None:
                os.kill(child, signal.SIGKILL)
                ended(child)
                raise OSError("strace may not look at processes here")
            time.sleep(0.001)
        os.kill(child, signal.SIGCONT)
    return ended(child)


def _tracer_of(child: int) -> int:
    lines = Path(f"/proc/{child}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("TracerPid")).split()[1])


def kill_at_random(source: Source, directory: Path, kills: int, *, workers: int = 1, seed: int = 0) -> Tally:
    """Kill runs of up to ``workers`` processes at random moments until so many were killed; compare after each few kills.

    A killed run is gone on with, by another number of workers each time, up to seven times; then one process ends it.
    """
    random, tally, started = Random(seed), Tally(), time.monotonic()
    clock = time.monotonic()
    if ended(fork(source, directory / "whole")) != 0:
        raise AssertionError("an undisturbed run should end well")
    whole = time.monotonic() - clock
    number = 0
    while tally.kills < kills:
        place = directory / str(number)
        number += 1
        for _ in range(random.randint(1, 7)):
            count = random.randint(1, workers)
            children = [fork(source, place, index, count) for index in range(count)]
            tally.runs += count
            # Now and then one of the workers is left alone.
            for child in random.sample(children, random.randint(max(1, count - 1), count)):
                time.sleep(random.uniform(0, 1.2 * whole))
                os.kill(child, signal.SIGKILL)
            for child in children:
                status = ended(child)
                if status not in (0, -signal.SIGKILL):
                    raise AssertionError(f"a worker should end well or be killed, it ended with {status}")
                tally.kills += status != 0
            tally.differing += bad_files(source, place)
        _finish(source, place, tally)
    tally.seconds = time.monotonic() - started
    return tally


def _finish(source: Source, place: Path, tally: Tally) -> None:
    """Go on undisturbed to the end, count what came out otherwise, and clear the place for the next."""
    tally.differing += bad_files(source, place) if place.exists() else []
    if ended(fork(source, place)) != 0:
        raise AssertionError("the run that goes on should end well")
    tally.completions += 1
    found = files(place)
    tally.differing += [
        name for name in found.keys() | source.files.keys() if found.get(name) != source.files.get(name)
    ]
    for path in sorted(place.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    with contextlib.suppress(FileNotFoundError):
        place.rmdir()


def main() -> None:
    """Kill runs as told and print the tally as JSON; its own process, for forks are quick where little is loaded."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("reference", type=Path)
    parser.add_argument("place", type=Path)
    parser.add_argument("--system-calls", type=int, metavar="STRIDE")
    parser.add_argument("--random", type=int, metavar="KILLS")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    source = Source.of(given.reference)
    if given.system_calls:
        tally = kill_at_system_calls(source, given.place, stride=given.system_calls)
    elif given.random:
        tally = kill_at_random(source, given.place, given.random, workers=given.workers, seed=given.seed)
    else:
        tally = kill_everywhere(source, given.place)
    print(json.dumps(asdict(tally)))


if __name__ == "__main__":
    main()
