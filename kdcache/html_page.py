"""The frame of a page that is one file: nothing is fetched, and only what its policy names may run."""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Iterable

from kdcache.inspection import harmless


def html_text(value: str) -> str:
    """Text of a stranger's, for a page: without control characters, and escaped."""
    return html.escape(harmless(value), quote=True)


def html_page(title: str, style: str, body: Iterable[str], script: str = "") -> str:
    """A whole page.

    Args:
        title: plain text.
        style: the style sheet.
        body: HTML, a line each.
        script: the only one that the page's content security policy lets run; none where it is empty.
    """
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    if script:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        policy += f"; script-src 'sha256-{digest}'"
    policy += "; base-uri 'none'; form-action 'none'"
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="referrer" content="no-referrer">',
            f"<title>{html_text(title)}</title>",
            f"<style>{style}</style>",
            "</head>",
            "<body>",
            *body,
            *([f"<script>{script}</script>"] if script else []),
            "</body>",
            "</html>",
            "",
        ]
    )
