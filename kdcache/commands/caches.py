"""Commands on a cache directory: look at it, check it."""

from __future__ import annotations

import typer

from kdcache.commands.app import CacheArgument, app, console_progress, say, say_lines
from kdcache.summary import cache_lines


@app.command()
def inspect(cache: CacheArgument) -> None:
    """Facts about a cache: teacher, data, what is kept, sizes, kept mass."""
    from kdcache.cache.reader import open_cache

    say_lines(cache_lines(open_cache(cache)))


@app.command()
def verify(cache: CacheArgument) -> None:
    """Check every byte of a cache; exit 0 when it is whole, 1 when it is not."""
    from kdcache.cache.reader import read_plan
    from kdcache.cache.verify import verify as check

    plan, progress = read_plan(cache), console_progress()
    progress.begin("verify", len(plan.shards), "shards")
    try:
        findings = check(cache, on_shard=lambda size: progress.advance(1))
    finally:
        progress.end()
    for finding in findings:
        say(f"{finding.file}: {finding.problem}")
    if findings:
        say(f"{cache} is not whole: {len(findings)} findings")
        raise typer.Exit(1)
    say(f"{cache} is whole: {len(plan.shards)} shards, hashes, values and totals agree")
