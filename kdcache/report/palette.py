"""Colours of a report, in light and dark.

Figures are drawn in the light colours; on the page each becomes the variable of its name, so that they follow the reader's
choice. No two may be equal, and no other colour may be used in a figure.
"""

from __future__ import annotations

INK, FAINT, LINE, PAPER = "#1b1b1a", "#64646a", "#c9c9c4", "#fdfdfb"
SERIES = ("#2463ae", "#b04a00", "#1f7a45", "#7a45b5", "#9c2f5f")
_DARK_SERIES = ("#7fb4f2", "#f3a261", "#77cf95", "#c4a5f0", "#f08db4")

LIGHT = {"ink": INK, "faint": FAINT, "line": LINE, "paper": PAPER, **{f"c{i}": c for i, c in enumerate(SERIES)}}
DARK = {
    "ink": "#e9e9e4", "faint": "#a3a3a8", "line": "#45464a", "paper": "#17181a",
    **{f"c{i}": c for i, c in enumerate(_DARK_SERIES)},
}  # fmt: skip


def variables(colors: dict[str, str]) -> str:
    """CSS custom properties of the colours."""
    return " ".join(f"--{name}: {color};" for name, color in colors.items())


def as_variables(svg: str) -> str:
    """The light colours in an SVG as CSS variables."""
    for name, color in LIGHT.items():
        svg = svg.replace(color, f"var(--{name})")
    return svg
