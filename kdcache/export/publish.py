"""An export as a model repository of the Hugging Face Hub: one commit that holds all of its files.

Large contents are uploaded before the commit that names them: until it is made, nobody sees anything.
"""

from __future__ import annotations

import re
from pathlib import Path

from kdcache.cache.card import HUB_ID
from kdcache.cache.pace import Meter, Retry
from kdcache.cache.transfer import persist
from kdcache.errors import TransferError
from kdcache.progress import Progress

_BRANCH = "main"
_HUB_OWN = {".gitattributes"}


def checked_repository(name: str) -> str:
    """``USER/NAME``, with or without ``hf://`` in front.

    Raises:
        TransferError: something else.
    """
    found = re.sub(r"^hf://(models/)?", "", name).rstrip("/")
    if HUB_ID.fullmatch(found) is None:
        raise TransferError(f"expected --push USER/NAME, a model repository on the Hub, found {name}")
    return found


def publish(
    folder: Path,
    repository: str,
    *,
    private: bool = True,
    overwrite: bool = False,
    retry: Retry | None = None,
    progress: Progress | None = None,
) -> str:
    """Make a folder's files the content of a model repository, which is created if it is not there; returns the commit.

    Args:
        folder: a finished export.
        repository: ``USER/NAME``.
        private: of a repository that is created; one that is there stays as visible as it is.
        overwrite: replace what lies there; earlier commits stay.
        retry: how patient to be.
        progress: told of bytes.

    Raises:
        TransferError: the Hub cannot be reached or refuses, or the repository holds something else.
    """
    repository, meter = checked_repository(repository), Meter(progress)
    return persist(
        f"hf://{repository}",
        lambda: _once(folder, repository, private=private, overwrite=overwrite, meter=meter),
        retry=retry or Retry(),
    )


def _once(folder: Path, repository: str, *, private: bool, overwrite: bool, meter: Meter) -> str:
    """Every step looks at what is there, so after a failure the whole is simply done again: nothing is uploaded twice."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    hub = HfApi()
    hub.create_repo(repository, private=private, exist_ok=True)
    state = hub.model_info(repository, revision=_BRANCH)
    there = {sibling.rfilename for sibling in state.siblings or []}
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    foreign = sorted(there - _HUB_OWN - files.keys())
    if not overwrite and (foreign or (there - _HUB_OWN and "export.json" not in there)):
        held = ", ".join((foreign or sorted(there - _HUB_OWN))[:4])
        raise TransferError(
            f"hf://{repository} holds something else ({held}); take another repository, or replace it with --overwrite"
        )
    additions = [CommitOperationAdd(name, str(path)) for name, path in files.items()]
    meter.begin("push", sum(a.upload_info.size for a in additions))
    try:
        for addition in additions:
            hub.preupload_lfs_files(repository, [addition], revision=_BRANCH, free_memory=False)
            meter.add(addition.upload_info.size)
    finally:
        meter.end()
    commit = hub.create_commit(
        repository,
        [*additions, *(CommitOperationDelete(name) for name in foreign)],
        commit_message=f"Export: {', '.join(sorted(p.name for p in folder.iterdir() if p.is_dir())) or 'one form'}",
        revision=_BRANCH,
        parent_commit=state.sha,
    )
    return str(commit.oid)
