"""chain.json read without torch: what a chain of students has come to, stage by stage.

The file may have been written by another version, or by a stranger; what it says is checked here, once for all readers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

from kdcache import __version__
from kdcache.errors import TrainingError
from kdcache.run_record import is_amount, number, read_json
from kdcache.sweep_record import stays_inside

State = Literal["waiting", "running", "finished", "failed", "stopped"]
STATES: tuple[State, ...] = get_args(State)
CHAIN_FILE, CHAIN_FORMAT = "chain.json", "kdcache-chain"
# What a stage spends time on.
PARTS = ("cache", "train", "merge", "compare")
_MAX_STAGES = 1000


def read_chain(directory: Path) -> dict[str, Any]:
    """What chain.json says, every stage of it held to what a chain writes.

    Args:
        directory: of the chain.

    Returns:
        ``kdcache``, ``recipe`` and ``stages`` as `checked_stage` gives them, the direct way last.

    Raises:
        TrainingError: the file is missing, not readable, of another format, or has a stage that is none.
    """
    try:
        values = read_json(directory / CHAIN_FILE)
    except (OSError, ValueError) as exc:
        raise _refusal(directory, str(exc)) from exc
    if not isinstance(values, dict) or values.get("format") != CHAIN_FORMAT:
        found = values.get("format") if isinstance(values, dict) else None
        raise _refusal(directory, f"its format is {str(found)[:40]!r}")
    if not isinstance(values.get("recipe"), dict) or not isinstance(values.get("stages"), list):
        raise _refusal(directory, "it has no recipe or no stages")
    if len(values["stages"]) > _MAX_STAGES:
        raise _refusal(directory, f"it has more than {_MAX_STAGES:,} stages")
    stages = []
    for index, found in enumerate(values["stages"], 1):
        try:
            stages.append(checked_stage(found))
        except ValueError as exc:
            raise _refusal(directory, f"stage {index}: {exc}") from exc
    names = [stage["name"] for stage in stages]
    if len(set(names)) < len(names):
        raise _refusal(directory, "two stages have one name")
    return {"kdcache": str(values.get("kdcache", "unnamed")), "recipe": values["recipe"], "stages": stages}


def run_of(directory: Path, stage: str) -> Path:
    """The run directory of a chain's stage."""
    return directory / stage / "run"


def checked_stage(stage: object) -> dict[str, Any]:
    """One stage of chain.json.

    Returns:
        ``name``, ``teacher``, ``student``, ``state``, ``error``; ``seconds`` by part; ``cache_id``, ``cache_bytes``; ``run`` and
        ``taught_by``: SHA-256 of its run.json, and of that of the stage whose student taught it (None: the recipe's
        teacher, or not known); ``merged``: of the run.json that the merged model was made of; ``scores`` as run.json has
        them; ``kl_to_first``: KL to the first teacher in nats per token.

    Raises:
        ValueError: saying what is wrong with it.
    """
    if not isinstance(stage, dict):
        raise ValueError("it is no mapping")
    name, state, seconds = stage.get("name"), stage.get("state"), stage.get("seconds", {})
    if not isinstance(name, str) or not name or not stays_inside(name) or "/" in name:
        raise ValueError(f"its name {str(name)[:80]!r} is none of a directory in the chain's")
    if state not in STATES:
        raise ValueError(f"{CHAIN_FILE} gives it the state {str(state)[:40]!r}, which this version does not know")
    texts = ("teacher", "student", "error", "cache_id", "run", "taught_by", "merged")
    if odd := [key for key in texts if not isinstance(stage.get(key), str | None)]:
        raise ValueError(f"its {', '.join(odd)} is no text")
    if not isinstance(seconds, dict) or not all(is_amount(seconds.get(part, 0)) for part in PARTS):
        raise ValueError("its seconds are no numbers of 0 or more")
    scores = stage.get("scores")
    if scores is not None and not _are_scores(scores):
        raise ValueError("its scores are none")
    for key in ("cache_bytes", "kl_to_first"):
        if stage.get(key) is not None and number(stage[key]) is None:
            raise ValueError(f"its {key} is no number")
    return {
        "name": name,
        "state": state,
        **{key: stage.get(key) for key in texts},
        "seconds": {part: float(seconds.get(part, 0)) for part in PARTS},
        "cache_bytes": stage.get("cache_bytes"),
        "scores": scores,
        "kl_to_first": stage.get("kl_to_first"),
    }


def _are_scores(scores: object) -> bool:
    return isinstance(scores, dict) and all(
        isinstance(score, dict)
        and all(number(score.get(key)) is not None for key in ("loss", "perplexity", "kl_to_teacher"))
        for score in scores.values()
    )


def _refusal(directory: Path, reason: str) -> TrainingError:
    return TrainingError(
        f"{directory / CHAIN_FILE} is not the record of a chain that kdcache {__version__} reads: {reason}; read it with the "
        "version that wrote it, or give the recipe key output another directory"
    )
