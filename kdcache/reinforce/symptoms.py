"""What the figures of a finished reinforcement say is wrong with it; docs/failures.md lists causes and remedies."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

_SAME = 0.9  # of the questions' groups: what is left teaches next to nothing
_FELL = 2.0  # standard errors of a difference: less is chance


def symptoms(
    log: Sequence[Mapping[str, float]], before: Mapping[str, float] | None, after: Mapping[str, float] | None
) -> list[str]:
    """One line for each thing that should not be so.

    Args:
        log: rows of log.csv.
        before: held-out answers of the reference, with the share that is ``right``; None where none were asked for.
        after: those of the reinforced student.
    """
    found = []
    shares = [row["same_reward"] for row in log if "same_reward" in row]
    if shares and (same := sum(shares) / len(shares)) >= _SAME:
        right = [row["reward_correct"] for row in log if "reward_correct" in row]
        easy = bool(right) and sum(right) / len(right) > 0.5
        way = "make the questions harder" if easy else "make the questions easier, or give a cold_start more steps"
        found.append(
            f"for {same:.0%} of the questions all completions got the same reward, from which nothing is learnt: {way}; or raise "
            "training.temperature or training.num_generations"
        )
    if before is not None and after is not None and before["right"] - after["right"] > _FELL * _error(before, after):
        found.append(
            f"right answers to held-out questions fell from {before['right']:.1%} to {after['right']:.1%}: what was learnt is the questions "
            "and not how to answer; give more questions, fewer training.steps or a larger training.beta"
        )
    return found


def _error(before: Mapping[str, float], after: Mapping[str, float]) -> float:
    """Standard error of the difference of two shares of right answers, over as many questions each."""
    share = (before["right"] + after["right"]) / 2
    return math.sqrt(2 * share * (1 - share) / max(1.0, before["questions"]))
