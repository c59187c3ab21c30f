"""The 95 % interval of a measured share, the same wherever one is shown."""

from __future__ import annotations

WIDTH = 1.96  # standard errors to either side
INTERVAL_NOTE = "±: half the 95 % interval: 1.96 standard errors, or 3 / n where every example counts 0, or 1."


def half_width(value: float, stderr: float | None, examples: int | None) -> float | None:
    """Half the width of the 95 % interval of a mean over examples; None where nothing tells it.

    Args:
        value: the mean, such as an accuracy.
        stderr: its standard error, where that is known.
        examples: how many it was taken over, where that is known.
    """
    if value in (0.0, 1.0) and examples:
        # Equal examples have a standard error of 0, which says nothing: 3 / n is what they leave possible.
        return min(1.0, 3 / examples)
    return None if stderr is None else WIDTH * stderr
