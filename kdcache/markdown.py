"""Markdown of plain text: tables, and strings of strangers that are shown and not obeyed."""

from __future__ import annotations

import re
from collections.abc import Sequence

# What means something anywhere in a line (an underscore not inside a word).
_SPECIAL = re.compile(r"([\\`*\[\]|~$]|(?<!\w)_|_(?!\w))")


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of plain cells, the first column to the left and the others to the right."""
    lines = ["| " + " | ".join(columns) + " |", "|---|" + "---:|" * (len(columns) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def escaped(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    from kdcache.inspection import harmless

    line = " ".join(harmless(text).split())
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _SPECIAL.sub(r"\\\1", line)
