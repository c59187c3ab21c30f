"""The files of a cache directory, complete or not: plan, vocabulary, single shards; each held against what states it."""

from __future__ import annotations

import hashlib
from pathlib import Path

from kdcache.cache import layout
from kdcache.cache.codec import ShardContent, decode
from kdcache.cache.manifest import Plan, parse_plan
from kdcache.cache.shard import ShardRecord, decompress, read_file, unpack
from kdcache.cache.strict_json import parse
from kdcache.errors import CacheError, CorruptCacheError, StorageError


def read_plan(directory: Path) -> Plan:
    """The plan of a cache directory, complete or not.

    Raises:
        CacheError: the directory or its plan does not exist.
    """
    path = directory / layout.PLAN_FILE
    try:
        there, folder = path.exists(), directory.is_dir()
    except OSError as exc:
        raise StorageError(f"cannot look into {directory}: {exc.strerror or exc}; get access to it") from exc
    if not there:
        if not folder:
            what = "is a file; give the directory that it lies in" if directory.is_file() else "does not exist"
            raise CacheError(f"{directory} is not a cache, it {what}")
        raise CacheError(
            f"{directory} is not a cache (it has no {layout.PLAN_FILE}); make one with kdcache teacher-cache, or, where only "
            "the plan is lost, mend it with kdcache repair --from another copy"
        )
    return parse_plan(read_file(path, limit=layout.JSON_LIMIT))


def shard_path(directory: Path, index: int) -> Path:
    """Where shard ``index`` lies."""
    return directory / layout.SHARD_DIRECTORY / layout.shard_name(index)


def missing_shards(directory: Path, plan: Plan) -> list[int]:
    """Indices of the plan's shards that have no file."""
    return [i for i in range(len(plan.shards)) if not shard_path(directory, i).exists()]


def decode_shard(
    path: Path, data: bytes, plan: Plan, index: int, *, limit: int = layout.SHARD_LIMIT, verified: bool = False
) -> tuple[ShardContent, ShardRecord]:
    """Decode a shard's bytes, which unpack to at most ``limit``, and hold them against the plan.

    ``verified``: these bytes have passed every check before; only what decoding needs is looked at again.

    Raises:
        CorruptCacheError: naming the file and what is wrong with it.
    """
    expected = plan.shards[index]
    design = plan.design(expected.split)
    try:
        arrays, record = unpack(
            data,
            sequences=expected.sequences,
            tokens=expected.tokens,
            positions=expected.positions,
            design=design,
            entries_limit=expected.positions * design.entry_limit,
            limit=min(limit, layout.SHARD_LIMIT),
            verified=verified,
        )
        if record.plan_digest != plan.digest:
            raise CorruptCacheError(
                f"it belongs to plan {record.plan_digest[:12]}, not to this cache's {plan.digest[:12]}"
            )
        if record.index != index:
            raise CorruptCacheError(f"it is shard {record.index}, not {index}")
        content = decode(arrays, design=design, values=plan.selection.values, verified=verified)
    except CorruptCacheError as exc:
        raise CorruptCacheError(
            f"{path} is not a good shard: {exc}; kdcache teacher-cache makes it again, or fetch it again"
        ) from exc
    return content, record


def read_vocabulary(directory: Path, plan: Plan) -> list[str | None]:
    """Token strings by id.

    Raises:
        CorruptCacheError: the file is missing or is not the one the plan names.
    """
    path = directory / layout.VOCABULARY_FILE
    try:
        return check_vocabulary(read_file(path, limit=layout.VOCABULARY_LIMIT), plan)
    except CorruptCacheError as exc:
        raise CorruptCacheError(f"{path} is not the cache's vocabulary: {exc}") from exc


def check_vocabulary(data: bytes, plan: Plan) -> list[str | None]:
    """Token strings by id, from the bytes of a vocabulary file.

    Raises:
        CorruptCacheError: it is not the vocabulary the plan names.
    """
    raw = decompress(data, limit=layout.VOCABULARY_LIMIT)
    if hashlib.sha256(raw).hexdigest() != plan.tokenizer.fingerprint:
        raise CorruptCacheError("its hash is not the plan's tokenizer fingerprint")
    tokens = parse(raw, what=layout.VOCABULARY_FILE, limit=layout.VOCABULARY_LIMIT, values=layout.VOCABULARY_VALUES)
    if not isinstance(tokens, list) or len(tokens) != plan.tokenizer.vocab_size:
        raise CorruptCacheError(f"it does not list {plan.tokenizer.vocab_size} tokens")
    if not all(t is None or isinstance(t, str) for t in tokens):
        raise CorruptCacheError("it lists something that is not a token")
    return tokens
