"""Progress on a terminal (bars) and elsewhere (plain lines). Only the command line uses this."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bar
    from rich.table import Table

_PLAIN_EVERY_SECONDS = 10.0
# Columns from which a table has to save room to fit 80 characters.
_MANY = 5
# A figure is no wider, and a text never folded to less.
_FIGURE, _TEXT = 13, 12


def printable(text: str) -> str:
    """Text without control characters: a stranger's cache must not steer the terminal."""
    return "".join(c for c in text if c == "\n" or (c.isprintable() and not "\ud800" <= c <= "\udfff"))


def byte_size(count: float) -> str:
    """A number of bytes for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1024
    return ""


def number_list(values: tuple[float, ...], digits: int | None = None) -> str:
    """Numbers separated by commas."""
    return ", ".join(f"{v:g}" if digits is None else f"{v:.{digits}f}" for v in values)


def text_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A table of plain cells, the first column to the left and the others to the right.

    Where the terminal is narrow, long texts are folded: a figure that is cut short would be another figure.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, collapse_padding=len(columns) > _MANY, pad_edge=len(columns) <= _MANY)
    rows = list(rows)
    for i, column in enumerate(columns):
        width = max((len(row[i]) for row in rows), default=0)
        table.add_column(
            column,
            justify="left" if i == 0 else "right",
            # Figures keep their width; names and texts share what is left.
            min_width=width if i > 0 and width <= _FIGURE else min(width, _TEXT),
            overflow="fold",
        )
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    return table


class TerminalProgress:
    """A bar with rate and ETA for each task, messages above it."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar: Bar | None = None
        self._rate = _Rate()

    def message(self, text: str) -> None:
        """One line above the bar."""
        self._console.print(printable(text), highlight=False, markup=False)

    def warning(self, text: str) -> None:
        """One yellow line above the bar."""
        self._console.print(printable(f"warning: {text}"), style="yellow", highlight=False, markup=False)

    def begin(self, task: str, total: int, unit: str) -> None:
        """Show a bar."""
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self.end()
        self._rate.begin(task, total, unit)
        self._bar = Bar(
            TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(), TextColumn("eta"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
            console=self._console,
        )  # fmt: skip
        self._bar.add_task(task, total=total, rate="", note="")
        self._bar.start()

    def advance(self, amount: int, note: str = "") -> None:
        """Move the bar."""
        if self._bar is not None:
            self._rate.done += amount
            self._bar.update(self._bar.task_ids[0], advance=amount, note=note, rate=self._rate.text())

    def end(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class PlainProgress:
    """A line every ten seconds and one at the end of each task, for logs."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._rate = _Rate()
        self._last = 0.0
        self._note = ""
        self._running = False

    def message(self, text: str) -> None:
        """One line."""
        self._console.print(printable(text), highlight=False, markup=False, soft_wrap=True)

    def warning(self, text: str) -> None:
        """One line."""
        self.message(f"warning: {text}")

    def begin(self, task: str, total: int, unit: str) -> None:
        """Remember the task."""
        self.end()
        self._rate.begin(task, total, unit)
        self._last = time.monotonic()
        self._note = ""
        self._running = True

    def advance(self, amount: int, note: str = "") -> None:
        """Print when ten seconds have passed."""
        self._rate.done += amount
        self._note = note or self._note
        if time.monotonic() - self._last >= _PLAIN_EVERY_SECONDS:
            self._last = time.monotonic()
            self._line()

    def end(self) -> None:
        """Print where the task ended."""
        if self._running:
            self._running = False
            self._line()

    def _line(self) -> None:
        rate = self._rate
        self.message(f"{rate.task}: {rate.done:,}/{rate.total:,} {rate.text()}, {rate.eta()}  {self._note}".rstrip())


class _Rate:
    def begin(self, task: str, total: int, unit: str) -> None:
        self.task, self.total, self.unit, self.done = task, total, unit, 0
        self._started = time.monotonic()

    def per_second(self) -> float:
        return self.done / max(1e-9, time.monotonic() - self._started)

    def text(self) -> str:
        return f"{self.per_second():,.{0 if self.per_second() >= 10 else 1}f} {self.unit}/s"

    def eta(self) -> str:
        if self.done >= self.total:
            return f"{time.monotonic() - self._started:.0f} s"
        if self.done == 0:
            return "eta unknown"
        return f"eta {(self.total - self.done) / max(1e-9, self.per_second()):.0f} s"
