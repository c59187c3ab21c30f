"""A sweep as tables of text: its rows while they run, and the leaderboard."""

from __future__ import annotations

from typing import Any

from kdcache.run_record import AFTER, BEFORE, TEACHER, number
from kdcache.sweep.board import FAILED, FINISHED, RUNNING, Board, RowState

LIVE_COLUMNS = ("row", "changes", "state", "step", "loss", "ETA", "perplexity")
_LONGEST_NOTE = 28


def live_rows(board: Board) -> list[tuple[str, ...]]:
    """A line for every row, as `LIVE_COLUMNS` heads them."""
    return [_live_row(state) for state in board.rows]


def plain_line(state: RowState) -> str:
    """A row that changed, or is at work, as one line of a log."""
    if state.state == FINISHED and state.scores is not None:
        after = state.scores[AFTER]
        return (
            f"{state.name}: finished, perplexity {after['perplexity']:.3f}, KL to teacher {_figure(after, 'kl_to_teacher', '.4f')}, "
            f"{state.seconds:.0f} s"
        )
    if state.state == FAILED:
        return f"{state.name}: failed: {state.error}"
    if state.state == RUNNING and state.done:
        eta = state.eta()
        return f"{state.name}: {state.task} {state.done:,}/{state.total:,}  {state.note}  ETA {_time(eta)}".rstrip()
    changes = changed(state)
    return f"{state.name}: {state.state}" + (f" ({changes})" if changes and state.state == RUNNING else "")


def changed(state: RowState) -> str:
    """What a row changes, in short."""
    return ", ".join(f"{key.rpartition('.')[2]} {_value(value)}" for key, value in state.row.changes.items())


def leaderboard(board: Board) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Columns and rows: finished ones by the perplexity of the trained student, then the others with the reason.

    Where rows are scored on different tokens (they cut at different lengths), a column says on how many.
    """
    finished = sorted(board.having(FINISHED), key=lambda s: _scores(s)[AFTER]["perplexity"])
    apart = _scored_apart(finished)
    columns = ("row", "changes", "perplexity", "KL to teacher", *(("tokens",) if apart else ()), "seconds")
    rows = [
        (
            s.name,
            changed(s) or "-",
            f"{(after := _scores(s)[AFTER])['perplexity']:.3f}",
            _figure(after, "kl_to_teacher", ".4f"),
            *((_figure(after, "tokens", ",.0f"),) if apart else ()),
            f"{s.seconds:,.0f}",
        )
        for s in finished
    ]
    blank = ("",) if apart else ()
    for s in sorted((s for s in board.rows if s.state != FINISHED), key=lambda s: s.state != FAILED):
        rows.append((s.name, changed(s) or "-", s.state, "", *blank, f"{s.seconds:,.0f}" if s.seconds else ""))
    return columns, rows


def reference_line(board: Board) -> str:
    """The untrained student and the teacher, where all finished rows agree on them; otherwise nothing."""
    scored = [_scores(s) for s in board.having(FINISHED)]
    parts = []
    for name in (BEFORE, TEACHER):
        found = {_figure(scores.get(name, {}), "perplexity", ".3f") for scores in scored}
        if len(found) != 1 or "?" in found:
            return ""
        parts.append(f"{name} {found.pop()}")
    return f"Perplexity of {', '.join(parts)}."


def notes(board: Board) -> list[str]:
    """What a reader of the leaderboard should know, and why rows failed."""
    lines = [line for line in (reference_line(board),) if line]
    if _scored_apart(board.having(FINISHED)):
        lines.append(
            "Rows are scored on the validation split cut as their training was: compare those with as many tokens."
        )
    return lines + [f"{s.name} failed: {s.error}" for s in board.having(FAILED)]


def leaderboard_markdown(board: Board) -> str:
    """leaderboard.md."""
    columns, rows = leaderboard(board)
    head = ["| " + " | ".join(columns) + " |", "|---|---|" + "---:|" * (len(columns) - 2)]
    body = ["| " + " | ".join(_cell(cell) for cell in row) + " |" for row in rows]
    finished = len(board.having(FINISHED))
    told = [
        f"{finished} of {len(board.rows)} rows finished; {board.seconds:,.0f} s of wall clock, "
        f"{sum(s.spent() for s in board.rows):,.0f} s of rows, {board.jobs} at a time.",
        *notes(board),
    ]
    return "\n".join([f"# {board.path.absolute().name}", "", *head, *body, "", *(f"{line}\n" for line in told)])


def _live_row(state: RowState) -> tuple[str, ...]:
    step, note, eta, perplexity = "", "", "", ""
    if state.state == RUNNING:
        step = f"{state.done:,}/{state.total:,}" if state.total else ""
        trains = state.task.startswith("train")
        note = state.note.partition("  ")[0].removeprefix("loss ")[:_LONGEST_NOTE] if trains else state.task
        eta = _time(state.eta()) if state.total else ""
        perplexity = "" if state.perplexity is None else f"{state.perplexity:.3f}"
    elif state.scores is not None:
        perplexity = f"{state.scores[AFTER]['perplexity']:.3f}"
    elif state.error:
        note = state.error[:_LONGEST_NOTE]
    return (state.name, changed(state), state.state, step, note, eta, perplexity)


def _scores(state: RowState) -> dict[str, dict[str, float]]:
    assert state.scores is not None
    return state.scores


def _figure(scores: dict[str, float], key: str, form: str) -> str:
    """A figure of run.json, which need not have it: another version may have written it."""
    found = number(scores.get(key))
    return "?" if found is None else format(found, form)


def _scored_apart(finished: list[RowState]) -> bool:
    return len({_figure(_scores(s)[AFTER], "tokens", ",.0f") for s in finished}) > 1


def _value(value: Any) -> str:
    if isinstance(value, dict) and {"start", "end"} <= value.keys():
        return f"{value['start']:g} to {value['end']:g}"
    return f"{value:g}" if isinstance(value, float) else "null" if value is None else str(value)


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    return f"{rest} s" if not minutes else f"{minutes} min" if minutes >= 10 else f"{minutes} min {rest} s"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
