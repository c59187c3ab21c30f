"""A cache opened for reading: splits of sequences, decoded shard by shard.

A shard is verified when it is first opened: size and SHA-256 of its file, then its frame, header,
commit record, values and sequence digests. As long as the file stays the one it was (device, inode, size, time of
modification), it is only decoded when it is opened again. Memory is bounded by ``keep`` decoded shards, those read ahead by a
second thread among them.
"""

from __future__ import annotations

import hashlib
import os
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from kdcache.cache import layout
from kdcache.cache.codec import CachedSequence, ShardContent
from kdcache.cache.directory import decode_shard, missing_shards, read_plan, read_vocabulary, shard_path
from kdcache.cache.files import FileState
from kdcache.cache.manifest import Manifest, Plan, SplitSummary, parse_manifest
from kdcache.cache.shard import frame_size, read_file, read_stated
from kdcache.errors import CacheError, CorruptCacheError, IncompleteCacheError

if TYPE_CHECKING:
    from kdcache.views import TorchView

__all__ = [
    "Cache",
    "Split",
    "decode_shard",
    "missing_shards",
    "open_cache",
    "read_plan",
    "read_vocabulary",
    "shard_path",
]

_NAMED = 8


class Cache(Mapping[str, "Split"]):
    """A complete cache directory, as a mapping of split names to splits: ``cache["train"][0]``. Use `open_cache`."""

    def __init__(self, directory: Path, plan: Plan, manifest: Manifest, cache_id: str, keep: int) -> None:
        self.directory = directory
        self.plan = plan
        self.manifest = manifest
        self.id = cache_id
        self._keep = keep
        self._verified: dict[int, FileState] = {}
        # Brings a damaged shard again, where somebody can; asked once for each shard.
        self.mend: Callable[[int], None] | None = None
        self._mended: set[int] = set()
        self._start_empty()

    def _start_empty(self) -> None:
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._decoded: OrderedDict[int, ShardContent] = OrderedDict()
        self._ahead: dict[int, Future[ShardContent]] = {}
        self._reader: ThreadPoolExecutor | None = None

    def __getstate__(self) -> dict[str, object]:
        """Without what belongs to this process: decoded shards and the reading thread."""
        left_here = ("_process", "_lock", "_decoded", "_ahead", "_reader")
        return {k: v for k, v in self.__dict__.items() if k not in left_here}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._start_empty()

    @property
    def temperatures(self) -> tuple[float, ...]:
        """Temperatures whose log-partition is stored exactly."""
        return self.plan.selection.temperatures

    @property
    def vocab_size(self) -> int:
        """Vocabulary columns that the distributions range over."""
        return self.plan.tokenizer.vocab_size

    @property
    def splits(self) -> dict[str, Split]:
        """The named splits, in the plan's order."""
        return {s.name: self.split(s.name) for s in self.plan.data.splits}

    # A cache is itself and no other, and not the sum of its splits.
    __hash__ = object.__hash__
    __eq__ = object.__eq__

    def __repr__(self) -> str:
        return f"<Cache {self.id[:12]} at {self.directory}: {', '.join(map(repr, self.splits.values()))}>"

    def __len__(self) -> int:
        return len(self.plan.data.splits)

    def __iter__(self) -> Iterator[str]:
        return (s.name for s in self.plan.data.splits)

    def __getitem__(self, name: str) -> Split:
        if self.plan.split_index(name) is None:
            raise KeyError(f"{name!r}, the splits are {', '.join(self)}")
        return self.split(name)

    def split(self, name: str) -> Split:
        """One named split.

        Raises:
            CacheError: there is no such split.
        """
        number = self.plan.split_index(name)
        if number is None:
            raise CacheError(f"the cache {self.directory} has no split {name!r}, only {', '.join(self.splits)}")
        return Split(self, number)

    def shard(self, index: int) -> ShardContent:
        """Decoded shard ``index``, from memory or verified from disk.

        Raises:
            CorruptCacheError: the shard is not what plan and manifest promise.
        """
        if self._process != os.getpid():  # a fork has no threads, and its lock may be held for ever
            self._start_empty()
        with self._lock:
            if index in self._decoded:
                self._decoded.move_to_end(index)
                return self._decoded[index]
            waiting = self._ahead.pop(index, None)
        content = self.load(index) if waiting is None or waiting.cancelled() else waiting.result()
        with self._lock:
            self._decoded[index] = content
            while len(self._decoded) > max(1, self._keep - len(self._ahead)):
                self._decoded.popitem(last=False)
        return content

    def read_ahead(self, indices: Sequence[int]) -> None:
        """Decode these shards in a second thread, and no longer others; an error is raised where `shard` asks for it."""
        if self._process != os.getpid():
            self._start_empty()
        with self._lock:
            for index in set(self._ahead) - set(indices):
                self._ahead.pop(index).cancel()
            room = self._keep - 1 - len(self._ahead)
            wanted = [i for i in indices if i not in self._decoded and i not in self._ahead]
            if wanted and self._reader is None:
                self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="shard-reader")
            for index in wanted[: max(0, room)]:
                assert self._reader is not None
                self._ahead[index] = self._reader.submit(self.load, index)

    def look_over(self) -> None:
        """Load every shard whose file has another size than the manifest states: damage that costs nothing to see is told
        before hours of work, and not in the middle of them.

        Raises:
            CorruptCacheError: such a shard is damaged indeed.
        """
        for index, entry in enumerate(self.manifest.shards):
            if shard_path(self.directory, index).stat().st_size != entry.bytes:
                self.load(index)

    def load(self, index: int) -> ShardContent:
        """Shard ``index`` from disk, verified unless its file is the one that was verified before; not remembered.

        Raises:
            CorruptCacheError: the shard is not what plan and manifest promise.
        """
        try:
            return self._load(index)
        except CorruptCacheError:
            if self.mend is None or index in self._mended:
                raise
            self._mended.add(index)
            self.mend(index)
            return self._load(index)

    def _load(self, index: int) -> ShardContent:
        entry = self.manifest.shards[index]
        path = shard_path(self.directory, index)
        data, state = read_stated(path, limit=layout.SHARD_LIMIT)
        verified = self._verified.get(index) == state
        if not verified and not entry.promises(data):
            raise CorruptCacheError(
                f"{path} is damaged: the manifest promises {entry.bytes} bytes with SHA-256 {entry.sha256[:12]}…, "
                f"found {len(data)} bytes with another hash; kdcache repair makes or fetches this shard again"
            )
        content, record = decode_shard(path, data, self.plan, index, limit=entry.raw_bytes, verified=verified)
        stated = (entry.content_sha256, entry.raw_bytes, entry.entries)
        if stated != (record.content_sha256, frame_size(data), content.rows.entries):
            raise CorruptCacheError(f"{path} has another content hash, size or entry count than the manifest states")
        self._verified[index] = state
        return content

    def vocabulary(self) -> list[str | None]:
        """Token strings by id, as the tokenizer spells them; None where no token has the id.

        Raises:
            CorruptCacheError: the vocabulary file is not the one the plan names.
        """
        return read_vocabulary(self.directory, self.plan)


