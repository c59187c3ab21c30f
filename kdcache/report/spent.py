"""Bytes and hours: what the caches take, and how long rows and sweeps ran."""

from __future__ import annotations

from kdcache.report.blocks import Block, Cell, Column, Line, Table, Text
from kdcache.report.collect import Collection
from kdcache.report.comparable import Comparison
from kdcache.report.leaderboard import figure_text


def spent(found: Collection, comparison: Comparison) -> tuple[Block, ...]:
    """Tables of caches and of hours, with what is not known."""
    blocks: list[Block] = []
    if comparison.caches:
        blocks.append(_caches(comparison))
        blocks += [
            Text(f"Cache {facts.id[:12]}: {facts.note}; its size is left out.", "note")
            for facts in comparison.caches.values()
            if facts.note
        ]
    blocks.append(_hours(found))
    short = [row.name for row in found.finished if row.seconds_of == "last sitting" and _resumed(row.record)]
    if short:
        blocks.append(
            Text(
                f"Of {', '.join(short[:12])} only the last sitting is known: run.json keeps no more of a resumed run.",
                "note",
            )
        )
    blocks.append(Text("The teacher run is paid once for all rows; a cache does not record how long it took.", "note"))
    return tuple(blocks)


def _caches(comparison: Comparison) -> Table:
    lines = []
    for facts in comparison.caches.values():
        rows = sum(row.record is not None and row.record.values["cache_id"] == facts.id for row in comparison.rows)
        lines.append(
            Line((
                Cell(facts.id[:12], facts.id, facts.id),
                Cell(facts.directory),
                Cell(str(rows), rows),
                Cell(size(facts.bytes), facts.bytes),
                Cell(figure_text(facts.positions, ",.0f"), facts.positions),
                Cell(figure_text(facts.bytes_per_position, ".1f"), facts.bytes_per_position),
            ))
        )  # fmt: skip
    columns: tuple[Column, ...] = (
        Column("cache", numeric=False),
        Column("directory", numeric=False),
        Column("students"),
    )
    columns += (Column("size"), Column("positions"), Column("bytes each", title="Bytes per position"))
    return Table("Caches that the students were trained from", columns, tuple(lines))


def _hours(found: Collection) -> Table:
    lines = []
    groups = [(s.name, [row for row in found.rows if row.sweep == i], s) for i, s in enumerate(found.sweeps)]
    alone = [row for row in found.rows if row.sweep is None]
    for name, rows, sweep in [*groups, *([("runs by themselves", alone, None)] if alone else [])]:
        own = sum(row.seconds or 0.0 for row in rows)
        wall = None if sweep is None else sweep.seconds
        jobs = None if sweep is None else sweep.jobs
        lines.append(
            Line((
                Cell(name, name), Cell(str(len(rows)), len(rows)), Cell(duration(own), own),
                Cell(duration(wall), wall), Cell(figure_text(jobs, "d"), jobs),
            ))
        )  # fmt: skip
    columns = (
        Column("of", numeric=False),
        Column("rows"),
        Column("time of the rows", title="Sum over the rows, failed ones included"),
        Column("time by the clock", title="Of the whole sweep, all sittings"),
        Column("jobs at once"),
    )
    return Table("Time", columns, tuple(lines))


def size(count: float | None) -> str:
    """Bytes for people."""
    if count is None:
        return "-"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1024
    return ""


def duration(seconds: float | None) -> str:
    """Seconds, minutes or hours, whichever reads best."""
    if seconds is None:
        return "-"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:,.1f} h"


def _resumed(record: object) -> bool:
    values = getattr(record, "values", {})
    return bool(values.get("resumed_at"))
