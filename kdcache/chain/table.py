"""A chain as tables of text: what it will do, and what has come of it."""

from __future__ import annotations

from kdcache.chain.board import FAILED, FINISHED, Board, StageState
from kdcache.chain.ready import StageEstimate
from kdcache.chain_record import PARTS
from kdcache.markdown import escaped, table
from kdcache.recipe_chain import DIRECT
from kdcache.run_record import AFTER, BEFORE, TEACHER

PLAN_COLUMNS = ("stage", "teacher", "student", "state")
COLUMNS = ("stage", "taught by", "student", "before", "after", "teacher", "KL own", "KL first")
COST_COLUMNS = ("stage", "cache", *(f"{part}, s" for part in PARTS))
ESTIMATE_COLUMNS = ("stage", "parameters", "teacher", "training", "cache")


def plan_rows(states: list[StageState]) -> list[tuple[str, ...]]:
    """Every stage as `PLAN_COLUMNS` heads them."""
    return [(s.name, s.stage.teacher, s.stage.student, s.state) for s in states]


def change_lines(states: list[StageState]) -> list[str]:
    """What each stage changes in the recipe."""
    return [
        f"{s.name}: " + (", ".join(f"{key}={value}" for key, value in s.stage.changes.items()) or "the recipe as it is")
        for s in states
    ]


def estimate_rows(found: list[StageEstimate]) -> list[tuple[str, ...]]:
    """What each stage takes, as `ESTIMATE_COLUMNS` heads them; the direct way learns from the first stage's cache."""
    return [
        (
            e.name,
            f"{e.parameters:,}",
            _size(e.teacher_bytes),
            "not known" if e.student_bytes is None else _size(e.student_bytes),
            "the first" if e.name == DIRECT else _size(e.cache_bytes) if e.cache_bytes else "not known",
        )
        for e in found
    ]


def result_rows(board: Board) -> list[tuple[str, ...]]:
    """Every stage and the direct way, as `COLUMNS` heads them: perplexities, and KLs in nats per token."""
    return [_result_row(state) for state in board.stages]


def _result_row(state: StageState) -> tuple[str, ...]:
    stage, scores = state.stage, state.scores if state.state == FINISHED else None
    by = stage.teacher if stage.taught_by is None else stage.taught_by.name
    if scores is None:
        return (state.name, by, stage.student, state.state, *[""] * 4)
    return (
        state.name,
        by,
        stage.student,
        *(f"{scores[name]['perplexity']:.3f}" for name in (BEFORE, AFTER, TEACHER)),
        f"{scores[AFTER]['kl_to_teacher']:.4f}",
        "" if state.kl_to_first is None else f"{state.kl_to_first:.4f}",
    )


def cost_rows(board: Board) -> list[tuple[str, ...]]:
    """What each stage took, as `COST_COLUMNS` heads them: bytes of its cache, and the seconds of all sittings by part."""
    return [
        (
            s.name,
            "the first" if s.name == DIRECT else "" if s.cache_bytes is None else _size(s.cache_bytes),
            *(f"{s.seconds[part]:,.0f}" for part in PARTS),
        )
        for s in board.stages
    ]


def notes(board: Board) -> list[str]:
    """What a reader of the table should know, and why a stage failed."""
    finished = [s for s in board.stages if s.state == FINISHED and s.scores is not None]
    lines = []
    if finished:
        tokens = sorted({int(s.scores[AFTER]["tokens"]) for s in finished if s.scores is not None})
        said = (
            f"the same {tokens[0]:,} tokens of the validation split"
            if len(tokens) == 1
            else "validation splits cut differently"
        )
        lines.append(
            f"Perplexity of the student before and after its training and of its teacher, on {said}; KL(teacher || student) in "
            "nats per token, its own teacher's and the first one's. Seconds are those of all sittings."
        )
    lines += [f"{s.name} failed: {s.error}" for s in board.stages if s.state == FAILED]
    return lines + _verdict(finished)


def _verdict(finished: list[StageState]) -> list[str]:
    """The chain held against the direct way, where both are there."""
    ways = [s for s in finished if s.name != DIRECT][-1:] + [s for s in finished if s.name == DIRECT]
    if len(ways) < 2 or ways[0].stage.student != ways[1].stage.student:
        return []
    perplexities = [s.scores[AFTER]["perplexity"] for s in ways if s.scores is not None]
    said = [_held("perplexity", *perplexities)]
    divergences = [s.kl_to_first for s in ways if s.kl_to_first is not None]
    said += [_held("KL to the first teacher", *divergences)] if len(divergences) == len(ways) else []
    return [
        f"{ways[0].name} by way of the chain against direct: {'; '.join(said)}. One seed: train others before you believe it."
    ]


def _held(name: str, chain: float, direct: float) -> str:
    way = "lower" if chain < direct else "higher" if chain > direct else "no different"
    return f"{name} {chain:.4f} against {direct:.4f}, {way}"


def markdown(board: Board) -> str:
    """The result as Markdown."""
    rows = [tuple(escaped(cell) for cell in row) for row in result_rows(board)]
    lines = [escaped(line) for line in notes(board)]
    return "\n".join([table(COLUMNS, rows), *lines, "", table(COST_COLUMNS, cost_rows(board))])


def _size(size: int) -> str:
    for unit, width in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size >= width:
            return f"{size / width:,.1f} {unit}"
    return f"{size} bytes"
