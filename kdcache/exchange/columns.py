"""A stranger's Arrow columns: types held against what is expected once per file, then every row, before it becomes Python lists.

Python guesses and rounds (7.9 becomes 7, a string a list of letters); Arrow says what is there. A few kilobytes of Parquet may
say that they hold billions of zeros, so the file's own figures are looked at before anything is unpacked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from kdcache.errors import DataError

# Values of one column in one row: 32,768 tokens with 512 entries each.
_VALUES = 1 << 24
# And on average over a row group, whose rows are unpacked a few at a time.
_MEAN = 1 << 20


@dataclass(frozen=True)
class Shape:
    """What a column holds: lists, so many in each other, of whole numbers (flags count as such) or of any numbers."""

    depth: int
    whole: bool

    def __str__(self) -> str:
        """For errors."""
        return "list of " * self.depth + ("whole numbers" if self.whole else "numbers")


def known_columns(where: str, schema: Any, shapes: Mapping[str, Shape]) -> list[str]:
    """Which of the expected columns an Arrow schema has, all of the expected type.

    Args:
        where: its name in errors.
        schema: of Arrow.
        shapes: by column; a reader says itself which of them it cannot do without.

    Raises:
        DataError: a column of another type, or twice.
    """
    known = [name for name in schema.names if name in shapes]
    for name in known:
        if known.count(name) > 1:
            raise DataError(f"{where} has the column {name} twice")
        found = schema.field(name).type
        if not _agrees(found, shapes[name]):
            raise DataError(f"{where}: expected the column {name} to be a {shapes[name]}, found {str(found)[:120]}")
    return known


def refuse_bombs(where: str, metadata: Any, known: list[str]) -> None:
    """Hold the numbers of values that Parquet says it holds against what a row may hold.

    Raises:
        DataError: more than 2^24 in a row group of so few rows that it would be more than 2^20 per row.
    """
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        limit = max(_VALUES, group.num_rows * _MEAN)
        for index in range(group.num_columns):
            column = group.column(index)
            name = column.path_in_schema.split(".")[0]
            if name in known and column.num_values > limit:
                raise DataError(
                    f"{where} says that it holds {column.num_values:,} values of {name} in {group.num_rows:,} rows; expected "
                    f"{limit:,} at most"
                )


def python_rows(name: str, first: int, batch: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of an Arrow batch as Python objects, one after the other, each with its name in errors.

    Args:
        name: of the file or split.
        first: number of the batch's first row.
        batch: of Arrow, of columns that `known_columns` has passed.

    Raises:
        DataError: a null anywhere in a row, or too many values.
    """
    for number in range(batch.num_rows):
        where, row = f"{name} row {first + number}", batch.slice(number, 1)
        for column, values in zip(row.schema.names, row.columns, strict=True):
            _refuse_row(where, column, values)
        yield where, row.to_pylist()[0]


def _agrees(found: Any, shape: Shape) -> bool:
    import pyarrow.types as types  # type: ignore[import-untyped]

    for _ in range(shape.depth):
        if not (types.is_list(found) or types.is_large_list(found) or types.is_fixed_size_list(found)):
            return False
        found = found.value_type
    return bool(types.is_integer(found) or types.is_boolean(found) or (types.is_floating(found) and not shape.whole))


def _refuse_row(where: str, column: str, values: Any) -> None:
    if values.null_count:
        raise DataError(f"{where} lacks {column} (it is null)")
    while hasattr(values, "flatten") and hasattr(values.type, "value_type"):
        values = values.flatten()
        if values.null_count:
            raise DataError(f"{where}: {column} holds a null, which is no number")
        if len(values) > _VALUES:
            raise DataError(f"{where}: {column} holds {len(values):,} values, more than {_VALUES:,}")
