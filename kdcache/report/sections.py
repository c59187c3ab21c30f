"""A collection of rows -> the document of its report, section by section."""

from __future__ import annotations

import json
from typing import Any

from kdcache import __version__
from kdcache.report.blocks import Block, Cell, Code, Column, Document, Folded, Line, Section, Table, Text
from kdcache.report.collect import Collection, Row
from kdcache.report.comparable import Comparison
from kdcache.report.effects import Effect, effects
from kdcache.report.judgements import inference, order, samples, tasks
from kdcache.report.leaderboard import figure_text, leaderboard, rank
from kdcache.report.panels import bars, effect_figure, evaluation_curve, traces
from kdcache.report.recipes import Base, bases, value_text
from kdcache.report.spent import spent
from kdcache.run_record import AFTER


def compose(found: Collection, *, title: str, folder: str) -> Document:
    """The whole report.

    Args:
        found: its rows.
        title: its heading.
        folder: where the report will lie, as commands should name it.
    """
    comparison, chosen = Comparison(found), bases(found)
    factors = {base.file: sweep.factors for base, sweep in zip(chosen, found.sweeps, strict=False)}
    judged = effects(chosen, comparison, factors)
    sections = [
        Section(
            "Leaderboard",
            (
                *(Text(warning, "warning") for warning in comparison.warnings()),
                leaderboard(found, comparison, chosen),
                *order(comparison),
                *(Text(f"{row.name}: {note}.", "note") for row in found.rows for note in row.notes),
            ),
        ),
        Section("Loss and perplexity", (bars(found.rows, comparison),) if comparison.rows else ()),
        Section("Training", tuple(f for f in (traces(found.rows), evaluation_curve(found.rows)) if f is not None)),
        Section("Effect of each factor", _effects(judged)),
        Section("Tasks and generations", tasks(found)),
        Section("Samples side by side", samples(found)),
        Section("Inference", inference(found)),
        Section("Bytes and hours", spent(found, comparison)),
        Section("Recipes", tuple(block for base in chosen for block in _recipes(base, folder, many=len(chosen) > 1))),
        Section("Versions, machines, caches", _versions(found, comparison)),
    ]
    return Document(title, (Text(_summary(found)),), tuple(s for s in sections if s.blocks))


def _summary(found: Collection) -> str:
    states = [row.state for row in found.rows]
    counts = [f"{states.count(s)} {s}" for s in ("finished", "failed", "stopped", "running", "waiting") if s in states]
    best = min(found.finished, key=rank, default=None)
    students = f"{len(states)} student" + ("s" if len(states) > 1 else "")
    told = f"{students}: {', '.join(counts)}."
    if best is not None:
        told += f" Best perplexity {figure_text(best.score(AFTER, 'perplexity'))}, of {best.name}."
    return f"{told} Written by kdcache {__version__}."


def _effects(judged: list[Effect]) -> tuple[Block, ...]:
    figure = effect_figure(judged)
    if figure is None:
        return ()
    lines = [
        Line((
            Cell(effect.title, effect.title),
            Cell(level.value, level.value),
            Cell(figure_text(level.mean), level.mean),
            Cell(figure_text(min(p for _, p in level.points)), min(p for _, p in level.points)),
            Cell(str(len(level.points)), len(level.points)),
        ))
        for effect in judged
        if effect.alone
        for level in effect.levels
    ]  # fmt: skip
    columns: tuple[Column, ...] = (
        Column("factor", numeric=False),
        Column("value", numeric=False),
        Column("mean perplexity"),
    )
    columns += (Column("best"), Column("rows"))
    return (figure, Table("Mean perplexity by value", columns, tuple(lines))) if lines else (figure,)


def _recipes(base: Base, folder: str, *, many: bool) -> tuple[Block, ...]:
    """The base, how each row differs from it, and the command that repeats it."""
    alone = all(row.sweep is None for row in base.rows)
    whose = f"of {base.name}" if not alone else f"of {base.name}, the first run" if len(base.rows) > 1 else "of the run"
    told = (
        f"The commands below start from {folder}/{base.file}, the {'recipe' if alone else 'base recipe'} {whose}. Its paths are "
        "relative to the directory in which the command is run."
    ) + (f" {base.note}" if base.note else "")
    blocks: list[Block] = [Text(told), Folded(f"{base.file} ({whose})" if many else base.file, (Code(base.yaml()),))]
    for row in base.rows:
        changed = base.changed(row)
        lines = [
            Line((Cell(key, key), Cell(value_text(before)), Cell(value_text(after))))
            for key, (before, after) in changed.items()
        ]
        columns = (Column("key", numeric=False), Column("base", numeric=False), Column(row.name, numeric=False))
        table: tuple[Block, ...] = (Text("No key differs from the base."),)
        if lines:
            table = (Table(f"Keys of {row.name} that differ from the base", columns, tuple(lines)),)
        names = ", ".join(changed) or "as the base"
        blocks.append(Folded(f"{row.name}: {names}", (*table, Code(base.command(row, folder)))))
    return tuple(blocks)


def _versions(found: Collection, comparison: Comparison) -> tuple[Block, ...]:
    """Versions, machines and caches, each with the rows that they hold for."""
    lines = []
    for row in found.finished:
        lines.append((row.name, _versions_of(row), _machine(row)))
    groups: dict[tuple[str, str], list[str]] = {}
    for name, versions, machine in lines:
        groups.setdefault((versions, machine), []).append(name)
    machines = tuple(
        Line((Cell(", ".join(names)), Cell(versions), Cell(machine))) for (versions, machine), names in groups.items()
    )
    columns = (Column("rows", numeric=False), Column("versions", numeric=False), Column("machine", numeric=False))
    blocks: list[Block] = [Table("Versions and machines", columns, machines)] if machines else []
    caches = tuple(Line((Cell(facts.id), Cell(facts.directory))) for facts in comparison.caches.values())
    if caches:
        blocks.append(
            Table("Cache ids", (Column("cache id", numeric=False), Column("directory", numeric=False)), caches)
        )
    directories = tuple(Line((Cell(row.name), Cell(str(row.directory)), Cell(row.state))) for row in found.rows)
    columns = (Column("row", numeric=False), Column("directory", numeric=False), Column("state", numeric=False))
    return (*blocks, Table("Where the rows lie", columns, directories))


def _versions_of(row: Row) -> str:
    assert row.record is not None
    values = row.record.values
    versions = {"kdcache": values.get("kdcache", "unnamed"), **_mapping(values.get("versions"))}
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _machine(row: Row) -> str:
    assert row.record is not None
    hardware = _mapping(row.record.values.get("hardware"))
    device = _mapping(hardware.get("device"))
    parts = [" ".join(str(v) for v in (device.get("name"), device.get("capability")) if v)]
    if device.get("memory_bytes"):
        parts.append(f"{json.dumps(device['memory_bytes'])} bytes, {device.get('count')} of them")
    parts += [f"{hardware['cpus']} CPUs"] if "cpus" in hardware else []
    parts += [str(hardware[key]) for key in ("system", "machine") if key in hardware]
    processes = row.record.values.get("processes")
    parts += [f"{processes} processes"] if processes not in (None, 1) else []
    return ", ".join(part for part in parts if part)


def _mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
