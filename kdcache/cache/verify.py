"""Check a whole cache directory and name everything that is wrong, not only the first thing.

Shards are independent, so several threads read, hash, unpack and check them (hashlib, zstd and most of numpy let go of
the interpreter); what is held at any time is one shard per thread.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from kdcache.cache import layout
from kdcache.cache.codec import ShardContent
from kdcache.cache.manifest import Manifest, Plan, parse_manifest
from kdcache.cache.reader import Cache, decode_shard, read_plan, read_vocabulary, shard_path
from kdcache.cache.shard import read_file
from kdcache.cache.statistics import RowStatistics, SplitTotals, same_totals
from kdcache.errors import IncompleteCacheError, KdcacheError

# A decoded shard takes some hundred bytes a position, and every thread holds one.
_MOST_THREADS = 16


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or worth a note: the file it is in, and what it is."""

    file: str
    problem: str


@dataclass(frozen=True)
class Verification:
    """What a check of a cache directory found.

    Attributes:
        cache_id: hex SHA-256 of the manifest; None where there is no manifest that can be read.
        plan_digest: of ``plan.json``.
        findings: what is wrong; empty when the cache is whole.
        notes: what is in the directory and belongs to no cache: nothing reads it, so it breaks nothing.
        shards: shards that the plan names.
        bytes: bytes of the shard files that are there.
        seconds: time it took.
    """

    cache_id: str | None
    plan_digest: str
    findings: list[Finding]
    notes: list[Finding]
    shards: int
    bytes: int
    seconds: float

    @property
    def whole(self) -> bool:
        """Whether nothing is wrong."""
        return not self.findings


@dataclass(frozen=True)
class _Checked:
    statistics: RowStatistics
    digests: bytes


def verify(directory: str | Path, *, on_shard: Callable[[int], None] | None = None) -> list[Finding]:
    """Findings in a cache directory, empty when it is whole. Arguments and errors as `examine`."""
    return examine(directory, on_shard=on_shard).findings


def examine(
    directory: str | Path, *, threads: int | None = None, on_shard: Callable[[int], None] | None = None
) -> Verification:
    """Check structure, hashes, values and totals of a cache directory.

    Args:
        directory: the cache.
        threads: that check shards at once; None takes one per processor.
        on_shard: called with the number of compressed bytes after each shard, for a progress bar.

    Raises:
        CacheError: there is no readable plan, so nothing can be said about the rest.
    """
    started, directory = time.monotonic(), Path(directory)
    plan = read_plan(directory)
    findings: list[Finding] = []
    try:
        read_vocabulary(directory, plan)
    except KdcacheError as exc:
        findings.append(Finding(layout.VOCABULARY_FILE, str(exc)))
    manifest, cache_id = None, None
    try:
        manifest, cache_id = _manifest(directory, plan)
    except KdcacheError as exc:
        findings.append(Finding(layout.MANIFEST_FILE, str(exc)))
    cache = None if manifest is None else Cache(directory, plan, manifest, cache_id or "", keep=1)
    splits, good, total = _Splits(plan), 0, 0
    for index, size, checked in _checked_shards(directory, plan, cache, _thread_count(threads)):
        if isinstance(checked, str):
            findings.append(Finding(f"{layout.SHARD_DIRECTORY}/{layout.shard_name(index)}", checked))
        else:
            splits.add(index, checked)
            good += 1
        total += size
        if on_shard is not None:
            on_shard(size)
    if good == len(plan.shards):
        findings += splits.findings(manifest)
    return Verification(
        cache_id, plan.digest, findings, _notes(directory, plan), len(plan.shards), total, time.monotonic() - started
    )


def _manifest(directory: Path, plan: Plan) -> tuple[Manifest, str]:
    path = directory / layout.MANIFEST_FILE
    if not os.path.lexists(path):
        raise IncompleteCacheError(
            "missing: what makes or brings this cache has not finished; the same command goes on where it stopped, and "
            "kdcache repair writes a lost manifest again"
        )
    data = read_file(path, limit=layout.JSON_LIMIT)
    return parse_manifest(data, plan), hashlib.sha256(data).hexdigest()


def _thread_count(threads: int | None) -> int:
    if threads is not None:
        return max(1, threads)
    return min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, _MOST_THREADS)


