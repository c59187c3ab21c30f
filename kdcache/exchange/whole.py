"""Import of the whole kind of JSON Lines: what `kdcache export-cache --to jsonl` wrote becomes the same cache again.

A plan names the tokens of a cache and not its rows, so whether these are the exported ones is seen from the cache id alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from kdcache.cache import layout
from kdcache.cache.codec import CachedSequence
from kdcache.cache.derive import DerivedCache, write_derived
from kdcache.cache.manifest import Plan, parse_plan
from kdcache.cache.strict_json import canonical_sha256, parse, parse_object
from kdcache.errors import CorruptCacheError, DataError
from kdcache.exchange import jsonl
from kdcache.exchange.contents import Contents
from kdcache.exchange.imported_plan import Given, Split
from kdcache.exchange.tables import lines
from kdcache.inspection import harmless
from kdcache.progress import Progress
from kdcache.token_maps import load_tokenizer, token_map


def import_whole(source: Path, destination: Path, given: Given, progress: Progress) -> tuple[DerivedCache, list[str]]:
    """JSON Lines of our own with a plan beside them: the very cache that was exported, which its id says.

    Args:
        source: folder.
        destination: created if absent; otherwise empty, or holding the cache that is being made.
        given: a tokenizer to hold against the vocabulary, and nothing else.
        progress: told about long work.

    Returns:
        The cache, and what is to be told where it is not, or not certainly, the exported one.

    Raises:
        DataError: options that have no say here, a damaged export, rows that no cache may hold; the line is named.
        TokenizerError, PlanMismatchError, StorageError: as `kdcache.exchange.importing.import_cache`.
    """
    if replace(given, tokenizer=None) != Given():
        raise DataError(
            f"{source / jsonl.PLAN} says all that the cache will be; leave --teacher, --temperature, --holdout and "
            "--positions-per-shard out"
        )
    try:
        plan = parse_plan((source / jsonl.PLAN).read_bytes())
        raw = parse(
            (source / jsonl.VOCABULARY).read_bytes(), what=jsonl.VOCABULARY, limit=layout.VOCABULARY_LIMIT,
            values=layout.VOCABULARY_VALUES,
        )  # fmt: skip
    except CorruptCacheError as exc:
        raise DataError(str(exc)) from exc
    except OSError as exc:
        raise DataError(f"{exc.filename} cannot be read: {exc.strerror}") from exc
    if canonical_sha256(raw) != plan.tokenizer.fingerprint or not isinstance(raw, list):
        raise DataError(f"{source / jsonl.VOCABULARY} is not the vocabulary that {jsonl.PLAN} names")
    if given.tokenizer is not None and token_map(load_tokenizer(given.tokenizer)).tokens != raw:
        raise DataError(
            f"the tokenizer {given.tokenizer} has other tokens than {source / jsonl.VOCABULARY}; leave --tokenizer out"
        )
    lacking = [s.name for s in plan.data.splits if not (source / f"{s.name}.jsonl").exists()]
    if lacking:
        raise DataError(f"{source} has no {', '.join(f'{name}.jsonl' for name in lacking)}, which {jsonl.PLAN} names")
    exported = _exported_id(source)
    found = [
        Split(partial(_whole_split, source / f"{s.name}.jsonl", plan, number), s.name)
        for number, s in enumerate(plan.data.splits)
    ]
    try:
        cache = write_derived(destination, plan, raw, Contents(plan, found).content, progress)
    except CorruptCacheError as exc:
        # What the format's own reader advises is of a teacher's cache.
        cause = str(exc).split("; kdcache teacher-cache")[0]
        raise DataError(
            f"no cache can be made of {source} in {destination}: {cause}; export it again, and import it into a new directory"
        ) from exc
    notes = _other_than_exported(source, exported, cache.manifest.cache_id)
    for note in notes:
        progress.warning(note)
    return cache, notes


def _exported_id(source: Path) -> str | None:
    """The id of the cache that was exported; None where the export does not say."""
    path = source / jsonl.CACHE
    try:
        found = parse_object(path.read_bytes(), what=str(path)).get("cache_id")
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise DataError(f"{path} cannot be read: {exc.strerror}") from exc
    except CorruptCacheError as exc:
        raise DataError(str(exc)) from exc
    if not isinstance(found, str):
        raise DataError(f"{path} should have a text cache_id")
    return found


def _other_than_exported(source: Path, exported: str | None, made: str) -> list[str]:
    """What is to be told where the cache that was made is not, or not certainly, the one that was exported."""
    if exported is None:
        return [f"whether it is the exported cache cannot be seen: {source / jsonl.CACHE} is missing (id {made[:12]})"]
    if exported == made:
        return []
    return [
        f"not the exported cache (id {made[:12]} against {harmless(exported)[:12]}): rows in {source} were changed, now or before a "
        "call that was stopped; export it again, and import it into a new directory"
    ]


def _whole_split(path: Path, plan: Plan, number: int) -> Iterator[CachedSequence]:
    return jsonl.read_whole(lines(path), plan, number)
