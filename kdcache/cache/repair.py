"""``kdcache repair``: what `examine` names is fetched from another copy, made again, or rebuilt from the shards.

In the order in which things depend on each other: the plan, the vocabulary and the damaged shards come from a copy, where
there is one, and a lost manifest too, if it is the one of the shards here; what is still damaged is made again, where somebody can; manifest and data card follow from the shards. Files
that arrive are checked before they replace anything. The manifest is what a shard is held against, and a manifest that
cannot be read leaves the plan, which every shard names by its digest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from kdcache.cache import layout
from kdcache.cache.directory import check_vocabulary, decode_shard, read_plan, read_vocabulary, shard_path
from kdcache.cache.files import make_directory, write_file
from kdcache.cache.manifest import Manifest, Plan, parse_manifest, parse_plan
from kdcache.cache.shard import read_file
from kdcache.cache.verify import Finding, Verification, examine
from kdcache.cache.writer import CacheWriter
from kdcache.errors import CacheError, CorruptCacheError, KdcacheError, StorageError
from kdcache.progress import Progress, Silent

# Bytes of one file of another copy, by its name in the directory; at most so many.
Fetch = Callable[[str, int], bytes]
Make = Callable[[], object]
_ASIDE = ".aside"


@dataclass(frozen=True)
class Repair:
    """What a repair did.

    Attributes:
        plan: of the cache.
        before: findings at first.
        fetched: files that came from the copy.
        refused: files of the copy that were not taken, and why.
        after: the directory as it is now.
    """

    plan: Plan
    before: list[Finding]
    fetched: list[str]
    refused: list[Finding]
    after: Verification


def repair(
    directory: str | Path, *, fetch: Fetch | None = None, make: Make | None = None, progress: Progress | None = None
) -> Repair:
    """Mend a cache directory as far as possible.

    Args:
        directory: the cache.
        fetch: gives a file of another copy of the cache; raises a KdcacheError where it cannot.
        make: makes what is missing or broken in the directory, and its manifest, as a teacher run does.
        progress: told of shards checked and files fetched.

    Raises:
        CacheError: there is no plan that the rest belongs to.
        StorageError: the directory cannot be written.
        KdcacheError: what ``make`` raises; shards set aside for it are back.
    """
    directory, progress = Path(directory), progress or Silent()
    fetched: list[str] = []
    plan = _plan(directory, fetch, fetched)
    found = _examined(directory, plan, progress)
    before, refused = found.findings, []
    if fetch is not None:
        refused = _fetch_all(directory, plan, _files(found), fetch, fetched, progress)
        if fetched:
            found = _examined(directory, plan, progress)
    if make is not None and found.findings:
        with _set_aside(directory, _damaged_shards(found)):
            make()
        found = _examined(directory, plan, progress)
    if _rebuildable(directory, found):
        CacheWriter(directory, plan, read_vocabulary(directory, plan)).finalise()
        found = _examined(directory, plan, progress)
    return Repair(plan, before, fetched, refused, found)


def _examined(directory: Path, plan: Plan, progress: Progress) -> Verification:
    progress.begin("verify", len(plan.shards), "shards")
    try:
        return examine(directory, on_shard=lambda size: progress.advance(1))
    finally:
        progress.end()


def _files(found: Verification) -> list[str]:
    """Files with findings, each once."""
    return list(dict.fromkeys(f.file for f in found.findings))


def _damaged_shards(found: Verification) -> list[str]:
    return [name for name in _files(found) if name.startswith(f"{layout.SHARD_DIRECTORY}/")]


def _rebuildable(directory: Path, found: Verification) -> bool:
    """Whether manifest or card are all that is wrong: they follow from the rest."""
    files = set(_files(found))
    return files == {layout.MANIFEST_FILE} or (not files and not (directory / layout.CARD_FILE).exists())


def _plan(directory: Path, fetch: Fetch | None, fetched: list[str]) -> Plan:
    """The directory's plan; the copy's where ours cannot be read or nothing here belongs to it, but to the copy's."""
    plan, problem = None, None
    try:
        plan = read_plan(directory)
    except CacheError as exc:
        problem = exc
    if plan is not None and (fetch is None or _has_some_of(directory, plan)):
        return plan
    if fetch is not None:
        data = fetch(layout.PLAN_FILE, layout.JSON_LIMIT)
        theirs = parse_plan(data)
        if theirs != plan and _has_some_of(directory, theirs):
            write_file(directory / layout.PLAN_FILE, data)
            fetched.append(layout.PLAN_FILE)
            return theirs
    if plan is not None:
        return plan
    if fetch is not None:
        raise CacheError(
            f"{problem}; the copy has a plan, but no manifest or shard in {directory} belongs to it: copy the whole cache "
            "into an empty directory"
        ) from problem
    raise CacheError(f"{problem}; the plan can only come from another copy: kdcache repair --from") from problem


