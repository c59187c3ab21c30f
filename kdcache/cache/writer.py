"""A cache being made: plan first, shards as their own commit records, manifest last.

No locks: any process may make any shard of the plan, at any time, again. What is not yet there is found
by looking; what is there is decoded and checked before it is counted, once per process and file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from kdcache.cache import layout
from kdcache.cache.card import data_card
from kdcache.cache.codec import ShardContent, encode
from kdcache.cache.files import (
    FileState,
    create_file,
    file_state,
    make_directory,
    remove_left_over,
    sync_directory,
    write_file,
)
from kdcache.cache.manifest import Manifest, Plan, ShardEntry, parse_manifest
from kdcache.cache.reader import decode_shard, missing_shards, read_plan, read_vocabulary, shard_path
from kdcache.cache.shard import ShardRecord, compress, frame_size, pack, read_file, read_stated, unpacked_limit
from kdcache.cache.statistics import RowStatistics, SplitTotals, same_totals
from kdcache.cache.strict_json import canonical
from kdcache.errors import CacheError, CorruptCacheError, PlanMismatchError, StorageError


@dataclass(frozen=True)
class _Committed:
    state: FileState
    entry: ShardEntry
    statistics: RowStatistics


class CacheWriter:
    """Writes the shards of one plan into one directory, beside any number of other processes that do the same.

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
        self._folders = (self.directory, self.directory / layout.SHARD_DIRECTORY)
        if refuse_occupied(self.directory):
            refuse_other_plan(self.directory, plan)
        make_directory(self.directory / layout.SHARD_DIRECTORY)
        path = self.directory / layout.PLAN_FILE
        if not path.exists() and create_file(path, plan.to_bytes()) is None:
            refuse_other_plan(self.directory, plan)
        self._clear()
        try:
            read_vocabulary(self.directory, plan)
        except CorruptCacheError:
            write_file(self.directory / layout.VOCABULARY_FILE, compress(canonical(vocabulary)))
            read_vocabulary(self.directory, plan)

    @property
    def complete(self) -> bool:
        """Whether the manifest exists and every shard has a file."""
        return (self.directory / layout.MANIFEST_FILE).exists() and not missing_shards(self.directory, self.plan)

    def survey(self, indices: Iterable[int] | None = None) -> tuple[list[int], list[str]]:
        """Check what is committed, of all shards or some. Returns those still to make, and what is wrong with broken ones.

        Raises:
            StorageError: a file cannot be read.
        """
        todo, complaints = [], []
        for index in range(len(self.plan.shards)) if indices is None else indices:
            if self._state(index) is None:
                todo.append(index)
                continue
            try:
                self._examine(index)
            except CorruptCacheError as exc:
                complaints.append(str(exc))
                todo.append(index)
        return todo, complaints

    def unfinished(self) -> list[int]:
        """Shards that are missing, or, where none is, broken. Files that this process has not read yet are read.

        Whoever commits first and looks then can be sure that one of all the processes finds nothing missing.
        """
        missing = [i for i in range(len(self.plan.shards)) if self._state(i) is None]
        return missing or self.survey(self._unread())[0]

    def commit(self, index: int, content: ShardContent) -> int:
        """Check, encode and durably write shard ``index``; returns the file's size in bytes.

        A good shard that is there already stays as it is.

        Raises:
            CorruptCacheError: the content breaks an invariant of the format.
            CacheError: the shard is there with other content.
            StorageError: the disk refused; nothing under a final name has changed.
        """
        data = pack(encode(content, values=self.plan.selection.values), plan_digest=self._digest, index=index)
        path = shard_path(self.directory, index)
        raw, limit = frame_size(data), min(layout.SHARD_LIMIT, unpacked_limit(data))
        if raw > limit:
            raise CacheError(
                f"shard {index} packs {raw:,} bytes into {len(data):,}, and a reader unpacks no more than "
                f"{limit:,} of that; lower the recipe key cache.positions_per_shard, in another directory"
            )
        # What was just packed is read back as a stranger would, so that no shard is ever committed
        # that a reader refuses.
        checked, record = decode_shard(path, data, self.plan, index)
        state = create_file(path, data) if self._state(index) is None else None
        if state is None:
            try:
                existing = self._examine(index)
            except CorruptCacheError:
                state = write_file(path, data)
            else:
                if existing.content_sha256 != record.content_sha256:
                    raise CacheError(
                        f"{path} was made by another process with other content (another GPU or library version?); let "
                        "one machine make this cache, or remove the shard and run again"
                    )
                return self._committed[index].entry.bytes
        self._remember(index, state, data, checked, record)
        return len(data)

    def finalise(self) -> Manifest:
        """Write data card and manifest where they are not there yet, and clear away what killed runs left. Idempotent.

        What the manifest says is of the files as they are now, whoever made them.

        Raises:
            CacheError: shards are missing or broken, or the plan has been replaced.
        """
        todo, complaints = self.survey(self._unread())
        if todo:
            raise CacheError(
                f"{self.directory}: {len(todo)} shards are missing or broken ({(complaints or todo)[:3]}); "
                "run kdcache teacher-cache again"
            )
        refuse_other_plan(self.directory, self.plan)
        entries = [self._committed[i] for i in range(len(self.plan.shards))]
        totals = [SplitTotals(len(self.plan.selection.temperatures)) for _ in self.plan.data.splits]
        for committed, shard in zip(entries, self.plan.shards, strict=True):
            totals[shard.split].add(committed.statistics)
        summaries = tuple(t.summary(split) for t, split in zip(totals, self.plan.data.splits, strict=True))
        manifest = Manifest(
            format=layout.FORMAT,
            version=layout.VERSION,
            plan_digest=self._digest,
            splits=summaries,
            shards=tuple(e.entry for e in entries),
        )
        card = self.directory / layout.CARD_FILE
        if not card.exists():  # people add licence and notes to it
            create_file(card, data_card(self.plan, manifest).encode())
        there = self._manifest()
        if there is not None and _agree(there, manifest):
            manifest = there  # another processor's last digits are no reason to give the cache another id
        else:
            self._sync()
            write_file(self.directory / layout.MANIFEST_FILE, manifest.to_bytes())
        self._clear()
        return manifest

    def settled(self) -> Manifest | None:
        """The manifest that is there, if it agrees with every shard that this process has read and the size of others.

        So of many workers on a complete cache each need only read its own shards.
        """
        manifest = self._manifest()
        if manifest is None:
            return None
        for index, entry in enumerate(manifest.shards):
            known, state = self._committed.get(index), self._state(index)
            if state is None or state[2] != entry.bytes or (known and (known.entry, known.state) != (entry, state)):
                return None
        return manifest

    def _manifest(self) -> Manifest | None:
        """The manifest that is there, belongs to the plan and is spelled as a writer spells it."""
        try:
            data = read_file(self.directory / layout.MANIFEST_FILE, limit=layout.JSON_LIMIT)
            manifest = parse_manifest(data, self.plan)
        except CorruptCacheError:
            return None
        return manifest if manifest.to_bytes() == data else None

    def _sync(self) -> None:
        """What killed processes committed may not be durable yet; the manifest is not to be there before it."""
        try:
            for folder in self._folders:
                sync_directory(folder)
        except OSError as exc:
            raise StorageError(f"cannot write {self.directory}: {exc.strerror or exc}; look after the disk") from exc

    def _clear(self) -> None:
        for folder in self._folders:
            remove_left_over(folder)

    def _state(self, index: int) -> FileState | None:
        try:
            return file_state(shard_path(self.directory, index).stat())
        except OSError:
            return None

    def _unread(self) -> list[int]:
        """Shards that this process has not read, or that have another file since then."""
        return [
            index
            for index in range(len(self.plan.shards))
            if index not in self._committed or self._committed[index].state != self._state(index)
        ]

    def _examine(self, index: int) -> ShardRecord:
        path = shard_path(self.directory, index)
        data, state = read_stated(path, limit=layout.SHARD_LIMIT)
        content, record = decode_shard(path, data, self.plan, index)
        self._remember(index, state, data, content, record)
        return record

    def _remember(self, index: int, state: FileState, data: bytes, content: ShardContent, record: ShardRecord) -> None:
        entry = ShardEntry(
            sha256=hashlib.sha256(data).hexdigest(),
            content_sha256=record.content_sha256,
            bytes=len(data),
            raw_bytes=frame_size(data),
            entries=content.rows.entries,
        )
        self._committed[index] = _Committed(state, entry, RowStatistics.of(content.rows))


def _agree(a: Manifest, b: Manifest) -> bool:
    """The same shards, and the same totals up to another processor's rounding."""
    return a.shards == b.shards and all(same_totals(x, y) for x, y in zip(a.splits, b.splits, strict=True))


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
    try:
        if not directory.exists():
            return False
        found = {p.name for p in directory.iterdir() if not p.name.startswith(layout.TEMPORARY_PREFIX)}
        shards = directory / layout.SHARD_DIRECTORY
        empty = not found - {layout.SHARD_DIRECTORY} and not (shards.exists() and any(shards.iterdir()))
        # Asked last: another process may have begun the cache while this one looked.
        planned = (directory / layout.PLAN_FILE).exists()
    except OSError as exc:
        raise StorageError(f"cannot read the cache directory {directory}: {exc.strerror}") from exc
    if planned:
        return True
    if not empty:
        raise CacheError(
            f"{directory} is neither empty nor a cache (it holds {', '.join(sorted(found)[:4])}); "
            "choose another directory"
        )
    return False
