"""A report as one self-contained page: nothing is fetched, every string is escaped.

A content security policy in the page allows its own style sheet and the one script that sorts, by its hash: a string that
slipped through could not run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from kdcache.html_page import html_page, html_text
from kdcache.report.blocks import (
    Answers,
    Block,
    Cell,
    Code,
    Column,
    Document,
    Figure,
    Folded,
    Line,
    Panel,
    Section,
    Table,
    Text,
)
from kdcache.report.drawing import inline_svg
from kdcache.report.palette import DARK, LIGHT, as_variables, variables

_STYLE = Path(__file__).with_name("page.css")
_SCRIPT = Path(__file__).with_name("page.js")
# Where the dotted keys of a narrow table may break; numbers may not.
_BREAKS, _BREAK = re.compile(r"(?<=\w)(?:[._/](?=[A-Za-z])|=(?=\w))"), r"\g<0><wbr>"


def page(document: Document) -> str:
    """HTML of the whole report."""
    colors = (
        f":root {{ {variables(LIGHT)} }}\n@media (prefers-color-scheme: dark) {{ :root {{ {variables(DARK)} }} }}\n"
    )
    links = "".join(f'<li><a href="#{_anchor(s)}">{html_text(s.title)}</a></li>' for s in document.sections)
    body = [
        f"<header><h1>{html_text(document.title)}</h1>",
        *(_paragraph(text) for text in document.lead),
        f'<nav aria-label="Sections"><ul>{links}</ul></nav></header>',
        "<main>",
        *(part for section in document.sections for part in _section(section)),
        "</main>",
    ]
    style = colors + _STYLE.read_text(encoding="utf-8")
    return html_page(document.title, style, body, _SCRIPT.read_text(encoding="utf-8"))


def _anchor(section: Section) -> str:
    return re.sub(r"[^a-z]+", "-", section.title.lower())


def _section(section: Section) -> Iterator[str]:
    name = _anchor(section)
    yield f'<section aria-labelledby="{name}"><h2 id="{name}">{html_text(section.title)}</h2>'
    for block in section.blocks:
        yield _block(block)
    yield "</section>"


def _block(block: Block) -> str:
    if isinstance(block, Table):
        return _table(block)
    if isinstance(block, Figure):
        return _figure(block)
    if isinstance(block, Code):
        return f'<pre tabindex="0"><code>{html_text(block.text.rstrip())}</code></pre>'
    if isinstance(block, Answers):
        return _answers(block)
    if isinstance(block, Folded):
        inside = "".join(_block(b) for b in block.blocks)
        return f"<details{' open' if block.open else ''}><summary>{html_text(block.title)}</summary>{inside}</details>"
    return _paragraph(block)


def _paragraph(text: Text) -> str:
    role = ' role="note"' if text.kind == "warning" else ""
    return f'<p class="{text.kind}"{role}>{html_text(text.text)}</p>' if text.kind else f"<p>{html_text(text.text)}</p>"


def _table(table: Table) -> str:
    heads = "".join(_head(table, i, column) for i, column in enumerate(table.columns))
    above = [line for line in table.lines if line.kind == "reference"]
    below = [line for line in table.lines if line.kind != "reference"]
    bodies = "".join(
        f"<tbody>{''.join(_line(table, line) for line in lines)}</tbody>"
        for lines in (above, below)
        if lines or lines is below
    )
    mark = ' class="sortable"' if table.sortable else ""
    # A box that scrolls has to be reached by the keyboard, and then should say what it is.
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{html_text(table.caption)}"><table{mark}>'
        f"<caption>{html_text(table.caption)}</caption><thead><tr>{heads}</tr></thead>{bodies}</table></div>"
    )


def _head(table: Table, index: int, column: Column) -> str:
    kind = ' class="n"' if column.numeric else ""
    title = f' title="{html_text(column.title)}"' if column.title else ""
    if not table.sortable:
        return f'<th scope="col"{kind}{title}>{html_text(column.label)}</th>'
    order = "ascending" if index == table.sorted_by else "none"
    return f'<th scope="col"{kind}{title} aria-sort="{order}"><button type="button">{html_text(column.label)}</button></th>'


def _line(table: Table, line: Line) -> str:
    cells = [
        _cell(cell, column, first=i == 0)
        for i, (cell, column) in enumerate(zip(line.cells, table.columns, strict=True))
    ]
    mark = f' class="{line.kind}"' if line.kind else ""
    return f"<tr{mark}>{''.join(cells)}</tr>"


def _cell(cell: Cell, column: Column, *, first: bool) -> str:
    tag, scope = ("th", ' scope="row"') if first else ("td", "")
    kind = ' class="n"' if column.numeric else ""
    value = ""
    if isinstance(cell.value, str):
        value = f' data-text="{html_text(cell.value)}"'
    elif cell.value is not None:
        value = f' data-value="{cell.value!r}"'  # all digits: what is shown is rounded
    title = f' title="{html_text(cell.title)}"' if cell.title else ""
    return f"<{tag}{scope}{kind}{value}{title}><bdi>{_BREAKS.sub(_BREAK, html_text(cell.text))}</bdi></{tag}>"


def _figure(figure: Figure) -> str:
    key = "".join(
        f'<span><i style="background:{as_variables(color)}"></i>{html_text(name)}</span>' for color, name in figure.key
    )
    size = {1: " one", 2: " few"}.get(figure.columns, "")
    panels = "".join(_panel(panel, f"{figure.name}-{i}") for i, panel in enumerate(figure.panels))
    return (
        f'<figure id="figure-{figure.name}"><figcaption>{html_text(figure.caption)}<div class="key">{key}</div></figcaption>'
        f'<div class="panels{size}">{panels}</div></figure>'
    )


def _panel(panel: Panel, name: str) -> str:
    return f'<div><h3>{html_text(panel.title)}</h3><div role="img" aria-label="{html_text(panel.alt)}">{inline_svg(panel, name)}</div></div>'


def _answers(block: Answers) -> str:
    answers = "".join(
        f'<div><dt>{html_text(name)}</dt><dd dir="auto">{html_text(answer)}</dd></div>'
        for name, answer in block.answers
    )
    return f'<div class="answers"><p class="prompt" dir="auto">{html_text(block.prompt)}</p><dl>{answers}</dl></div>'
