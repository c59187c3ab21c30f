"""A report as Markdown: tables, pictures beside it, and every string such that it is shown and not obeyed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from kdcache.markdown import escaped

if TYPE_CHECKING:
    from kdcache.report.blocks import Answers, Block, Document, Figure, Table

# What means something at the start of a line alone.
_AT_START = re.compile(r"^([-+#=]|\d+(?=[.)]))")
_LONGEST_ALT = 600


def markdown(document: Document) -> str:
    """The text of report.md."""
    parts = [f"# {escaped(document.title)}", *(_paragraph(text.text) for text in document.lead)]
    for section in document.sections:
        parts.append(f"## {escaped(section.title)}")
        for block in section.blocks:
            parts += _block(block, 3)
    return "\n\n".join(parts) + "\n"


def _paragraph(text: str) -> str:
    return _AT_START.sub(lambda found: f"{found[1]}\\" if found[1].isdigit() else f"\\{found[1]}", escaped(text))


def _block(block: Block, level: int) -> Iterator[str]:
    from kdcache.report.blocks import Answers, Code, Figure, Folded, Table

    if isinstance(block, Table):
        yield _table(block)
    elif isinstance(block, Figure):
        yield from _figure(block)
    elif isinstance(block, Code):
        yield "\n".join("    " + _plain(line) for line in block.text.rstrip().split("\n"))
    elif isinstance(block, Answers):
        yield _answers(block)
    elif isinstance(block, Folded):
        yield f"{'#' * min(level, 6)} {escaped(block.title)}"
        for inner in block.blocks:
            yield from _block(inner, level + 1)
    else:
        yield f"**{escaped(block.text)}**" if block.kind == "warning" else _paragraph(block.text)


def _table(block: Table) -> str:
    heads = ["| " + " | ".join(escaped(c.label) for c in block.columns) + " |"]
    heads.append("|" + "".join("---:|" if c.numeric else "---|" for c in block.columns))
    rows = ["| " + " | ".join(escaped(cell.text) for cell in line.cells) + " |" for line in block.lines]
    caption = _paragraph(block.caption)
    return f"{caption}{'' if caption.endswith('?') else ':'}\n\n" + "\n".join([*heads, *rows])


def _figure(figure: Figure) -> Iterator[str]:
    alt = figure.alt if len(figure.alt) <= _LONGEST_ALT else figure.alt[: _LONGEST_ALT - 1] + "…"
    yield f"![{escaped(alt)}]({figure.name}.png)"
    yield _paragraph(figure.caption)


def _answers(block: Answers) -> str:
    lines = [f"> {escaped(block.prompt)}", ""]
    return "\n".join([*lines, *(f"- **{escaped(name)}**: {escaped(answer)}" for name, answer in block.answers)])


def _plain(line: str) -> str:
    from kdcache.inspection import harmless

    return harmless(line)
