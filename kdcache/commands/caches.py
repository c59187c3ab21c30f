"""Commands on a cache directory: look at it, check it."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from kdcache.commands.app import CacheArgument, app, console_progress, say, say_lines, say_table
from kdcache.console import text_table
from kdcache.summary import cache_facts, fact_lines, split_lines

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from kdcache.cache.reader import Cache
    from kdcache.cache.verify import Finding, Verification
    from kdcache.evaluate.disagreement import Rescore
    from kdcache.inspection import Distribution, SequenceView, TokenView

# From expected to hardly believed, as `kdcache.inspection.SURPRISE` cuts it.
_COLOURS = ("green", "", "yellow", "magenta", "bold red")
# Sequences of each split on a page where none is named.
_SHOWN = 3
_NOTES_SHOWN = 20


@app.command()
def inspect(
    cache: CacheArgument,
    sequence: Annotated[
        Optional[int],  # noqa: UP045 (typer reads the annotation at run time)
        typer.Option(help="Show this sequence (0 is the first), and what the teacher thought of each of its tokens."),
    ] = None,
    split: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Split of the sequence; the first by default.", show_default=False),
    ] = None,
    temperature: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(
            help="T of the choices and masses (p is always at 1); the smallest declared one by default.",
            show_default=False,
        ),
    ] = None,
    top: Annotated[int, typer.Option(min=1, max=100, help="Choices to name for each token.")] = 5,
    html: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Write a self-contained page with the sequence, or the first of each split.", metavar="FILE"),
    ] = None,
) -> None:
    """Facts about a cache: teacher, data, what is kept, sizes, kept mass; or one of its sequences, token by token."""
    from kdcache.cache.store import open_cache
    from kdcache.inspection import Speller, look_at

    if html is not None:
        _refuse_page(html)
    if sequence is None and html is None and not (split is None and temperature is None):
        raise typer.BadParameter("--split and --temperature are for --sequence and --html")
    opened = open_cache(cache, progress=console_progress())
    names = [split] if split is not None else list(opened.splits)
    wanted = [(names[0], sequence)] if sequence is not None else []
    if html is not None and sequence is None:
        wanted = [(name, i) for name in names for i in range(min(_SHOWN, len(opened.split(name))))]
    speller = Speller(opened.vocabulary() if wanted else [])
    views = [look_at(opened, speller, split=n, index=i, temperature=temperature, top=top) for n, i in wanted]
    if sequence is not None:
        _show(views[0])
    else:
        say_lines([*fact_lines(_facts(opened)), *split_lines(opened)])
    if html is not None:
        from kdcache.cache.files import write_file
        from kdcache.inspection_html import page

        write_file(html, page(opened, _facts(opened), views).encode())
        say(f"page in {html}; it discloses the text that it shows")


def _refuse_page(path: Path) -> None:
    """A page goes where pages go: not over the files of a cache."""
    from kdcache.cache.layout import PLAN_FILE
    from kdcache.errors import StorageError

    folder = path.parent
    if not folder.is_dir() or path.is_dir():
        raise StorageError(f"--html should name a file in a directory that is there, found {path}")
    if (folder / PLAN_FILE).exists() or (folder.parent / PLAN_FILE).exists():
        raise StorageError(f"{folder} belongs to a cache; write the page somewhere else")


@app.command()
def verify(
    cache: CacheArgument,
    rescore: Annotated[
        int,
        typer.Option(min=0, help="Run the teacher again on this many sequences, and compare.", show_default=False),
    ] = 0,
    teacher: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="Folder or id of the teacher to run again; without it, what the cache gives as its teacher's name is loaded.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            min=0,
            help="Draw the sequences to run again as an earlier --rescore did; a new seed by default.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Check every byte of a cache; exit 0 when it is whole, 1 when it is not."""
    from kdcache.cache.directory import read_plan
    from kdcache.cache.remote import is_url
    from kdcache.cache.store import local_directory
    from kdcache.cache.verify import examine
    from kdcache.progress import Silent

    if not rescore and (teacher is not None or seed is not None):
        raise typer.BadParameter("--teacher and --seed are for --rescore N")
    progress = Silent() if as_json else console_progress()
    directory = local_directory(cache, progress=progress)
    progress.begin("verify", len(read_plan(directory).shards), "shards")
    try:
        found = examine(directory, on_shard=lambda size: progress.advance(1))
    finally:
        progress.end()
    scored = None
    if rescore and found.whole:
        from kdcache.evaluate.rescore import rescore as run_again

        scored = run_again(directory, sequences=rescore, teacher=teacher, seed=seed, progress=progress)
    if as_json:
        say(json.dumps(_record(cache, found, scored), indent=1))
    else:
        say_lines(_verification_lines(cache, found))
        if is_url(cache):
            say(f"(what was checked is the copy in {directory}, as it is read when {cache} is opened)")
            if not found.whole:
                say(
                    f"kdcache repair {quote(str(directory))} --from {quote(cache)} fetches it again; so does opening it"
                )
        if scored is not None:
            _show_rescore(scored)
        elif rescore:
            say("the teacher was not run again: what is not whole cannot be compared")
    if not found.whole or (scored is not None and not scored.explained):
        raise typer.Exit(1)


