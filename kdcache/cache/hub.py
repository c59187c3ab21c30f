"""Caches as data-set repositories of the Hugging Face Hub: one commit that holds everything, and a tag that is the cache id.

The contents of the shards are uploaded before the commit, so until it is made nobody sees anything, and afterwards
everybody sees all of it. The tag keeps a link to this very cache valid when the repository gets another one. Reading needs
nothing of this: ``hf://datasets/USER/NAME`` and ``hf://datasets/USER/NAME@CACHE-ID`` are places like any other.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kdcache.cache import layout
from kdcache.cache.card import with_licence
from kdcache.cache.pace import Meter, Retry
from kdcache.cache.reader import Cache
from kdcache.cache.receive import foreign_names
from kdcache.cache.remote import Place, parse_location
from kdcache.cache.shard import read_file
from kdcache.cache.share import object_names, whole_cache
from kdcache.cache.transfer import Transfer, persist
from kdcache.errors import CacheError, CorruptCacheError, TransferError
from kdcache.progress import Progress

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi

_REPOSITORY = re.compile(r"hf://datasets/([^/@]+/[^/@]+)")
_KIND = "dataset"
_BRANCH = "main"
# What a new repository has, or may have, before anything is pushed to it.
_HUB_OWN = {".gitattributes"}
_AT_ONCE = 8


@dataclass(frozen=True)
class Published:
    """Where a cache can be read now: the repository, the commit that holds it, and its tag, which is the cache id."""

    repository: str
    commit: str
    tag: str
    bytes: int


def publish(
    source: str | Path,
    destination: str,
    *,
    private: bool = True,
    licence: str | None = None,
    overwrite: bool = False,
    retry: Retry | None = None,
    progress: Progress | None = None,
) -> Published:
    """Make a complete cache the content of a data-set repository, which is created if it is not there.

    Args:
        source: a cache directory; its README.md is the repository's data card, as people have edited it.
        destination: ``hf://datasets/USER/NAME``.
        private: of a repository that is created; one that is there stays as visible as it is.
        licence: put into the card's header as it is published.
        overwrite: replace another cache or other files there; earlier commits and tags stay.
        retry: how patient to be.
        progress: told of bytes.

    Raises:
        CacheError: the source is incomplete or damaged, or the repository holds something else.
        TransferError: the Hub cannot be reached or refuses.
    """
    found = _REPOSITORY.fullmatch(str(destination).rstrip("/"))
    if found is None:
        raise TransferError(
            f"a cache is published as hf://datasets/USER/NAME, without revision or folder, not {destination}"
        )
    cache = whole_cache(source)
    card = _card(cache, licence)
    meter = Meter(progress)
    return persist(
        f"hf://datasets/{found[1]}",
        lambda: _publish_once(cache, found[1], card, private=private, overwrite=overwrite, meter=meter),
        retry=retry or Retry(),
    )


def _publish_once(
    cache: Cache, repository: str, card: bytes | None, *, private: bool, overwrite: bool, meter: Meter
) -> Published:
    """Every step looks at what is there, so after a failure the whole is simply done again: nothing is uploaded twice."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    hub = HfApi()
    hub.create_repo(repository, repo_type=_KIND, private=private, exist_ok=True)
    state = hub.dataset_info(repository, revision=_BRANCH)
    there = {sibling.rfilename for sibling in state.siblings or []}
    if not overwrite:
        _refuse_other_contents(repository, state.sha, there, cache)
    contents: dict[str, str | bytes] = {name: str(cache.directory / name) for name in object_names(cache)}
    if card is not None:
        contents[layout.CARD_FILE] = card
    contents[layout.MANIFEST_FILE] = read_file(cache.directory / layout.MANIFEST_FILE, limit=layout.JSON_LIMIT)
    additions = [CommitOperationAdd(name, content) for name, content in contents.items()]
    _check_shards(cache, additions)
    _upload(hub, repository, additions, meter)
    surplus = [n for n in there if overwrite and n.startswith(f"{layout.SHARD_DIRECTORY}/") and n not in contents]
    commit = hub.create_commit(
        repository,
        [*additions, *(CommitOperationDelete(name) for name in sorted(surplus))],
        commit_message=f"Cache {cache.id[:16]}",
        repo_type=_KIND,
        revision=_BRANCH,
        parent_commit=state.sha,
    )
    hub.create_tag(repository, tag=cache.id, revision=commit.oid, repo_type=_KIND, exist_ok=True)
    return Published(f"hf://datasets/{repository}", commit.oid, cache.id, sum(a.upload_info.size for a in additions))


def _upload(hub: HfApi, repository: str, additions: list[CommitOperationAdd], meter: Meter) -> None:
    """Large contents before the commit, a few at a time so that something is to be seen."""
    meter.begin("push", sum(a.upload_info.size for a in additions))
    try:
        for start in range(0, len(additions), _AT_ONCE):
            some = additions[start : start + _AT_ONCE]
            hub.preupload_lfs_files(repository, some, repo_type=_KIND, revision=_BRANCH, free_memory=False)
            meter.add(sum(a.upload_info.size for a in some))
    finally:
        meter.end()


def _check_shards(cache: Cache, additions: list[CommitOperationAdd]) -> None:
    """The hashes by which the Hub takes contents in are those of the manifest."""
    for addition, entry in zip(additions, cache.manifest.shards, strict=False):
        if addition.upload_info.sha256.hex() != entry.sha256:
            raise CorruptCacheError(
                f"{cache.directory / addition.path_in_repo} is damaged: another SHA-256 than the manifest's "
                f"{entry.sha256[:12]}…; nothing is published, see kdcache verify"
            )


def _refuse_other_contents(repository: str, commit: str | None, there: set[str], cache: Cache) -> None:
    shown = f"hf://datasets/{repository}"
    if foreign := foreign_names({n.partition("/")[0] for n in there - _HUB_OWN}):
        raise CacheError(
            f"{shown} is neither empty nor a cache (it holds {', '.join(foreign[:4])}); take another repository, or push "
            "there all the same with --overwrite"
        )
    if layout.MANIFEST_FILE in there:
        place = Place(parse_location(f"{shown}@{commit}"))
        if Transfer(place).read(layout.MANIFEST_FILE) != read_file(
            cache.directory / layout.MANIFEST_FILE, limit=layout.JSON_LIMIT
        ):
            raise CacheError(f"{shown} holds another cache; take another repository, or replace it with --overwrite")


def _card(cache: Cache, licence: str | None) -> bytes | None:
    path = cache.directory / layout.CARD_FILE
    if not path.exists():
        if licence is not None:
            raise CacheError(
                f"{path} is missing, so there is no card to put the licence into; kdcache repair writes it again"
            )
        return None
    card = read_file(path, limit=layout.JSON_LIMIT)
    if licence is None:
        return card
    try:
        return with_licence(card.decode("utf-8"), licence).encode()
    except UnicodeDecodeError as exc:
        raise CacheError(f"{path} is not UTF-8; save it as such") from exc
