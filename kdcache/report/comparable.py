"""Which figures of a report may be held against each other, and what its caches are.

Perplexities compare over the same validation tokens; divergences from the teacher over the same cache besides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdcache.errors import KdcacheError
from kdcache.recipe_keys import value_at
from kdcache.report.collect import Collection, Row
from kdcache.run_record import AFTER, BEFORE, TEACHER

# Scores of one model that differ by less are one: batches of another size sum in another order.
_SAME = 1e-3


@dataclass(frozen=True)
class CacheFacts:
    """A cache of the rows; sizes are None where it cannot be opened, and ``note`` says why."""

    id: str
    directory: str
    bytes: int | None = None
    positions: int | None = None
    validation: str | None = None
    note: str = ""

    @property
    def bytes_per_position(self) -> float | None:
        """Compressed bytes of all shards over all positions."""
        return None if self.bytes is None or not self.positions else self.bytes / self.positions


@dataclass(frozen=True)
class Reference:
    """A model that several rows share: the teacher, or the student before training."""

    model: str
    row: Row
    shared_by: int
    of: int

    @property
    def name(self) -> str:
        """Its model, and whose it is where not all rows share it."""
        return self.model if self.shared_by == self.of else f"{self.model} ({self.row.name})"


class Comparison:
    """The finished rows of a collection in sets of equal validation tokens."""

    def __init__(self, found: Collection) -> None:
        self.rows = found.finished
        self.caches = {facts.id: facts for facts in _caches(self.rows)}
        self.sets: list[list[Row]] = _grouped(self.rows, self._scored_on)
        self.divergence_sets: list[list[Row]] = _grouped(self.rows, self._diverges_from)

    def cache_of(self, row: Row) -> CacheFacts:
        """The cache that a finished row was trained from."""
        assert row.record is not None
        return self.caches[row.record.values["cache_id"]]

    def set_name(self, row: Row) -> str:
        """A letter for the validation tokens of a finished row."""
        return _letter(next(i for i, rows in enumerate(self.sets) if row in rows))

    def references(self) -> list[Reference]:
        """Each distinct teacher and student before training, in the order of the rows."""
        return [
            reference for model in (TEACHER, BEFORE) for rows in self.sets for reference in self._distinct(model, rows)
        ]

    def warnings(self) -> list[str]:
        """What must not be compared."""
        told = []
        if len(self.sets) > 1:
            sets = "; ".join(f"{_letter(i)}: {_named(rows)}" for i, rows in enumerate(self.sets))
            told.append(
                "These rows were scored on different validation tokens, so their losses, perplexities and KLs are comparable "
                f"only within a set ({sets})."
            )
        elif len(self.divergence_sets) > 1:
            sets = "; ".join(_named(rows) for rows in self.divergence_sets)
            told.append(
                "The KLs to the teacher were measured with different caches or at different temperatures and are comparable only "
                f"within a set ({sets}); the perplexities are over the same tokens."
            )
        if any(row.record and row.record.scores[AFTER].get("kl_is_bound") for row in self.rows):
            told.append(
                "KLs from caches without drawn entries are lower bounds: the mass outside the entries counts as one bucket."
            )
        return told

    def _distinct(self, model: str, rows: list[Row]) -> Iterator[Reference]:
        found: list[list[Row]] = []
        for row in rows:
            loss = row.score(model, "loss")
            if loss is None:
                continue
            group = next((g for g in found if _close(g[0].score(model, "loss"), loss)), None)
            if group is None:
                found.append([row])
            else:
                group.append(row)
        yield from (Reference(model, group[0], len(group), len(self.rows)) for group in found)

    def _scored_on(self, row: Row) -> tuple[object, ...]:
        facts = self.cache_of(row)
        return (facts.validation or facts.id, row.score(AFTER, "tokens"))

    def _diverges_from(self, row: Row) -> tuple[object, ...]:
        return (self.cache_of(row).id, row.score(AFTER, "tokens"), row.score(AFTER, "kl_temperature"))


def _close(a: float | None, b: float) -> bool:
    return a is not None and (abs(a - b) <= _SAME * abs(b) or (a != a and b != b))


def _grouped(rows: list[Row], key: Callable[[Row], object]) -> list[list[Row]]:
    groups: dict[object, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return list(groups.values())


def _named(rows: list[Row], most: int = 12) -> str:
    more = f" and {len(rows) - most} more" if len(rows) > most else ""
    return ", ".join(row.name for row in rows[:most]) + more


def _letter(index: int) -> str:
    return chr(ord("A") + index) if index < 26 else f"set {index + 1}"


def _caches(rows: list[Row]) -> Iterator[CacheFacts]:
    """The caches that rows were trained from, opened where they lie on this machine."""
    directories: dict[str, dict[tuple[str, str], None]] = {}
    for row in rows:
        assert row.record is not None
        told = value_at(row.record.values["recipe"], "cache.directory")
        own = row.record.values["cache_id"]
        directories.setdefault(own, {})[str(told), _first_of_mixture(row.record.values) or own] = None
    for cache_id, places in directories.items():
        opened = [_opened(cache_id, *place) for place in places]
        yield next((facts for facts in opened if facts.bytes is not None), opened[0])


def _first_of_mixture(values: dict[str, Any]) -> str | None:
    """The cache id of a mixture's first cache, whose sequences are those of all."""
    mixed = values.get("mixture")
    first = mixed[0] if isinstance(mixed, list) and mixed else None
    found = first.get("cache_id") if isinstance(first, dict) else None
    return found if isinstance(found, str) else None


def _opened(cache_id: str, directory: str, expected: str) -> CacheFacts:
    from kdcache.cache.reader import open_cache
    from kdcache.cache.remote import is_url

    if is_url(directory):
        return CacheFacts(cache_id, directory, note="it lies at a URL, which a report does not read")
    try:
        cache = open_cache(Path(directory), keep=1)
    except (KdcacheError, OSError, ValueError) as exc:
        return CacheFacts(cache_id, directory, note=f"it cannot be opened: {exc}")
    if cache.id != expected:
        return CacheFacts(cache_id, directory, note=f"another cache lies there now, {cache.id[:12]}")
    validation = cache.plan.split_index("validation")
    data, splits = cache.plan.data, cache.plan.data.splits
    text = (cache.plan.tokenizer.fingerprint, data.prompt, data.template_sha256, data.system, data.date)
    stated = None if validation is None else repr((splits[validation].fingerprint, *text))
    if expected != cache_id:
        return CacheFacts(cache_id, directory, validation=stated, note="it is a mixture, and this its first cache")
    return CacheFacts(
        cache_id,
        directory,
        bytes=sum(shard.bytes for shard in cache.manifest.shards),
        positions=sum(split.positions for split in splits),
        validation=stated,
    )
