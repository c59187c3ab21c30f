"""The 95 % interval of a measured share, the same wherever one is shown."""

from __future__ import annotations

import math

WIDTH = 1.96  # standard errors to either side
INTERVAL_NOTE = "±: half the 95 % interval: 1.96 standard errors, or 3 / n where every example counts 0, or 1."


def width_of(clusters: int) -> float:
    """Standard errors to either side of a 95 % interval whose standard error was itself found from so many clusters, at least 2.

    Student's t with ``clusters - 1`` degrees of freedom: exact for 1 and 2, and by Cornish and Fisher's expansion (Abramowitz and
    Stegun 26.7.5) above, within .004.
    """
    freedom, z = clusters - 1, 1.959964
    if freedom == 1:
        return math.tan(0.475 * math.pi)
    if freedom == 2:
        return 0.95 * math.sqrt(2 / (1 - 0.95**2))
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + math.fsum(term / freedom**power for power, term in enumerate(terms, 1))


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