def _has_some_of(directory: Path, plan: Plan) -> bool:
    """Whether the manifest or some shard in the directory belongs to the plan."""
    if _manifest(directory, plan) is not None:
        return True
    for index in range(len(plan.shards)):
        path = shard_path(directory, index)
        try:
            decode_shard(path, read_file(path, limit=layout.SHARD_LIMIT), plan, index)
        except KdcacheError:
            continue
        return True
    return False


def _manifest(directory: Path, plan: Plan) -> Manifest | None:
    try:
        return parse_manifest(read_file(directory / layout.MANIFEST_FILE, limit=layout.JSON_LIMIT), plan)
    except KdcacheError:
        return None


def _fetch_all(
    directory: Path, plan: Plan, damaged: list[str], fetch: Fetch, fetched: list[str], progress: Progress
) -> list[Finding]:
    """Replace damaged files by those of the copy that pass; returns the others.

    A lost manifest is the copy's, if the good shards here are its own, so that the cache keeps its id. It is what the other
    shards are held against, and is written once they are all here.
    """
    refused = []
    manifest, theirs = _manifest(directory, plan), b""
    if manifest is None:
        try:
            theirs = fetch(layout.MANIFEST_FILE, layout.JSON_LIMIT)
            manifest = _agreeing(directory, plan, theirs, damaged)
        except KdcacheError as exc:
            refused.append(Finding(layout.MANIFEST_FILE, str(exc)))
    shards = _fetch_files(directory, plan, manifest, damaged, fetch, fetched, progress)
    if theirs and manifest is not None and not any(f.file.startswith(layout.SHARD_DIRECTORY) for f in shards):
        write_file(directory / layout.MANIFEST_FILE, theirs)
        fetched.append(layout.MANIFEST_FILE)
    return refused + shards


def _agreeing(directory: Path, plan: Plan, data: bytes, damaged: list[str]) -> Manifest:
    """The copy's manifest, if it is of this plan and of the shards here that are not damaged."""
    manifest = parse_manifest(data, plan)
    for index, entry in enumerate(manifest.shards):
        path = shard_path(directory, index)
        if f"{layout.SHARD_DIRECTORY}/{path.name}" in damaged:
            continue
        if not entry.promises(read_file(path, limit=layout.SHARD_LIMIT)):
            raise CorruptCacheError(f"{path} is a good shard and not the one of the copy's manifest")
    return manifest


def _fetch_files(
    directory: Path, plan: Plan, manifest: Manifest | None, names: list[str], fetch: Fetch, fetched: list[str],
    progress: Progress,
) -> list[Finding]:  # fmt: skip
    refused = []
    wanted = {f"{layout.SHARD_DIRECTORY}/{layout.shard_name(i)}": i for i in range(len(plan.shards))}
    names = [name for name in names if name == layout.VOCABULARY_FILE or name in wanted]
    make_directory(directory / layout.SHARD_DIRECTORY)
    progress.begin("fetch", len(names), "files")
    try:
        for name in names:
            try:
                if name == layout.VOCABULARY_FILE:
                    data = fetch(name, layout.VOCABULARY_LIMIT)
                    check_vocabulary(data, plan)
                else:
                    data = fetch(name, _shard_limit(manifest, wanted[name]))
                    _check_shard(data, plan, manifest, wanted[name])
            except KdcacheError as exc:
                refused.append(Finding(name, str(exc)))
            else:
                write_file(directory / name, data)
                fetched.append(name)
            progress.advance(1)
    finally:
        progress.end()
    return refused


def _shard_limit(manifest: Manifest | None, index: int) -> int:
    return layout.SHARD_LIMIT if manifest is None else min(layout.SHARD_LIMIT, manifest.shards[index].bytes)


def _check_shard(data: bytes, plan: Plan, manifest: Manifest | None, index: int) -> None:
    """Hold a shard against the manifest, where there is one, and against the plan in any case."""
    if manifest is not None:
        entry = manifest.shards[index]
        if not entry.promises(data):
            found = hashlib.sha256(data).hexdigest()
            raise CorruptCacheError(
                f"the copy's shard has SHA-256 {found[:12]}…, the manifest promises {entry.sha256[:12]}…: damaged there too, or "
                f"the manifest here is (move {layout.MANIFEST_FILE} away and repair again: it follows from the shards)"
            )
    decode_shard(Path("the copy's") / layout.shard_name(index), data, plan, index)


@contextmanager
def _set_aside(directory: Path, names: list[str]) -> Iterator[None]:
    """Move damaged shards out of the way of who makes them again; back, where none was made.

    A shard that decodes but is not what the manifest promises would be taken for a good one otherwise.
    """
    moved = [(path, path.with_name(path.name + _ASIDE)) for name in names if (path := directory / name).is_file()]
    try:
        try:
            for path, aside in moved:
                path.rename(aside)
        except OSError as exc:
            raise StorageError(f"cannot move damaged shards of {directory} aside: {exc.strerror or exc}") from exc
        yield
    finally:
        for path, aside in moved:
            with suppress(OSError):
                if path.exists():
                    aside.unlink()
                else:
                    aside.rename(path)
