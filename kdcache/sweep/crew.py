"""The workers of a sweep: started when there is something for them, replaced when they fail."""

from __future__ import annotations

from typing import Any

from kdcache.errors import TrainingError
from kdcache.recipe import Recipe
from kdcache.sweep.board import RowState
from kdcache.sweep.rows import Row
from kdcache.sweep.worker import TRAIN, Worker, kind_of

_POLL_SECONDS = 0.25


class Crew:
    """At most ``jobs`` workers, each with a number that chooses its GPU.

    Args:
        jobs: how many there are at most.
    """

    def __init__(self, jobs: int) -> None:
        self._jobs = jobs
        self._at: dict[int, Worker] = {}

    @property
    def workers(self) -> list[Worker]:
        """Those that live, as far as is known."""
        return list(self._at.values())

    def first(self) -> Worker:
        """The worker that is there before there are rows, started where it is not."""
        return self._started(0)

    def answer(self, worker: Worker) -> tuple[Any, ...]:
        """What a worker says to a check, waited for.

        Raises:
            TrainingError: its process has ended.
        """
        while True:
            worker.connection.poll(_POLL_SECONDS)
            for news in worker.news():
                if news[0] in ("checked", "refused", "failed"):
                    worker.row = None
                    return news
            death = worker.death()
            if death is not None:
                raise TrainingError(f"row {worker.row} cannot be checked: {death}")

    def free(self) -> int | None:
        """The number of a worker that has nothing to do, or is yet to be started; None where all are at work."""
        return next((n for n in range(self._jobs) if n not in self._at or self._at[n].row is None), None)

    def next_for(self, number: int, waiting: list[RowState]) -> RowState:
        """The first row that has the base the worker holds, or the first of all."""
        base = self._at[number].base if number in self._at else None
        return next((s for s in waiting if base is not None and _base_of(s.row.recipe) == base), waiting[0])

    def train(self, number: int, row: Row) -> int | None:
        """Give a row to a worker, to a fresh one where the last row has left settings behind; returns its process id."""
        worker, kind = self._started(number), kind_of(row.recipe)
        if worker.kind not in (None, kind):
            self.replace(worker)
            worker = self._started(number)
        worker.kind, worker.base = kind, _base_of(row.recipe)
        worker.give(TRAIN, row.name, row.recipe)
        return worker.pid

    def replace(self, worker: Worker) -> None:
        """End a worker; another takes its number when there is a row for it."""
        worker.stop()
        del self._at[worker.number]

    def stop(self) -> None:
        """End all of them."""
        for worker in self.workers:
            self.replace(worker)

    def _started(self, number: int) -> Worker:
        if number not in self._at:
            self._at[number] = Worker(number, self._jobs)
        return self._at[number]


def _base_of(recipe: Recipe) -> dict[str, Any]:
    return {} if recipe.student is None else recipe.student.model_dump(exclude={"lora"})
