"""A sweep on one screen: rows -> checks -> workers -> sweep.json.

Every row is checked before the first one is trained. Rows that an earlier sitting finished are kept, those it left half done go
on from their checkpoints, those that failed are tried again.
"""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdcache import errors
from kdcache.cache.files import write_file
from kdcache.errors import KdcacheError, StorageError, TrainingError
from kdcache.progress import Progress, Silent
from kdcache.recipe import Recipe
from kdcache.run_record import AFTER, TABLE_FILE, RunRecord, load_record
from kdcache.sweep.board import FAILED, FINISHED, RUNNING, STOPPED, WAITING, Board, Earlier, RowState, SweepDirectory
from kdcache.sweep.crew import Crew
from kdcache.sweep.ready import ends_of_search, ready_rows, rows_with_earlier
from kdcache.sweep.rows import Row, is_trial
from kdcache.sweep.table import leaderboard_markdown
from kdcache.sweep.worker import CHECK, ENDS, kind_of

if TYPE_CHECKING:
    from kdcache.sweep.search import Search

_TICK_SECONDS, _WRITE_SECONDS = 0.25, 15.0
LEADERBOARD = "leaderboard.md"


def run_sweep(
    recipe: Recipe,
    *,
    jobs: int = 1,
    overwrite: bool = False,
    after_row: Callable[[RunRecord], Any] | None = None,
    progress: Progress | None = None,
    watch: Callable[[Board], None] | None = None,
) -> Board:
    """Train every row of the recipe's sweep; the same call goes on with one that was stopped.

    Rows are trained by processes of their own, started anew where one fails or is killed, so a script that calls this guards its
    main part by ``if __name__ == "__main__"``. The caches must be complete.

    Args:
        recipe: with a section ``sweep``; its ``output`` is the sweep's directory.
        jobs: rows at a time, each on its own GPU where there are as many, or else on a share of the CPU cores.
        overwrite: forget what an earlier sitting did with these rows.
        after_row: called with the record of every row that has been trained, such as `kdcache.report.write_pages`, while the
            next one is at work.
        progress: told in words.
        watch: called with the board several times a second, and whenever a row ends.

    Returns:
        The board: every row with its state, and of the finished ones the scores.

    Raises:
        KdcacheError: a row has an impossible key or value, or does not fit its cache; the directory holds another sweep, or
            another process is at work in it. What goes wrong with a row that is trained is that row's state and no error.
    """
    if os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
        raise TrainingError("a sweep starts its processes itself: run kdcache sweep without a launcher, with --jobs")
    rows = ready_rows(recipe)
    with SweepDirectory(Path(recipe.output)) as directory:
        return _Sweep(recipe, rows, directory, jobs, after_row, progress or Silent(), watch).run(overwrite=overwrite)