class Split:
    """Sequences of one split: sized, indexable, iterable; item ``i`` is a `CachedSequence`, a slice a list of them."""

    def __init__(self, cache: Cache, number: int) -> None:
        self.cache = cache
        self.number = number
        self.name = cache.plan.data.splits[number].name
        self.shards = [i for i, s in enumerate(cache.plan.shards) if s.split == number]
        sizes = [cache.plan.shards[i].sequences for i in self.shards]
        self.starts = [0, *accumulate(sizes)]
        self.summary: SplitSummary = cache.manifest.splits[number]

    def __repr__(self) -> str:
        return f"<Split {self.name}: {len(self):,} sequences, {self.summary.positions:,} positions>"

    def __len__(self) -> int:
        return self.starts[-1]

    @overload
    def __getitem__(self, index: int) -> CachedSequence: ...
    @overload
    def __getitem__(self, index: slice) -> list[CachedSequence]: ...
    def __getitem__(self, index: int | slice) -> CachedSequence | list[CachedSequence]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"sequence {index} of split {self.name}, which has {len(self)}")
        index %= len(self)
        place = bisect_right(self.starts, index) - 1
        return self.cache.shard(self.shards[place])[index - self.starts[place]]

    def __iter__(self) -> Iterator[CachedSequence]:
        for place, index in enumerate(self.shards):
            self.read_ahead([place + 1] if place + 1 < len(self.shards) else [])
            content = self.cache.shard(index)
            yield from (content[i] for i in range(len(content)))

    def to_torch(self, *, temperature: float | None = None, **options: Any) -> TorchView:
        """The split as a torch data set: `kdcache.views.to_torch`."""
        from kdcache.views import to_torch

        return to_torch(self, temperature=temperature, **options)

    def to_datasets(self, *, temperature: float | None = None, **options: Any) -> Any:
        """The split as a `datasets.Dataset`: `kdcache.views.to_datasets`."""
        from kdcache.views import to_datasets

        return to_datasets(self, temperature=temperature, **options)

    def read_ahead(self, places: Sequence[int]) -> None:
        """Decode the split's shards at these places (0 is its first) in a second thread, for who comes to them next."""
        self.cache.read_ahead([self.shards[p] for p in places])


def open_cache(directory: str | Path, *, keep: int = 8) -> Cache:
    """Open a complete cache directory; at most ``keep`` decoded shards stay in memory.

    Raises:
        IncompleteCacheError: no manifest or missing shards, all named.
        CorruptCacheError: plan or manifest are not what they should be.
        CacheError: not a cache directory.
    """
    directory = Path(directory)
    plan = read_plan(directory)
    missing = missing_shards(directory, plan)
    manifest_path = directory / layout.MANIFEST_FILE
    if missing or not manifest_path.exists():
        named = ", ".join(layout.shard_name(i) for i in missing[:_NAMED])
        more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
        what = f"{len(missing)} of {len(plan.shards)} shards are missing: {named}{more}" if missing else "no manifest"
        raise IncompleteCacheError(
            f"the cache {directory} is incomplete ({what}); the command that makes or brings it goes on where it stopped, and "
            "kdcache repair mends what was lost"
        )
    data = read_file(manifest_path, limit=layout.JSON_LIMIT)
    manifest = parse_manifest(data, plan)
    return Cache(directory, plan, manifest, hashlib.sha256(data).hexdigest(), keep)
