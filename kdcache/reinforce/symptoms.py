"""What the figures of a finished reinforcement say is wrong with it; docs/failures.md lists causes and remedies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

_SAME = 0.9  # of the questions' groups: what is left teaches next to nothing
_FELL = 0.05  # of the held-out answers


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
        found.append(
            f"for {same:.0%} of the questions all completions got the same reward, from which nothing is learnt: make the questions easier, "
            "give a cold_start more steps, or raise training.temperature or training.num_generations"
        )
    if before is not None and after is not None and after["right"] < before["right"] - _FELL:
        found.append(
            f"right answers to held-out questions fell from {before['right']:.1%} to {after['right']:.1%}: what was learnt is the questions "
            "and not how to answer; give more questions, fewer training.steps or a larger training.beta"
        )
    return found
