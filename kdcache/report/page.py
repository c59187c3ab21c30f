"""A report as one self-contained page: nothing is fetched, every string is escaped.

A content security policy in the page allows its own style sheet and the one script that sorts, by its hash: a string that
slipped through could not run.
"""

from __future__ import annotations

import base64
import hashlib
import html
import re
from collections.abc import Iterator
from pathlib import Path

from kdcache.inspection import harmless
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
    script = _SCRIPT.read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    colors = (
        f":root {{ {variables(LIGHT)} }}\n@media (prefers-color-scheme: dark) {{ :root {{ {variables(DARK)} }} }}\n"
    )
    links = "".join(f'<li><a href="#{_anchor(s)}">{_text(s.title)}</a></li>' for s in document.sections)
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="referrer" content="no-referrer">',
            f"<title>{_text(document.title)}</title>",
            f"<style>{colors}{_STYLE.read_text(encoding='utf-8')}</style>",
            "</head>",
            "<body>",
            f"<header><h1>{_text(document.title)}</h1>",
            *(_paragraph(text) for text in document.lead),
            f'<nav aria-label="Sections"><ul>{links}</ul></nav></header>',
            "<main>",
            *(part for section in document.sections for part in _section(section)),
            "</main>",
            f"<script>{script}</script>",
            "</body>",
            "</html>",
            "",
        ]
    )


def _text(value: str) -> str:
    return html.escape(harmless(value), quote=True)


def _anchor(section: Section) -> str:
    return re.sub(r"[^a-z]+", "-", section.title.lower())


def _section(section: Section) -> Iterator[str]:
    name = _anchor(section)
    yield f'<section aria-labelledby="{name}"><h2 id="{name}">{_text(section.title)}</h2>'
    for block in section.blocks:
        yield _block(block)
    yield "</section>"


def _block(block: Block) -> str:
    if isinstance(block, Table):
        return _table(block)
    if isinstance(block, Figure):
        return _figure(block)
    if isinstance(block, Code):
        return f'<pre tabindex="0"><code>{_text(block.text.rstrip())}</code></pre>'
    if isinstance(block, Answers):
        return _answers(block)
    if isinstance(block, Folded):
        inside = "".join(_block(b) for b in block.blocks)
        return f"<details{' open' if block.open else ''}><summary>{_text(block.title)}</summary>{inside}</details>"
    return _paragraph(block)


def _paragraph(text: Text) -> str:
    role = ' role="note"' if text.kind == "warning" else ""
    return f'<p class="{text.kind}"{role}>{_text(text.text)}</p>' if text.kind else f"<p>{_text(text.text)}</p>"


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
        f'<div class="wide" tabindex="0" role="region" aria-label="{_text(table.caption)}"><table{mark}>'
        f"<caption>{_text(table.caption)}</caption><thead><tr>{heads}</tr></thead>{bodies}</table></div>"
    )


def _head(table: Table, index: int, column: Column) -> str:
    kind = ' class="n"' if column.numeric else ""
    title = f' title="{_text(column.title)}"' if column.title else ""
    if not table.sortable:
        return f'<th scope="col"{kind}{title}>{_text(column.label)}</th>'
    order = "ascending" if index == table.sorted_by else "none"
    return f'<th scope="col"{kind}{title} aria-sort="{order}"><button type="button">{_text(column.label)}</button></th>'


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
        value = f' data-text="{_text(cell.value)}"'
    elif cell.value is not None:
        value = f' data-value="{cell.value!r}"'  # all digits: what is shown is rounded
    title = f' title="{_text(cell.title)}"' if cell.title else ""
    return f"<{tag}{scope}{kind}{value}{title}><bdi>{_BREAKS.sub(_BREAK, _text(cell.text))}</bdi></{tag}>"


def _figure(figure: Figure) -> str:
    key = "".join(
        f'<span><i style="background:{as_variables(color)}"></i>{_text(name)}</span>' for color, name in figure.key
    )
    size = {1: " one", 2: " few"}.get(figure.columns, "")
    panels = "".join(_panel(panel, f"{figure.name}-{i}") for i, panel in enumerate(figure.panels))
    return (
        f'<figure id="figure-{figure.name}"><figcaption>{_text(figure.caption)}<div class="key">{key}</div></figcaption>'
        f'<div class="panels{size}">{panels}</div></figure>'
    )


def _panel(panel: Panel, name: str) -> str:
    return f'<div><h3>{_text(panel.title)}</h3><div role="img" aria-label="{_text(panel.alt)}">{inline_svg(panel, name)}</div></div>'


def _answers(block: Answers) -> str:
    answers = "".join(
        f'<div><dt>{_text(name)}</dt><dd dir="auto">{_text(answer)}</dd></div>' for name, answer in block.answers
    )
    return f'<div class="answers"><p class="prompt" dir="auto">{_text(block.prompt)}</p><dl>{answers}</dl></div>'
