"""Whether a model is the one that a cache was made with: for who asks the teacher again, and who trains beside it."""

from __future__ import annotations

from pathlib import Path

from kdcache.cache.mixture import Mixture
from kdcache.cache.reader import Cache
from kdcache.errors import CacheError
from kdcache.model_identity import identify


def refuse_other_teacher(cache: Cache, name: str, way_out: str) -> None:
    """Hold a model against the teacher of a cache, without loading it; of a mixture, against the first cache's.

    Args:
        cache: whose teacher is meant.
        name: folder or id of the model.
        way_out: what to do about another one, as the end of a sentence.

    Raises:
        ModelError: it is not there.
        CacheError: it is another model.
    """
    cache = cache.first if isinstance(cache, Mixture) else cache
    identity = cache.plan.teacher
    found = identify(name, identity.revision)
    if found.fingerprint != identity.fingerprint and not _is_copy(cache, name):
        raise CacheError(
            f"{name} is not the teacher of {cache.directory}: its fingerprint is {found.fingerprint[:12]}, the plan's "
            f"{identity.fingerprint[:12]} ({identity.name}); {way_out}"
        )


def teacher_revision(cache: Cache, name: str) -> str | None:
    """The revision to load a cache's teacher by, of a mixture the first cache's; None for a folder."""
    cache = cache.first if isinstance(cache, Mixture) else cache
    return None if _is_copy(cache, name) else cache.plan.teacher.revision


def files_of(name: str) -> tuple[tuple[str, int, int], ...]:
    """Names, sizes and times of a model folder's files: while these stay the same, it need not be hashed again."""
    found = sorted(path for path in Path(name).glob("*") if path.is_file()) if name and Path(name).is_dir() else []
    return tuple((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in found)


def _is_copy(cache: Cache, name: str) -> bool:
    """A folder copied from the Hub has a fingerprint of its files, the plan one of repository and commit."""
    return Path(name).is_dir() and cache.plan.teacher.revision is not None
