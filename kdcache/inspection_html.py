"""A cache as one self-contained page: no script, nothing fetched, every string escaped.

Tokens are coloured by how far the teacher expected them; pointing at one, tapping it or reaching it with the keyboard shows
what it expected instead. A content security policy in the page forbids everything but its own style sheet, should
anything slip through.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kdcache.cache.reader import Cache
from kdcache.html_page import html_page, html_text
from kdcache.inspection import SURPRISE, Distribution, SequenceView, TokenView

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #fdfdfb; --faint: #6a6a6a; --line: #d9d9d4; --card: #ffffff;
  --bar: #5b8bd0; --drawn: #b9b9b9; --s0: #d5efd6; --s1: #eef3c4; --s2: #fce8b2; --s3: #fbd0b0; --s4: #f6b3b3; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8e4; --paper: #17181a; --faint: #9b9b96; --line: #3a3b3e;
  --card: #222326; --bar: #6f9ade; --drawn: #6b6b6b; --s0: #1f4a2a; --s1: #46491b; --s2: #5c4613; --s3: #6b3a17;
  --s4: #7a2828; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 1rem 1rem 16rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.05rem; margin: 2rem 0 .4rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: 0; }
dt, .faint { color: var(--faint); } dd { margin: 0; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; }
th, td { padding: .2rem .7rem .2rem 0; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
.text { font: .95rem/1.9 ui-monospace, monospace; white-space: pre-wrap; border: 1px solid var(--line);
  border-radius: .4rem; padding: .6rem .8rem; background: var(--card); }
.text > .plain { color: var(--faint); }
.t { border-radius: .2rem; cursor: pointer; outline-offset: 1px; }
.key { padding: .1rem .4rem; border-radius: .2rem; margin-right: .3rem; white-space: nowrap; }
.s0 { background: var(--s0); } .s1 { background: var(--s1); } .s2 { background: var(--s2); } .s3 { background: var(--s3); }
.s4 { background: var(--s4); } .empty { border-bottom: 2px dotted var(--faint); }
.pop { display: none; position: fixed; right: 1rem; bottom: 1rem; width: min(30rem, calc(100% - 2rem)); z-index: 1;
  background: var(--card); color: var(--ink); border: 1px solid var(--line); border-radius: .4rem; padding: .6rem .8rem;
  font: .9rem/1.5 system-ui, sans-serif; white-space: normal; box-shadow: 0 .3rem 1.2rem rgb(0 0 0 / 25%); }
.t:hover, .t:focus { outline: 2px solid var(--bar); }
.t:hover > .pop, .t:focus > .pop { display: block; } .t:hover > .pop { z-index: 2; }
.line { display: block; }
.row { display: grid; grid-template-columns: minmax(5rem, 10rem) 1fr 4.2rem; gap: .6rem; align-items: center; }
.row b { font-weight: 400; font-family: ui-monospace, monospace; white-space: pre-wrap; }
.row i { display: block; height: .7rem; min-width: 1px; background: var(--bar); border-radius: .15rem; }
.row .drawn, .row .rest { background: var(--drawn); } .row span { text-align: right; font-variant-numeric: tabular-nums; }
"""


def page(cache: Cache, facts: Mapping[str, str], sequences: Sequence[SequenceView]) -> str:
    """HTML of a whole page.

    Args:
        cache: whose.
        facts: what to say of it, by name.
        sequences: the sequences to show.
    """
    title = f"cache of {cache.plan.teacher.name}"
    body = [
        f"<h1>{html_text(title)}</h1>",
        "<dl>",
        *(f"<dt>{html_text(name)}</dt><dd>{html_text(value)}</dd>" for name, value in facts.items()),
        "</dl>",
        "<h2>splits: the teacher's perplexity, and the mass that is kept exactly</h2>",
        _splits(cache),
    ]
    if sequences:
        body.append(_key())
    body += [_sequence(view) for view in sequences]
    return html_page(title, _STYLE, body)


def _splits(cache: Cache) -> str:
    temperatures = [f"{t:g}" for t in cache.temperatures]
    names = ["split", "sequences", "tokens", "positions", "left empty", "entries each", "perplexity"]
    names += [f"mass, T = {t}" for t in temperatures]
    rows = [
        [
            s.name,
            f"{s.sequences:,}",
            f"{s.tokens:,}",
            f"{s.positions:,}",
            f"{s.positions - s.kept_positions:,}",
            f"{s.entries / max(1, s.kept_positions):.1f}",
            f"{s.teacher_perplexity:.3f}",
            *(f"{m:.4f}" for m in s.kept_mass_mean),
        ]
        for s in cache.manifest.splits
    ]
    lines = ["<tr>" + "".join(f"<th>{html_text(n)}</th>" for n in names) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{html_text(cell)}</td>" for cell in row) + "</tr>" for row in rows]
    return '<div class="wide"><table>' + "".join(lines) + "</table></div>"


def _key() -> str:
    """What the colours mean."""
    highest = [1.0, *SURPRISE]
    names = [f"{low:g} to {high:g}" for high, low in zip(highest, SURPRISE, strict=False)] + [f"under {SURPRISE[-1]:g}"]
    keys = "".join(f'<span class="key s{i}">{html_text(name)}</span>' for i, name in enumerate(names))
    return (
        f"<h2>the teacher's probability of each token, at T = 1</h2><p>{keys}"
        '<span class="key empty">row left empty</span><span class="faint">Plain: not learnt. Point at a token, tap it or '
        "reach it with the tab key.</span></p>"
    )


def _sequence(view: SequenceView) -> str:
    tokens = "".join(_token(token, view.temperature) for token in view.tokens)
    return f'<h2>{html_text(view.title)}</h2>\n<div class="text" dir="ltr">{tokens}</div>'


def _token(token: TokenView, temperature: float) -> str:
    # A line break alone would have no width to point at.
    text = f"<bdi>{html_text(token.text.replace(chr(10), '↵' + chr(10)))}</bdi>"
    if token.probability is None or token.surprise is None:
        return f'<span class="plain">{text}</span>'
    about = (
        f"<b>{html_text(token.name)}</b> was given {token.probability:.4f} at T = 1"
        if token.row is not None
        else f"<b>{html_text(token.name)}</b> was given {token.probability:.4f} at T = 1; its row was left empty"
    )
    rows = "" if token.row is None else _distribution(token.row, temperature)
    mark = f"t s{token.surprise}" + (" empty" if token.row is None else "")
    return f'<span class="{mark}" tabindex="0">{text}<span class="pop"><span>{about}</span>{rows}</span></span>'


def _distribution(row: Distribution, temperature: float) -> str:
    lines = [f'<span class="faint line">choices at T = {temperature:g}; grey: drawn</span>']
    lines += [_bar(c.token, c.probability, "drawn" if c.drawn else "exact") for c in row.choices]
    lines.append(f'<span class="faint line">{row.head:,} entries kept exactly, {row.tail:,} drawn from the rest</span>')
    lines.append(_bar("all kept", row.kept, "exact"))
    lines.append(_bar("the rest", row.rest, "rest"))
    return "".join(lines)


def _bar(name: str, share: float, kind: str) -> str:
    width = min(100.0, max(0.0, 100.0 * share))
    return (
        f'<span class="row"><b><bdi>{html_text(name)}</bdi></b><i class="{kind}" style="width:{width:.1f}%"></i>'
        f"<span>{share:.4f}</span></span>"
    )