def _checked_shards(
    directory: Path, plan: Plan, cache: Cache | None, threads: int
) -> Iterator[tuple[int, int, _Checked | str]]:
    """Index, bytes on disk and result of every shard in order; no more are under way than there are threads."""
    waiting: deque[tuple[int, Future[tuple[int, _Checked | str]]]] = deque()
    with ThreadPoolExecutor(max_workers=threads, thread_name_prefix="verify") as pool:
        try:
            for index in range(len(plan.shards)):
                waiting.append((index, pool.submit(_check, directory, plan, cache, index)))
                if len(waiting) > threads:
                    first, done = waiting.popleft()
                    yield first, *done.result()
            while waiting:
                first, done = waiting.popleft()
                yield first, *done.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _check(directory: Path, plan: Plan, cache: Cache | None, index: int) -> tuple[int, _Checked | str]:
    """Bytes on disk, and what a good shard adds to the totals or what is wrong with it."""
    path = shard_path(directory, index)
    if not os.path.lexists(path):
        return 0, "missing"
    try:
        size = path.stat().st_size
    except OSError:
        size = 0  # what is wrong with it is said where it is read
    try:
        content = _content(path, plan, cache, index)
    except KdcacheError as exc:
        return size, str(exc)
    return size, _Checked(RowStatistics.of(content.rows), content.digests.tobytes())


def _content(path: Path, plan: Plan, cache: Cache | None, index: int) -> ShardContent:
    """Without a manifest a shard is still held against the plan and what it says of itself."""
    if cache is not None:
        return cache.load(index)
    return decode_shard(path, read_file(path, limit=layout.SHARD_LIMIT), plan, index)[0]


class _Splits:
    """Totals and digests of every split, added up as the shards come: memory does not grow with them."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._totals = [SplitTotals(len(plan.selection.temperatures)) for _ in plan.data.splits]
        self._digests = [hashlib.sha256() for _ in plan.data.splits]

    def add(self, index: int, checked: _Checked) -> None:
        """Add a good shard; shards come in order."""
        split = self._plan.shards[index].split
        self._totals[split].add(checked.statistics)
        self._digests[split].update(checked.digests)

    def findings(self, manifest: Manifest | None) -> list[Finding]:
        """What is wrong with the whole, where every shard is good."""
        found = []
        for number, split in enumerate(self._plan.data.splits):
            if manifest is not None and not same_totals(self._totals[number].summary(split), manifest.splits[number]):
                found.append(
                    Finding(layout.MANIFEST_FILE, f"the totals of split {split.name} are not those of its shards")
                )
            if self._digests[number].hexdigest() != split.fingerprint:
                found.append(
                    Finding(layout.PLAN_FILE, f"split {split.name} holds other sequences than its fingerprint says")
                )
        return found


def _notes(directory: Path, plan: Plan) -> list[Finding]:
    """What lies in the directory that the format does not name. Nobody reads it, so it is no damage."""
    shards = directory / layout.SHARD_DIRECTORY
    known = {layout.PLAN_FILE, layout.VOCABULARY_FILE, layout.MANIFEST_FILE, layout.CARD_FILE, layout.SHARD_DIRECTORY}
    known |= {f"{layout.SHARD_DIRECTORY}/{layout.shard_name(i)}" for i in range(len(plan.shards))}
    notes, links = [], 0
    for folder, prefix in ((directory, ""), (shards, f"{layout.SHARD_DIRECTORY}/")):
        try:
            entries = sorted(folder.iterdir()) if folder.is_dir() else []
        except OSError as exc:
            notes.append(Finding(prefix or ".", f"cannot be listed: {exc.strerror}"))
            continue
        for entry in entries:
            name = prefix + entry.name
            links += name in known and entry.is_symlink()
            if name in known:
                continue
            if entry.name.startswith(layout.TEMPORARY_PREFIX):
                notes.append(
                    Finding(name, "left over from a stopped run; the next kdcache teacher-cache clears it away")
                )
            else:
                notes.append(Finding(name, "does not belong to a cache; it is never read"))
    if links:
        notes.append(Finding(".", f"{links} of its files are links; what they lead to was checked"))
    if not (directory / layout.CARD_FILE).exists():
        notes.append(Finding(layout.CARD_FILE, "missing; the next kdcache teacher-cache writes it again"))
    return notes
