"""Somebody's data set as rows by split: Parquet files, a data set that ``datasets`` saved to disk, or JSON Lines.

A file's split is said by the word that its name begins with (``train.parquet``, ``validation-00000-of-00002.parquet``; val, valid, dev
and eval count as validation); every other name counts as ``train``, and what became of each is told. Rows come one after the
other, with a name by which an error can point at them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from kdcache.cache.strict_json import parse
from kdcache.errors import CorruptCacheError, DataError
from kdcache.exchange.columns import Shape, known_columns, python_rows, refuse_bombs

_Row = tuple[str, Mapping[str, Any]]
_SPLITS = ("train", "validation", "test")
_OTHER_NAMES = {"val": "validation", "valid": "validation", "dev": "validation", "eval": "validation"}
# As plans have it.
_SPLIT_NAME = re.compile(r"[a-z][a-z0-9_-]{0,31}")
_SPLITS_LIMIT = 16
_BATCH = 16
_LINE = 256 << 20
# Commas and brackets of a line: 32,768 tokens with 256 entries each.
_LINE_VALUES = 1 << 24


@dataclass(frozen=True)
class Rows:
    """A split: ``read`` gives its rows from the start, as often as it is called; there are ``count`` of them, of these ``sources``."""

    read: Callable[[], Iterator[_Row]]
    count: int
    sources: tuple[str, ...]


def rows_by_split(source: Path, shapes: Mapping[str, Shape]) -> dict[str, Rows]:
    """Splits of a Parquet file, a folder of them, or a data set saved to disk; each call of a value reads from the start.

    Raises:
        DataError: nothing of the kind is there, or splits that no cache can have.
    """
    if (source / "dataset_dict.json").exists() or (source / "state.json").exists():
        return _saved(source, shapes)
    files = [source] if source.is_file() else sorted(source.glob("*.parquet"))
    if not files or any(f.suffix != ".parquet" for f in files):
        raise DataError(f"{source} is no Parquet file, no folder of them, and no data set saved to disk")
    return _grouped(files, partial(_parquet, shapes=shapes), _parquet_rows)


def lines_by_split(source: Path) -> dict[str, Rows]:
    """Splits of a JSON Lines file or a folder of them.

    Raises:
        DataError: nothing of the kind is there.
    """
    files = [source] if source.is_file() else sorted(source.glob("*.jsonl"))
    if not files:
        raise DataError(f"{source} is no JSON Lines file and no folder of them (*.jsonl)")
    return _grouped(files, lines, _count_lines)


def _grouped(
    files: list[Path], read: Callable[[Path], Iterator[_Row]], count: Callable[[Path], int]
) -> dict[str, Rows]:
    groups: dict[str, list[Path]] = {}
    for path in files:
        stem = re.split(r"[^a-z]", path.stem.lower(), maxsplit=1)[0]
        stem = _OTHER_NAMES.get(stem, stem)
        groups.setdefault(stem if stem in _SPLITS else "train", []).append(path)

    def rows(paths: list[Path]) -> Iterator[_Row]:
        for path in paths:
            yield from read(path)

    return {
        name: Rows(
            partial(rows, groups[name]), sum(count(p) for p in groups[name]), tuple(p.name for p in groups[name])
        )
        for name in _SPLITS
        if name in groups
    }


def _parquet_rows(path: Path) -> int:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        return int(pyarrow.parquet.read_metadata(path).num_rows)
    except (OSError, pyarrow.ArrowException) as exc:
        raise DataError(f"{path} cannot be read as Parquet: {' '.join(str(exc).split())[:160]}") from exc


def _count_lines(path: Path) -> int:
    try:
        with path.open("rb") as file:
            return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
    except OSError as exc:
        raise DataError(f"{path} cannot be read: {exc.strerror or exc}") from exc


def _parquet(path: Path, shapes: Mapping[str, Shape]) -> Iterator[_Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            known = known_columns(path.name, file.schema_arrow, shapes)
            refuse_bombs(path.name, file.metadata, known)
            number = 0
            for batch in file.iter_batches(batch_size=_BATCH, columns=known):
                yield from python_rows(path.name, number, batch)
                number += batch.num_rows
    except (OSError, pyarrow.ArrowException) as exc:
        raise DataError(f"{path} cannot be read as Parquet: {' '.join(str(exc).split())[:160]}") from exc


def _saved(source: Path, shapes: Mapping[str, Shape]) -> dict[str, Rows]:
    import datasets

    try:
        found = datasets.load_from_disk(str(source))
    except Exception as exc:
        raise DataError(f"{source} cannot be read as a saved data set: {' '.join(str(exc).split())[:160]}") from exc
    parts = dict(found) if isinstance(found, datasets.DatasetDict) else {"train": found}
    named: dict[str, Rows] = {}
    for given, part in parts.items():
        own = _OTHER_NAMES.get(str(given), str(given))
        if not _SPLIT_NAME.fullmatch(own) or own in named or len(named) == _SPLITS_LIMIT:
            raise DataError(
                f"{source} has a split {str(given)[:80]!r}; expected {_SPLITS_LIMIT} at most, each with a name of its own of small letters, "
                f"digits, _ and - ({', '.join(_OTHER_NAMES)} count as validation)"
            )
        known = known_columns(own, part.data.schema, shapes)
        named[own] = Rows(partial(_numbered, own, part.select_columns(known)), len(part), (str(given),))
    return named


def _numbered(name: str, dataset: Any) -> Iterator[_Row]:
    arrow = dataset.with_format("arrow")
    for start in range(0, len(dataset), _BATCH):
        number = start
        for batch in arrow[start : start + _BATCH].to_batches():
            yield from python_rows(name, number, batch)
            number += batch.num_rows


def lines(path: Path) -> Iterator[_Row]:
    """Objects of a JSON Lines file.

    Raises:
        DataError: it cannot be read, or a line is something else.
    """
    number = 0
    try:
        with path.open("rb") as file:
            while line := file.readline(_LINE):
                number += 1
                where = f"{path.name} line {number}"
                if len(line) == _LINE:
                    raise DataError(f"{where} is longer than {_LINE:,} bytes")
                if not line.strip():
                    continue
                try:
                    row = parse(_ascii(line), what=where, limit=_LINE, values=_LINE_VALUES)
                except UnicodeDecodeError as exc:
                    raise DataError(f"{where} is not acceptable JSON: it is no UTF-8") from exc
                except CorruptCacheError as exc:
                    raise DataError(str(exc)) from exc
                if not isinstance(row, dict):
                    raise DataError(f"{where}: expected one JSON object per sequence")
                yield where, row
    except OSError as exc:
        raise DataError(f"{path} cannot be read: {exc.strerror or exc}") from exc


def _ascii(line: bytes) -> bytes:
    """The same JSON with the letters beyond ASCII, which texts beside the numbers may have, as escapes."""
    if line.isascii():
        return line
    text = line.decode("utf-8")
    return re.sub(r"[^\x00-\x7f]", lambda found: json.dumps(found.group())[1:-1], text).encode("ascii")
