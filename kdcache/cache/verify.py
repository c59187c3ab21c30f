"""Check a whole cache directory and name everything that is wrong, not only the first thing."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kdcache.cache import layout
from kdcache.cache.codec import sequence_digests
from kdcache.cache.manifest import SplitSummary, parse_manifest
from kdcache.cache.reader import Cache, missing_shards, open_cache, read_plan, read_vocabulary, shard_path
from kdcache.cache.shard import read_file
from kdcache.cache.statistics import RowStatistics, summarise
from kdcache.errors import CacheError, IncompleteCacheError, KdcacheError


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: the file it is in, and what is wrong with it."""

    file: str
    problem: str


def verify(directory: str | Path, *, on_shard: Callable[[int], None] | None = None) -> list[Finding]:
    """Findings in a cache directory, empty when it is whole: structure, hashes, values and totals.

    Args:
        directory: the cache.
        on_shard: called with the number of compressed bytes after each shard, for a progress bar.

    Raises:
        CacheError: there is no readable plan, so nothing can be said about the rest.
    """
    directory = Path(directory)
    plan = read_plan(directory)
    findings = []
    try:
        read_vocabulary(directory, plan)
    except CacheError as exc:
        findings.append(Finding(layout.VOCABULARY_FILE, str(exc)))
    try:
        cache = open_cache(directory, keep=1)
    except IncompleteCacheError as exc:
        missing = missing_shards(directory, plan)
        findings += [Finding(f"{layout.SHARD_DIRECTORY}/{layout.shard_name(i)}", "missing") for i in missing]
        manifest = directory / layout.MANIFEST_FILE
        if not manifest.exists():
            return [*findings, Finding(layout.MANIFEST_FILE, str(exc))]
        try:
            parsed = parse_manifest(read_file(manifest, limit=layout.JSON_LIMIT), plan)
        except KdcacheError as broken:
            return [*findings, Finding(layout.MANIFEST_FILE, str(broken))]
        cache = Cache(directory, plan, parsed, "", keep=1)
    except KdcacheError as exc:
        return [*findings, Finding(layout.MANIFEST_FILE, str(exc))]
    digests: dict[int, bytes] = {}
    parts: dict[int, RowStatistics] = {}
    for index, entry in enumerate(cache.manifest.shards):
        if shard_path(directory, index).exists():
            try:
                content = cache.shard(index)
            except KdcacheError as exc:
                findings.append(Finding(f"{layout.SHARD_DIRECTORY}/{layout.shard_name(index)}", str(exc)))
            else:
                parts[index], digests[index] = RowStatistics.of(content.rows), sequence_digests(content).tobytes()
        if on_shard is not None:
            on_shard(entry.bytes)
    if len(parts) == len(plan.shards):
        for number, (split, stated) in enumerate(zip(plan.data.splits, cache.manifest.splits, strict=True)):
            own = [parts[i] for i, s in enumerate(plan.shards) if s.split == number]
            if not _same_totals(summarise(split, own), stated):
                findings.append(
                    Finding(layout.MANIFEST_FILE, f"the totals of split {split.name} are not those of its shards")
                )
            joined = b"".join(digests[i] for i, s in enumerate(plan.shards) if s.split == number)
            if hashlib.sha256(joined).hexdigest() != split.fingerprint:
                findings.append(
                    Finding(layout.PLAN_FILE, f"split {split.name} holds other sequences than its fingerprint says")
                )
    return findings


def _same_totals(found: SplitSummary, stated: SplitSummary) -> bool:
    """Equal counts, and sums equal up to what another processor's exponentials may differ by."""
    if any(
        getattr(found, field) != getattr(stated, field) for field in ("name", "entries", "positions", "kept_positions")
    ):
        return False
    pairs = [(found.teacher_nll, stated.teacher_nll), *zip(found.kept_mass_mean, stated.kept_mass_mean, strict=True)]
    pairs += [(a + 1.0, b + 1.0) for a, b in zip(found.kept_mass_p1, stated.kept_mass_p1, strict=True)]
    return all(
        math.isclose(a, b, rel_tol=1e-3 if i > len(found.kept_mass_mean) else 1e-6) for i, (a, b) in enumerate(pairs)
    )
