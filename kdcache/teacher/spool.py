"""Where a teacher's answers wait until their cache is complete: one file a batch, beside the cache.

The directory is ``<cache>.generating/<digest>``, and the digest names all that the answers depend on: teacher, prompts,
settings, batches. So what a killed run has finished is found again, and nothing of another recipe is taken for it. Each
file appears whole or not at all; a batch that two processes make is the first one's for both.

A file is safetensors: ``lengths`` int64 ``[B]``, ``ids`` int64 ``[P]``, ``ended`` uint8 ``[B]``, and ``states`` ``[P, D]`` in the
teacher's own arithmetic (half precision of a teacher in half precision: nothing is rounded) where they are kept. States
are read in place, a few sequences at a time.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from kdcache.cache.codec import sequence_digest
from kdcache.cache.files import create_file, make_directory, remove_left_over
from kdcache.data.tokens import TokenRow
from kdcache.errors import StorageError
from kdcache.teacher.decode import Answers

SUFFIX = ".generating"
_DIGITS = 16
_OPEN_FILES = 64


@dataclass(frozen=True)
class Spool:
    """The finished batches of one generation.

    Attributes:
        directory: where they lie.
        batches: how many prompts each batch has.
        vocab_size: ids lie below.
    """

    directory: Path
    batches: tuple[int, ...]
    vocab_size: int

    @classmethod
    def of(cls, cache: str | Path, digest: str, batches: Sequence[int], vocab_size: int) -> Spool:
        """The spool beside a cache directory; nothing is written yet."""
        cache = Path(cache)
        place = cache.with_name(cache.name + SUFFIX) / digest[:_DIGITS]
        return cls(place, tuple(batches), vocab_size)

    def path(self, index: int) -> Path:
        """The file of a batch."""
        return self.directory / f"{index:05d}.safetensors"

    def missing(self) -> list[int]:
        """Batches that are not there, or cannot be read."""
        return [i for i in range(len(self.batches)) if not self.path(i).exists() or self._read(i) is None]

    def others(self) -> list[Path]:
        """Answers of other recipes for the same cache that were left behind."""
        above = self.directory.parent
        return sorted(p for p in above.iterdir() if p != self.directory) if above.is_dir() else []

    def put(self, index: int, answers: Answers, *, states: bool) -> None:
        """Keep a finished batch, unless another process was first.

        Raises:
            StorageError: the disk refused.
        """
        tensors = {"lengths": answers.lengths, "ids": answers.ids, "ended": answers.ended.to(torch.uint8)}
        if states:
            tensors["states"] = answers.states.contiguous()
        make_directory(self.directory)
        path, data = self.path(index), safetensors.torch.save(tensors)
        if create_file(path, data) is None and self._read(index) is None:
            # What is there cannot be read: it is not a batch.
            with suppress(OSError):
                path.unlink()
            create_file(path, data)

    def get(self, index: int) -> Answers:
        """A finished batch, without its states.

        Raises:
            StorageError: it is not there any more, or damaged.
        """
        found = self._read(index)
        if found is None:
            raise StorageError(
                f"the answers in {self.path(index)} cannot be read any more; run kdcache teacher-cache again, which makes them "
                "again where they are needed"
            )
        return found

    def remove(self) -> None:
        """Take the answers away; what cannot be removed stays and does no harm."""
        _opened.cache_clear()
        shutil.rmtree(self.directory, ignore_errors=True)
        with suppress(OSError):
            remove_left_over(self.directory.parent)
            self.directory.parent.rmdir()

    def _read(self, index: int) -> Answers | None:
        try:
            with safetensors.safe_open(self.path(index), framework="pt") as file:
                lengths, ids, ended = (file.get_tensor(name) for name in ("lengths", "ids", "ended"))
                rows = file.get_slice("states").get_shape()[0] if "states" in file.keys() else len(ids)  # noqa: SIM118
        except (OSError, safetensors.SafetensorError):
            return None
        count = self.batches[index]
        sound = (
            (len(lengths), len(ended)) == (count, count)
            and int(lengths.min()) >= 1
            and int(lengths.sum()) == len(ids) == rows
            and 0 <= int(ids.min()) <= int(ids.max()) < self.vocab_size
        )
        return Answers(lengths, ids, torch.zeros(0), ended.bool()) if sound else None


@dataclass(frozen=True)
class SpooledStates:
    """States of generated rows by the rows' own digests, as `TeacherForward` takes them.

    Attributes:
        places: for each row its file, and the first and last but one of its states there.
    """

    places: Mapping[bytes, tuple[Path, int, int]]

    def __call__(self, rows: Sequence[TokenRow]) -> torch.Tensor | None:
        """States ``[P, D]`` of all targets of ``rows``; None where one of the rows is not among these.

        Raises:
            StorageError: a file is gone or damaged.
        """
        found = [self.places.get(sequence_digest(row.ids, row.targets)) for row in rows]
        if any(place is None for place in found):
            return None
        parts = []
        for path, start, stop in (place for place in found if place is not None):
            try:
                parts.append(_opened(path).get_slice("states")[start:stop])
            except (OSError, safetensors.SafetensorError) as exc:
                raise StorageError(
                    f"the states in {path} cannot be read any more ({exc}); run kdcache teacher-cache again, which makes them "
                    "again where they are needed"
                ) from exc
        return torch.cat(parts)


@lru_cache(maxsize=_OPEN_FILES)
def _opened(path: Path) -> Any:
    """A file of states, mapped into memory."""
    return safetensors.safe_open(path, framework="pt")
