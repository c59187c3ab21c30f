"""A cache being made: plan first, shards as their own commit records, manifest last.

No locks and no clocks: any process may make any shard of the plan, at any time, again. What is not
yet there is found by looking; what is there is decoded and checked before it is counted.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from kdcache.cache import layout
from kdcache.cache.card import data_card
from kdcache.cache.codec import ShardContent, encode
from kdcache.cache.manifest import Manifest, Plan, ShardEntry
from kdcache.cache.reader import decode_shard, missing_shards, read_plan, read_vocabulary, shard_path
from kdcache.cache.shard import compress, frame_size, pack, read_file, write_file
from kdcache.cache.statistics import RowStatistics, summarise
from kdcache.cache.strict_json import canonical
from kdcache.errors import CacheError, CorruptCacheError, PlanMismatchError, StorageError


@dataclass(frozen=True)
class _Committed:
    entry: ShardEntry
    statistics: RowStatistics


class CacheWriter:
    """Writes the shards of one plan into one directory.

    Args:
        directory: created if absent; otherwise empty, or holding the same plan.
        plan: what the cache will hold.
        vocabulary: token strings by id, as the plan's tokenizer fingerprint was taken of.

    Raises:
        PlanMismatchError: the directory belongs to another plan; every differing field is named.
        CacheError: the directory holds something that is not a cache.
        StorageError: it cannot be written.
    """

    def __init__(self, directory: str | Path, plan: Plan, vocabulary: list[str | None]) -> None:
        self.directory = Path(directory)
        self.plan = plan
        self._digest = plan.digest
        self._committed: dict[int, _Committed] = {}
        if refuse_occupied(self.directory):
            refuse_other_plan(self.directory, plan)
        try:
            (self.directory / layout.SHARD_DIRECTORY).mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise StorageError(f"cannot make the cache directory {self.directory}: {exc.strerror}") from exc
        if not (self.directory / layout.PLAN_FILE).exists():
            write_file(self.directory / layout.PLAN_FILE, plan.to_bytes())
        try:
            read_vocabulary(self.directory, plan)
        except CorruptCacheError:
            write_file(self.directory / layout.VOCABULARY_FILE, compress(canonical(vocabulary)))
            read_vocabulary(self.directory, plan)

    @property
    def complete(self) -> bool:
        """Whether the manifest exists and every shard has a file."""
        return (self.directory / layout.MANIFEST_FILE).exists() and not missing_shards(self.directory, self.plan)

    def survey(self) -> tuple[list[int], list[str]]:
        """Check what is committed. Returns the shards still to make, and what was wrong with broken ones."""
        todo, complaints = [], []
        for index in range(len(self.plan.shards)):
            path = shard_path(self.directory, index)
            if not path.exists():
                todo.append(index)
                continue
            try:
                data = read_file(path, limit=layout.SHARD_LIMIT)
                content, record = decode_shard(path, data, self.plan, index)
            except CorruptCacheError as exc:
                complaints.append(str(exc))
                todo.append(index)
                continue
            self._remember(index, data, content, record.content_sha256)
        return todo, complaints

    def commit(self, index: int, content: ShardContent) -> int:
        """Check, encode and durably write shard ``index``; returns the file's size in bytes.

        Raises:
            CorruptCacheError: the content breaks an invariant of the format.
            CacheError: the shard is there with other content.
            StorageError: the disk refused; nothing under a final name has changed.
        """
        data = pack(encode(content, values=self.plan.selection.values), plan_digest=self._digest, index=index)
        path = shard_path(self.directory, index)
        # What was just packed is read back as a stranger would, so that no shard is ever committed
        # that a reader refuses.
        checked, record = decode_shard(path, data, self.plan, index)
        self._refuse_other_content(index, path, record.content_sha256)
        write_file(path, data)
        self._remember(index, data, checked, record.content_sha256)
        return len(data)

    def finalise(self) -> Manifest:
        """Write data card and manifest, and clear away temporary files of killed runs. Idempotent.

        Raises:
            CacheError: shards are missing or broken.
        """
        if len(self._committed) < len(self.plan.shards):
            todo, complaints = self.survey()
            if todo:
                raise CacheError(f"{len(todo)} shards are missing or broken: {(complaints or todo)[:3]}")
        entries = [self._committed[i] for i in range(len(self.plan.shards))]
        summaries = tuple(
            summarise(
                split, [e.statistics for e, s in zip(entries, self.plan.shards, strict=True) if s.split == number]
            )
            for number, split in enumerate(self.plan.data.splits)
        )
        manifest = Manifest(
            format=layout.FORMAT,
            version=layout.VERSION,
            plan_digest=self._digest,
            splits=summaries,
            shards=tuple(e.entry for e in entries),
        )
        card = self.directory / layout.CARD_FILE
        if not card.exists():  # people add licence and notes to it
            write_file(card, data_card(self.plan, manifest).encode())
        write_file(self.directory / layout.MANIFEST_FILE, manifest.to_bytes())
        for folder in (self.directory, self.directory / layout.SHARD_DIRECTORY):
            for debris in folder.glob(f"{layout.TEMPORARY_PREFIX}*"):
                debris.unlink(missing_ok=True)
        return manifest

    def _refuse_other_content(self, index: int, path: Path, content_sha256: str) -> None:
        """Another process may have made the shard meanwhile: the same content is fine, another one is not."""
        if not path.exists():
            return
        try:
            _, existing = decode_shard(path, read_file(path, limit=layout.SHARD_LIMIT), self.plan, index)
        except CorruptCacheError:
            return
        if existing.content_sha256 != content_sha256:
            raise CacheError(
                f"{path} was made by another process with other content (another GPU or library version?); let one "
                "machine make this cache, or remove the shard and run again"
            )

    def _remember(self, index: int, data: bytes, content: ShardContent, content_sha256: str) -> None:
        entry = ShardEntry(
            sha256=hashlib.sha256(data).hexdigest(),
            content_sha256=content_sha256,
            bytes=len(data),
            raw_bytes=frame_size(data),
            entries=content.rows.entries,
        )
        self._committed[index] = _Committed(entry, RowStatistics.of(content.rows))


def refuse_other_plan(directory: Path, plan: Plan) -> None:
    """A directory belongs to one plan.

    Raises:
        PlanMismatchError: it has another one; every differing field is named.
    """
    existing = read_plan(directory)
    if existing == plan:
        return
    differing = plan.differences(existing)
    shown = "; ".join(differing[:6]) + (f"; and {len(differing) - 6} more" if len(differing) > 6 else "")
    raise PlanMismatchError(
        f"{directory} was made from another plan. Now asked for, against what is there: {shown}. "
        "Give the recipe key cache another directory, or put the recipe back"
    )


def refuse_occupied(directory: Path) -> bool:
    """Whether the directory has a plan already.

    Raises:
        CacheError: it holds something else.
        StorageError: it cannot be read.
    """
    if not directory.exists():
        return False
    try:
        found = {p.name for p in directory.iterdir() if not p.name.startswith(layout.TEMPORARY_PREFIX)}
        shards = directory / layout.SHARD_DIRECTORY
        empty = not found - {layout.SHARD_DIRECTORY} and not (shards.exists() and any(shards.iterdir()))
    except OSError as exc:
        raise StorageError(f"cannot read the cache directory {directory}: {exc.strerror}") from exc
    if layout.PLAN_FILE in found:
        return True
    if not empty:
        raise CacheError(
            f"{directory} is neither empty nor a cache (it holds {', '.join(sorted(found)[:4])}); "
            "give the recipe key cache another directory"
        )
    return False
