"""``kdcache import-cache``: data that another tool made become an ordinary cache, which trains as every cache does.

The source is read twice: once to check every row and to fix the plan, once to write the shards. What the data do not say is
guessed, told and written into the cache's card. A second call goes on where the first was stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from kdcache.cache import layout
from kdcache.cache.codec import CachedSequence, sequence_digest
from kdcache.cache.derive import DerivedCache, write_derived
from kdcache.cache.files import write_file
from kdcache.cache.rows import RowDesign
from kdcache.errors import DataError
from kdcache.exchange import axolotl, distillkit, jsonl
from kdcache.exchange.contents import Contents
from kdcache.exchange.imported_plan import (
    Given,
    Split,
    identity_notes,
    imported_plan,
    pad_of,
    rows_digest,
    selection_of,
)
from kdcache.exchange.plain import PlainSequence
from kdcache.exchange.settle import Tally, settled
from kdcache.exchange.tables import Rows, lines_by_split, rows_by_split
from kdcache.exchange.whole import import_whole
from kdcache.inspection import harmless
from kdcache.markdown import escaped
from kdcache.progress import Progress, Silent
from kdcache.token_maps import load_tokenizer, token_map

Kind = Literal["axolotl", "distillkit", "jsonl"]
_Reader = Callable[[Iterator[tuple[str, Mapping[str, Any]]]], Iterator[tuple[str, PlainSequence]]]
KINDS: tuple[Kind, ...] = ("axolotl", "distillkit", "jsonl")
_HEADING = "## Imported"
_BEFORE = "## How to load it"
_NAMED = 4


@dataclass(frozen=True)
class Imported:
    """The cache, and what was guessed or lost on the way."""

    cache: DerivedCache
    notes: list[str]


def import_cache(
    source: Path, destination: Path, kind: Kind, given: Given, progress: Progress | None = None
) -> Imported:
    """Make a cache from another tool's data.

    Args:
        source: file or folder.
        destination: created if absent; otherwise empty, or holding the cache that is being made.
        kind: whose data they are.
        given: what they do not say.
        progress: told about long work.

    Raises:
        DataError: data of another kind, or broken; the first bad row is named.
        TokenizerError: the tokenizer is missing.
        PlanMismatchError: the destination holds another cache.
        StorageError: it cannot be written.
    """
    progress = progress or Silent()
    if not source.exists():
        raise DataError(f"{source} is not there")
    if source.resolve() == destination.resolve():
        raise DataError(f"{destination} is what is to be imported; give another directory for the cache")
    if kind == "jsonl" and source.is_dir() and (source / jsonl.PLAN).exists():
        cache, notes = import_whole(source, destination, given, progress)
        if notes:
            _note(destination, notes, "From JSON Lines with a plan.")
        return Imported(cache, notes)
    # What the files are is said before what is missing beside them.
    tables, reader_for, approximated = _tables(source, kind)
    if given.tokenizer is None:
        raise DataError("data of other tools name tokens by number alone; say with --tokenizer whose numbers they are")
    tokenizer = load_tokenizer(given.tokenizer)
    tokens = token_map(tokenizer)
    reader = reader_for(pad_of(tokenizer))
    selection = selection_of(given.temperature, k=65_535)
    design, tally = selection.design(len(tokens), thinned=False), Tally()
    found = [
        _examined(name, rows, reader, design, approximated=approximated, tally=tally, progress=progress)
        for name, rows in tables.items()
    ]
    found = _held_out(found, given.holdout, progress)
    if not tally.rows or any(not split.sizes for split in found):
        raise DataError(f"{source} holds a split without a single row to learn from")
    plan = imported_plan(kind, given, found, tokens.tokens, tokenizer, tally)
    cache = write_derived(destination, plan, tokens.tokens, Contents(plan, found).content, progress)
    notes = [*_read_as(tables), *tally.lines(given.temperature), *identity_notes(given)]
    _note(destination, notes, f"From data in the format of {kind}. What they did not say:")
    return Imported(cache, notes)


def _read_as(tables: Mapping[str, Rows]) -> list[str]:
    """Which file became which split."""
    notes = []
    for name, rows in tables.items():
        more = f" and {len(rows.sources) - _NAMED} more" if len(rows.sources) > _NAMED else ""
        notes.append(f"split {name}: {', '.join(harmless(s) for s in rows.sources[:_NAMED])}{more}")
    return notes


def _tables(source: Path, kind: Kind) -> tuple[dict[str, Rows], Callable[[int], _Reader], bool]:
    """The rows of every split, what makes sequences of them given the padding's id, and whether their probabilities are
    approximations."""
    if kind == "jsonl":
        return lines_by_split(source), lambda pad_id: jsonl.read_plain, False
    if kind == "axolotl":
        return rows_by_split(source, axolotl.SHAPES), lambda pad_id: axolotl.read, False
    path = (source if source.is_dir() else source.parent) / distillkit.SETTINGS
    try:
        settings = distillkit.parse_settings(path.read_bytes(), str(path))
    except OSError as exc:
        raise DataError(
            f"{path} cannot be read: {exc.strerror}; DistillKit's rows cannot be unpacked without it"
        ) from exc
    tables = rows_by_split(source, distillkit.SHAPES)
    unpacked = partial(distillkit.read, settings=settings)
    return tables, lambda pad_id: partial(unpacked, pad_id=pad_id), settings.exact_k < settings.k


def _examined(
    name: str,
    rows: Rows,
    reader: _Reader,
    design: RowDesign,
    *,
    approximated: bool,
    tally: Tally,
    progress: Progress,
) -> Split:
    """Read a split for the first time."""

    def read() -> Iterator[CachedSequence]:
        again, number = Tally(), 0
        for where, plain in reader(rows.read()):
            made = settled(plain, where, design=design, approximated=approximated, tally=again)
            if made is None:
                continue
            if number >= len(found.rows) or rows_digest(plain) != found.rows[number]:
                raise DataError(
                    f"{where} is not what it was when it was checked; leave the data alone and run this again"
                )
            number += 1
            yield made

    found = Split(read, name)
    progress.begin(f"check {name}", rows.count, "sequences")
    try:
        for where, plain in reader(rows.read()):
            found.examples += 1
            progress.advance(1)
            sequence = settled(plain, where, design=design, approximated=approximated, tally=tally)
            if sequence is None:
                found.dropped += 1
                continue
            found.sizes.append((len(sequence.token_ids), len(sequence.rows)))
            found.digests.append(sequence_digest(sequence.token_ids, sequence.targets))
            found.rows.append(rows_digest(plain))
    finally:
        progress.end()
    return found


def _held_out(found: list[Split], count: int, progress: Progress) -> list[Split]:
    """With the last ``count`` sequences of the training split as a validation split, where there is none."""
    names = [split.name for split in found]
    if "validation" in names:
        if count:
            raise DataError("the data have a validation split; leave --holdout out")
        return found
    if not count:
        progress.warning(
            "the data have no validation split, on which train-student scores its student; --holdout N takes the last N sequences for it"
        )
        return found
    train = next((split for split in found if split.name == "train"), None)
    if train is None or len(train.sizes) <= count:
        raise DataError(
            f"--holdout {count} should be less than the sequences of the training split ({0 if train is None else len(train.sizes)})"
        )
    start, whole = len(train.sizes) - count, train.read

    def part(first: int, last: int) -> Iterator[CachedSequence]:
        return (s for i, s in enumerate(whole()) if first <= i < last)

    kept = Split(
        lambda: part(0, start),
        "train",
        train.examples - count,
        train.dropped,
        train.sizes[:start],
        train.digests[:start],
        train.rows[:start],
    )
    held = Split(
        lambda: part(start, start + count),
        "validation",
        count,
        0,
        train.sizes[start:],
        train.digests[start:],
        train.rows[start:],
    )
    return [kept, held, *(split for split in found if split is not train)]


def _note(destination: Path, notes: list[str], lead: str) -> None:
    """Write what was guessed into the cache's card, once; people may have edited the rest of it."""
    path = destination / layout.CARD_FILE
    text = path.read_text(encoding="utf-8")
    if _HEADING in text:
        return
    lines = [
        _HEADING,
        "",
        lead,
        "",
        *(f"- {escaped(note)}" for note in notes),
        "",
        "",
    ]
    place = text.find(_BEFORE)
    place = len(text) if place < 0 else place
    write_file(path, (text[:place] + "\n".join(lines) + text[place:]).encode())
