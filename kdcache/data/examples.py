"""A data set -> ordered examples, one shape for all sources."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdcache.errors import DataError, KdcacheError

if TYPE_CHECKING:
    import datasets

_BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
_SHAPE_COLUMNS = {"instruction": ("instruction", "output"), "chat": ("messages",), "text": ("text",)}
# Where somebody else answers, and plain text asks nothing.
_PROMPT_COLUMNS = {"instruction": ("instruction",), "chat": ("messages",)}
_ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True)
class Example:
    """One example of the data set, by its place in the selected split.

    ``messages`` holds a conversation, ``text`` a plain text; exactly one is there. An example that
    has nothing to learn is kept and marked ``empty``, so that it is counted and not silently lost.
    """

    index: int
    messages: tuple[Message, ...] | None = None
    text: str | None = None
    empty: bool = False


@dataclass(frozen=True)
class ExampleSet:
    """An iterable set of examples that are read lazily from a data set; sized, unless it is a stream.

    Without ``answers`` an example is what is asked: its conversation ends with the last user turn.
    """

    name: str
    selected: str
    shape: str
    columns: Mapping[str, str]
    rows: datasets.Dataset | datasets.IterableDataset
    answers: bool = True

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Example]:
        convert = {"instruction": self._instruction, "chat": self._chat, "text": self._text}[self.shape]
        index = -1
        try:
            for index, row in enumerate(self.rows):
                yield convert(index, row)
        except KdcacheError:
            raise
        except Exception as exc:
            # The JSON reader lets foreign bytes through, and a stream can break anywhere: both surface when a row is read.
            raise DataError(f"{self.name} {self.selected}, row {index + 1}: {_cause(exc)}") from exc

    def _column(self, row: Mapping[str, Any], key: str, index: int) -> str:
        value = row.get(self.columns.get(key, key))
        if value is None:
            return ""
        if not isinstance(value, str):
            raise DataError(
                f"{self.name} {self.selected}, row {index}: column {self.columns.get(key, key)!r} should be text, "
                f"found {type(value).__name__}"
            )
        return value

    def _instruction(self, index: int, row: Mapping[str, Any]) -> Example:
        instruction, extra = self._column(row, "instruction", index), self._column(row, "input", index)
        question = f"{instruction}\n{extra}" if extra.strip() else instruction
        if not self.answers:
            return Example(index, messages=(Message("user", question),), empty=not question.strip())
        output = self._column(row, "output", index)
        return Example(
            index, messages=(Message("user", question), Message("assistant", output)), empty=not output.strip()
        )

    def _chat(self, index: int, row: Mapping[str, Any]) -> Example:
        turns = row.get(self.columns.get("messages", "messages")) or []
        if not isinstance(turns, list):
            raise DataError(
                f"{self.name} {self.selected}, row {index}: messages should be a list, found {type(turns).__name__}"
            )
        messages = []
        for turn in turns:
            role = turn.get("role") if isinstance(turn, Mapping) else None
            content = turn.get("content") if isinstance(turn, Mapping) else None
            if role not in _ROLES or not isinstance(content, str):
                raise DataError(
                    f"{self.name} {self.selected}, row {index}: a message should have a role of {', '.join(_ROLES)} "
                    f"and text content, found role {role!r} and content of type {type(content).__name__}"
                )
            messages.append(Message(role, content))
        if not self.answers:
            asked = max((i for i, m in enumerate(messages) if m.role == "user" and m.content.strip()), default=-1)
            return Example(index, messages=tuple(messages[: asked + 1]), empty=asked < 0)
        said = any(m.role == "assistant" and m.content.strip() for m in messages)
        return Example(index, messages=tuple(messages), empty=not said)

    def _text(self, index: int, row: Mapping[str, Any]) -> Example:
        text = self._column(row, "text", index)
        return Example(index, text=text, empty=not text.strip())


def load_examples(
    path: str,
    *,
    split: str = "train",
    name: str | None = None,
    revision: str | None = None,
    shape: str = "auto",
    columns: Mapping[str, str] | None = None,
    answers: bool = True,
    stream: bool = False,
    skip: int = 0,
    take: int | None = None,
) -> ExampleSet:
    """Open a data set from the Hub, a local file or a local directory.

    Args:
        path: Hub id, or local .json, .jsonl, .jsonl.gz, .parquet or .csv file, or a directory of such
            files or of a data set saved with ``save_to_disk``.
        split: split with an optional slice, as the datasets library reads it: ``train[:5%]``.
        name: configuration of a Hub data set.
        revision: commit, tag or branch of a Hub data set.
        shape: instruction, chat, text, or auto to choose by the columns.
        columns: the data set's column for each of ours, where they differ.
        answers: whether responses are wanted; without them no column is needed for them.
        stream: read row after row from the beginning, without a look at the rest; ``split`` has no slice.
        skip: examples of the stream that are passed over.
        take: examples of the stream behind them, or all.

    Raises:
        DataError: missing, empty, unreadable, or without the columns that the shape needs.
    """
    columns = dict(columns or {})
    rows = load_rows(path, split=split, name=name, revision=revision, stream=stream)
    shown = Path(path).name if _is_local(path) else path
    if stream:
        # What a stream holds is known once its first row is read.
        found = set(_first_row(rows, path, split))
        rows = rows.skip(skip)
        rows = rows if take is None else rows.take(take)
    else:
        if len(rows) == 0:
            raise DataError(f"{path} {split} has no rows; choose another split or slice")
        found = set(rows.column_names)
    shapes = _SHAPE_COLUMNS if answers else _PROMPT_COLUMNS
    fits = [s for s, needed in shapes.items() if all(columns.get(c, c) in found for c in needed)]
    if shape == "auto" and fits:
        shape = fits[0]
    if shape not in fits:
        needed = shapes.get(shape)
        expected = " or ".join(
            " and ".join(columns.get(c, c) for c in cols) for cols in ([needed] if needed else shapes.values())
        )
        raise DataError(
            f"{path} should have the columns {expected}, found {', '.join(sorted(found))}; name them with data.columns"
        )
    return ExampleSet(shown, split, shape, columns, rows, answers)


def _first_row(rows: Any, path: str, split: str) -> Mapping[str, Any]:
    try:
        row: Mapping[str, Any] = next(iter(rows))
    except StopIteration:
        raise DataError(f"{path} {split} has no rows; choose another data set or split") from None
    except Exception as exc:
        raise DataError(f"cannot read {path} {split}: {_cause(exc)}") from exc
    return row


def _is_local(path: str) -> bool:
    p = Path(path)
    return p.exists() or p.is_absolute() or path.startswith((".", "~")) or _suffix(p) in _BUILDERS


def _suffix(path: Path) -> str:
    suffixes = [s for s in path.suffixes if s not in (".gz", ".zst", ".bz2", ".xz")]
    return suffixes[-1] if suffixes else ""


def load_rows(
    path: str, *, split: str = "train", name: str | None = None, revision: str | None = None, stream: bool = False
) -> Any:
    """The rows of a data set: a ``datasets.Dataset``, or for a stream an ``IterableDataset``. Arguments as `load_examples`.

    Raises:
        DataError: missing, empty or unreadable.
    """
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    local = Path(path).expanduser()
    try:
        if not _is_local(path):
            return datasets.load_dataset(path, name, split=split, revision=revision, streaming=stream)
        if not local.exists():
            raise DataError(f"the data file {path} does not exist")
        if local.is_file() and local.stat().st_size == 0:
            raise DataError(f"the data file {path} is empty")
        if local.is_dir() and ((local / "state.json").exists() or (local / "dataset_dict.json").exists()):
            saved = _saved(datasets.load_from_disk(str(local)), path, split)
            return saved.to_iterable_dataset() if stream else saved
        if local.is_dir():
            return datasets.load_dataset(str(local), name, split=split, streaming=stream)
        builder = _BUILDERS.get(_suffix(local))
        if builder is None:
            raise DataError(f"{path} should end in {', '.join(_BUILDERS)} (optionally .gz)")
        files = {split.partition("[")[0]: str(local)}
        return datasets.load_dataset(builder, data_files=files, split=split, streaming=stream)
    except DataError:
        raise
    except Exception as exc:
        # The library raises a dozen unrelated types here; each has the cause in its chain.
        raise DataError(f"cannot read {path} {split}: {_cause(exc)}") from exc


def _saved(loaded: datasets.Dataset | datasets.DatasetDict, path: str, split: str) -> datasets.Dataset:
    import datasets

    base = split.partition("[")[0]
    if isinstance(loaded, datasets.DatasetDict):
        if base not in loaded:
            raise DataError(f"{path} has no split {base!r}, only {', '.join(loaded)}")
        loaded = loaded[base]
    indices: list[int] = []
    for span in datasets.ReadInstruction.from_spec(split).to_absolute({base: len(loaded)}):
        start = span.from_ if span.from_ is not None else 0
        stop = span.to if span.to is not None else len(loaded)
        indices += range(start, stop)
    return loaded.select(indices)


def _cause(exc: BaseException) -> str:
    while exc.__cause__ is not None or (exc.__context__ is not None and not exc.__suppress_context__):
        following = exc.__cause__ or exc.__context__
        assert following is not None
        exc = following
    if isinstance(exc, UnicodeDecodeError):
        return f"not UTF-8 text (byte {exc.start}: {exc.reason}); convert the file to UTF-8"
    return f"{type(exc).__name__}: {' '.join(str(exc).split())[:300]}"