class _Sweep:
    """The work of `run_sweep`, in a directory that is held."""

    def __init__(
        self,
        recipe: Recipe,
        rows: list[Row],
        directory: SweepDirectory,
        jobs: int,
        after_row: Callable[[RunRecord], Any] | None,
        progress: Progress,
        watch: Callable[[Board], None] | None,
    ) -> None:
        self._recipe = recipe
        self._rows = rows
        self._directory = directory
        self._progress = progress
        self._watch = watch or (lambda board: None)
        self._board = Board(recipe, jobs)
        self._crew = Crew(jobs)
        self._after_row = after_row
        self._trained: list[RowState] = []
        self._search: Search | None = None
        self._written = 0.0
        self._warned: set[str] = set()

    def run(self, *, overwrite: bool) -> Board:
        board, earlier = self._board, self._directory.earlier()
        try:
            # It imports while the rows are looked at.
            self._crew.first()
            if overwrite:
                checked: list[RowState] = [RowState(row) for row in self._rows]
            else:
                checked = rows_with_earlier(self._recipe, self._rows, earlier)
                board.earlier_seconds = earlier.seconds
            self._check(checked, overwrite=overwrite)
            if overwrite:
                names = [row["directory"] for row in earlier.rows] + [row.directory for row in self._rows]
                self._directory.forget(list(dict.fromkeys(names)))
            board.rows = checked
            self._write()
            self._begin_search(earlier)
            self._train()
        finally:
            # However it ends: no process stays, and sweep.json says how far it came.
            self._crew.stop()
            if board.rows:
                for state in board.having(RUNNING):
                    state.leave(STOPPED)
                board.ended = time.monotonic()
                self._write()
        return board

    def _check(self, states: list[RowState], *, overwrite: bool) -> None:
        """Let a worker look at every row; what is finished is known after that.

        Raises:
            KdcacheError: a row is refused; it is named.
        """
        worker = self._crew.first()
        for state in [*states, *(RowState(row) for row in ends_of_search(self._recipe))]:
            worker.give(CHECK, state.name, state.row.recipe, overwrite=overwrite)
            kind, *content = self._crew.answer(worker)
            if kind == "refused" and content[0] == errors.BrokenRunError.__name__:
                # What lies there is nothing to go on with, and nothing to remove unasked; the other rows can do without.
                state.leave(FAILED, content[1])
                continue
            if kind == "refused":
                raise getattr(errors, content[0])(f"row {state.name}: {content[1]}")
            if kind == "failed":
                raise RuntimeError(f"row {state.name} cannot be checked\n{content[-1]}")
            if content[0] is not None:
                state.scores = content[0]
                state.leave(FINISHED)
                if not (self._directory.path / state.row.directory / TABLE_FILE).exists():
                    self._trained.append(state)
        if len({kind_of(state.row.recipe) for state in states}) > 1:
            self._crew.replace(worker)

    def _begin_search(self, earlier: Earlier) -> None:
        if self._recipe.sweep is None or not self._recipe.sweep.search:
            return
        from kdcache.sweep.search import Search

        self._search = Search(self._recipe, self._directory.path)
        self._search.agree_with(self._board, earlier)
        self._write()

    def _train(self) -> None:
        board, crew = self._board, self._crew
        while True:
            self._hand_out()
            self._look_after()
            if not board.having(RUNNING):
                return
            wait([w.connection for w in crew.workers], timeout=_TICK_SECONDS)
            for worker in crew.workers:
                for kind, *content in worker.news():
                    self._hear(board[worker.row] if worker.row else None, kind, content)
                    if kind in ENDS:
                        worker.row, worker.spoilt = None, kind != "trained"
                death = worker.death()
                if death is not None and worker.row is not None:
                    self._lose(board[worker.row], death)
                # What an error has left behind in a process is nothing to train the next row on.
                if death is not None or worker.spoilt:
                    crew.replace(worker)
            if time.monotonic() - self._written > _WRITE_SECONDS:
                self._write()
            self._watch(board)

    def _hand_out(self) -> None:
        """Give every free worker a row, of those that are waiting or still to be asked for."""
        board, changed = self._board, False
        while (number := self._crew.free()) is not None:
            waiting = board.having(WAITING)
            if not waiting:
                asked = self._ask()
                if asked is None:
                    break
                waiting, changed = [asked], True
                if asked.state == FAILED:
                    continue
            state = self._crew.next_for(number, waiting)
            state.begin(self._crew.train(number, state.row))
            changed = True
        if changed:
            self._write()
            self._watch(board)

    def _look_after(self) -> None:
        """Have the pages of what was trained written, now that the next rows are at work."""
        trained, self._trained = self._trained, []
        for state in trained if self._after_row is not None else []:
            try:
                assert self._after_row is not None
                self._after_row(load_record(self._directory.path / state.row.directory))
            except KdcacheError as exc:  # the student is there all the same
                self._progress.warning(f"{state.name}: {exc}")
            except Exception as exc:  # whatever a page stumbles over, other rows are still at work
                line = " ".join(str(exc).split())[:400]
                self._progress.warning(f"{state.name}: its pages are not written, {type(exc).__name__}: {line}")
                self._note(state, traceback.format_exc())

    def _ask(self) -> RowState | None:
        """The next trial of the search as a row; one whose values do not go together has failed already."""
        if self._search is None or not self._search.wants_more():
            return None
        state = self._search.ask()
        self._board.rows.append(state)
        return state

    def _hear(self, state: RowState | None, kind: str, content: list[Any]) -> None:
        if state is None:
            return
        if kind == "trained":
            self._finish(state, content[0])
        elif kind == "refused":
            self._fail(state, content[1])
        elif kind == "failed":
            self._note(state, content[1])
            self._fail(state, content[0])
        elif kind == "warning":
            if content[0] not in self._warned:
                self._warned.add(content[0])
                self._progress.warning(f"{state.name}: {content[0]}")
        else:
            state.hear(kind, content)

    def _note(self, state: RowState, text: str) -> None:
        """Keep a traceback, where there is room for it."""
        try:
            self._directory.note_failure(state.name, text)
        except StorageError as exc:
            self._progress.warning(f"{state.name}: {exc}")

    def _finish(self, state: RowState, scores: dict[str, dict[str, float]]) -> None:
        state.scores = scores
        state.leave(FINISHED)
        self._trained.append(state)
        if self._search is not None and is_trial(state.name):
            self._search.tell(state.name, scores[AFTER]["loss"])
        self._write()

    def _fail(self, state: RowState, error: str) -> None:
        state.leave(FAILED, " ".join(error.split()))
        self._write()

    def _lose(self, state: RowState, death: str) -> None:
        """The process of a row is gone: what it has written stays, and the next sitting goes on from there."""
        run = self._directory.path / state.row.directory
        if (run / "run.json").exists():
            # It was done, and had not yet said so.
            self._finish(state, load_record(run).scores)
        else:
            self._fail(state, f"{death}; the same command goes on from its last checkpoint")

    def _write(self) -> None:
        self._board.write()
        write_file(self._directory.path / LEADERBOARD, leaderboard_markdown(self._board).encode())
        self._written = time.monotonic()