def _verification_lines(cache: str, found: Verification) -> list[str]:
    lines = [f"{f.file}: {f.problem}" for f in found.findings]
    lines += [f"note: {f.file}: {f.problem}" for f in found.notes[:_NOTES_SHOWN]]
    if len(found.notes) > _NOTES_SHOWN:
        lines.append(f"note: and {len(found.notes) - _NOTES_SHOWN:,} more files that do not belong to a cache")
    if found.whole:
        return [*lines, f"{cache} is whole: {found.shards} shards, hashes, values and totals agree"]
    count = len(found.findings)
    return [*lines, f"{cache} is not whole: {count} finding{'s' if count > 1 else ''}"]


def _record(cache: str, found: Verification, scored: Rescore | None) -> dict[str, Any]:
    def listed(findings: list[Finding]) -> list[dict[str, str]]:
        return [{"file": f.file, "problem": f.problem} for f in findings]

    return {
        "cache": cache,
        "cache_id": found.cache_id,
        "plan_digest": found.plan_digest,
        "whole": found.whole,
        "findings": listed(found.findings),
        "notes": listed(found.notes),
        "shards": found.shards,
        "bytes": found.bytes,
        "seconds": round(found.seconds, 3),
        "rescore": None if scored is None else scored.as_record(),
    }


def _show_rescore(scored: Rescore) -> None:
    from kdcache.evaluate.disagreement import COLUMNS, FALSE_ALARM, NOT_COMPARED

    say(
        f"{scored.teacher} run again on {scored.sequences:,} sequences, {scored.positions:,} positions, drawn with --seed "
        f"{scored.seed}. Nats that the cache is off by: mean and largest; beyond the format's rounding: 99th percentile and "
        "largest; control: the same of the teacher with itself in other batches"
    )
    if scored.drawings:
        say(f"drawn: off what chance gives on average, and beyond what it gives {1 - FALSE_ALARM:.3%} of the time")
    say_table(text_table(COLUMNS, scored.table()))
    uncompared = scored.draws == NOT_COMPARED
    if uncompared:
        say(f"draws {scored.draws}; only whether chance could have made them was looked at")
    if not scored.explained:
        say(
            "the cache is off by more than rounding and the teacher's own noise explain: it is not what this teacher says, "
            "or was made on a machine that computes otherwise"
        )
        return
    verdict = "but for the draws, which were not compared" if uncompared else "it is what this teacher says"
    say(f"rounding and the teacher's own noise explain what the cache is off by: {verdict}")


def _facts(opened: Cache) -> dict[str, str]:
    """What plan and manifest state, and where the bytes go."""
    from kdcache.errors import KdcacheError
    from kdcache.inspection import size_by_part

    try:
        parts = ", ".join(f"{part} {size:.1f}" for part, size in size_by_part(opened).items())
        by_part = f"{parts} bytes per position in the first shard, each compressed alone"
    except KdcacheError as exc:
        by_part = f"unknown, {exc}"  # facts that plan and manifest state are there all the same
    return {**cache_facts(opened), "by part": by_part}


def _show(view: SequenceView) -> None:
    """The text in colours, then a line for each target."""
    from rich.console import Console
    from rich.text import Text

    from kdcache.inspection import SURPRISE

    console = Console()
    console.print(Text(view.title, style="bold"), soft_wrap=True)
    bounds = [f"{b:g}" for b in SURPRISE]
    names = [
        f"at least {bounds[0]}",
        *(f"{b} to {a}" for a, b in pairwise(bounds)),
        f"under {bounds[-1]}",
    ]
    key = Text("probability at T = 1: ")
    for name, colour in zip(names, _COLOURS, strict=True):
        key.append(name, colour).append("  ")
    console.print(key.append("not learnt", "dim"), soft_wrap=True)
    text = Text()
    for token in view.tokens:
        text.append(token.text, _style(token))
    console.print(Text("\n").append_text(text).append("\n"), soft_wrap=True)
    console.print(_choices(view))


def _style(token: TokenView) -> str:
    return "dim" if token.surprise is None else _COLOURS[token.surprise]


def _choices(view: SequenceView) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    table.add_column("#", justify="right")
    table.add_column("token", overflow="fold")
    table.add_column("p", justify="right")
    table.add_column(f"choices at T = {view.temperature:g} (~ drawn)", overflow="fold", ratio=1)
    for name in ("kept", "rest", "drawn"):
        table.add_column(name, justify="right")
    for place, token in enumerate(view.tokens):
        if token.probability is None:
            continue
        cells = [Text(str(place)), Text(token.name, _style(token)), Text(f"{token.probability:.4f}")]
        if token.row is None:
            table.add_row(*cells, Text("row left empty", "dim"))
            continue
        row = token.row
        numbers = (f"{row.kept:.4f}", f"{row.rest:.4f}", f"{row.tail:,}")
        table.add_row(*cells, _listed(row, token), *(Text(n) for n in numbers))
    return table


def _listed(row: Distribution, token: TokenView) -> Text:
    from rich.text import Text

    text = Text()
    for choice in row.choices:
        own = choice.token == token.name
        text.append(choice.token, "bold underline" if own else "bold")
        text.append(f" {'~' if choice.drawn else ''}{choice.probability:.3f}  ")
    text.rstrip()
    return text
