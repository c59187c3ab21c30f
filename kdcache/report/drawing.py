"""Figures -> PNG and SVG files, and SVG to stand inside a page."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from kdcache.inspection import harmless
from kdcache.report.blocks import Figure, Panel
from kdcache.report.palette import FAINT, INK, LINE, PAPER, as_variables

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_GAP = 0.25  # inches between the panels of a file
_TALLEST = 100.0  # inches; a PNG of hundreds of rows should still open
_SIZE = re.compile(r'<svg[^>]*?viewBox="([^"]*)"[^>]*>', re.DOTALL)
_ID = re.compile(r'\bid="([^"]*)"')
_USE = re.compile(r'(url\(#|href="#)')
_METADATA = re.compile(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>|<!--.*?-->", re.DOTALL)
_STYLE = {
    "font.size": 9, "axes.titlesize": 10, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.edgecolor": FAINT, "axes.labelcolor": INK, "axes.titlecolor": INK, "text.color": INK,
    "xtick.color": FAINT, "ytick.color": FAINT, "xtick.labelcolor": INK, "ytick.labelcolor": INK,
    "axes.grid": True, "grid.color": LINE, "grid.linewidth": 0.6, "axes.axisbelow": True,
    "axes.spines.top": False, "axes.spines.right": False, "axes.facecolor": "none",
    "legend.frameon": False, "svg.fonttype": "none",
    # Names of a stranger's rows are text, never formulas.
    "text.parse_math": False,
}  # fmt: skip


def figure_files(figure: Figure) -> dict[str, bytes]:
    """NAME.png and NAME.svg with all panels of a figure on paper colour."""
    from matplotlib.figure import Figure as Canvas

    with _style(figure.name):
        columns = min(figure.columns, len(figure.panels))
        lines = math.ceil(len(figure.panels) / columns)
        width = sum(max(p.width for p in figure.panels) + _GAP for _ in range(columns))
        height = lines * (max(p.height for p in figure.panels) + _GAP) + 0.3 * bool(figure.key)
        canvas = Canvas(figsize=(width, min(height, _TALLEST)), layout="constrained", facecolor=PAPER)
        places = canvas.subplots(lines, columns, squeeze=False).flatten()
        for panel, axes in zip(figure.panels, places, strict=False):
            _draw(panel, axes)
        for axes in places[len(figure.panels) :]:
            axes.set_axis_off()
        if figure.key:
            _legend(figure, canvas)
        return {f"{figure.name}.png": _saved(canvas, "png"), f"{figure.name}.svg": _saved(canvas, "svg")}


def inline_svg(panel: Panel, name: str) -> str:
    """One panel as an SVG element whose colours are the page's variables and whose ids start with ``name``."""
    from matplotlib.figure import Figure as Canvas

    with _style(name):
        canvas = Canvas(figsize=(panel.width, panel.height), layout="constrained", facecolor="none")
        axes = canvas.subplots()
        _draw(panel, axes)
        axes.set_title("")  # the page has it as text
        svg = _saved(canvas, "svg").decode()
    box = _SIZE.search(svg)
    assert box is not None
    inside = _METADATA.sub("", svg[box.end() : svg.rindex("</svg>")])
    inside = _USE.sub(rf"\g<1>{name}-", _ID.sub(rf'id="{name}-\g<1>"', inside))
    return f'<svg viewBox="{box[1]}" aria-hidden="true" focusable="false">{as_variables(inside)}</svg>'


def _draw(panel: Panel, axes: Axes) -> None:
    panel.draw(axes)
    axes.set_title(short(panel.title, 48))


def short(name: str, most: int = 26) -> str:
    """A name as a figure can show it: on one line, without control characters, and not too long."""
    text = " ".join(harmless(name).split())
    return text if len(text) <= most else text[: most - 1] + "…"


def _legend(figure: Figure, canvas: object) -> None:
    from matplotlib.figure import Figure as Canvas
    from matplotlib.lines import Line2D

    assert isinstance(canvas, Canvas)
    # Matplotlib leaves a label that starts with an underscore out.
    handles = [Line2D([], [], color=color, linewidth=4, label=" " + short(name)) for color, name in figure.key]
    canvas.legend(handles=handles, loc="outside lower left", ncols=len(handles))


def _saved(canvas: object, form: str) -> bytes:
    from matplotlib.figure import Figure as Canvas

    assert isinstance(canvas, Canvas)
    file = io.BytesIO()
    metadata = {"Date": None, "Creator": None} if form == "svg" else {"Software": None}
    canvas.savefig(file, format=form, dpi=130, metadata=metadata)
    return file.getvalue()


@contextmanager
def _style(salt: str) -> Iterator[None]:
    import matplotlib

    # The salt makes equal reports equal bytes, and keeps the clips of one figure out of another's.
    settings: Any = {**_STYLE, "svg.hashsalt": salt}
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        # Names may be in any script; letters that the font lacks are boxes in the PNG and right on the page.
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        yield
