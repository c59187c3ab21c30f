"""What a report is made of: sections of tables, figures, texts and samples, before anything is Markdown or HTML."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Cell:
    """What a cell shows, and the value behind it in full precision; a cell without a value is sorted last."""

    text: str
    value: float | int | str | None = None
    title: str = ""


@dataclass(frozen=True)
class Column:
    """A table's column; ``title`` explains it."""

    label: str
    numeric: bool = True
    title: str = ""


@dataclass(frozen=True)
class Line:
    """A line of a table. Reference lines stay on top; failed ones at the bottom, however it is sorted."""

    cells: tuple[Cell, ...]
    kind: Literal["", "reference", "failed", "open"] = ""


@dataclass(frozen=True)
class Table:
    """A table; its first column heads its lines. ``sorted_by`` is the column it comes sorted by, smallest first."""

    caption: str
    columns: tuple[Column, ...]
    lines: tuple[Line, ...]
    sortable: bool = False
    sorted_by: int | None = None


@dataclass(frozen=True)
class Text:
    """A paragraph; a warning is one that must not be overlooked."""

    text: str
    kind: Literal["", "note", "warning"] = ""


@dataclass(frozen=True)
class Code:
    """Text to be copied as it is: commands, YAML."""

    text: str


@dataclass(frozen=True)
class Panel:
    """One pair of axes: what is drawn on it, in inches, and what it shows in words."""

    title: str
    alt: str
    draw: Callable[[Axes], None]
    width: float = 4.2
    height: float = 2.8


@dataclass(frozen=True)
class Figure:
    """Panels that belong together; the key names colours. Saved as NAME.png and NAME.svg."""

    name: str
    caption: str
    panels: tuple[Panel, ...]
    key: tuple[tuple[str, str], ...] = ()
    columns: int = 3

    @property
    def alt(self) -> str:
        """All panels in words."""
        return " ".join(panel.alt for panel in self.panels)


@dataclass(frozen=True)
class Answers:
    """A prompt, and what was answered to it, by whom."""

    prompt: str
    answers: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Folded:
    """What is shown on demand."""

    title: str
    blocks: tuple[Block, ...]
    open: bool = False


Block = Table | Text | Code | Figure | Answers | Folded


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it."""

    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Document:
    """A whole report."""

    title: str
    lead: tuple[Text, ...]
    sections: tuple[Section, ...]

    def figures(self) -> list[Figure]:
        """Every figure in it."""
        return [block for section in self.sections for block in section.blocks if isinstance(block, Figure)]
