"""Built-in problems with worked solutions: small sums from left to right, from a seed alone.

What is 7 plus 5, then minus 3?      7 + 5 = 12, 12 - 3 = 9      9
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from kdcache.errors import DataError
from kdcache.reinforce.questions import Question

_SIGNS = {"plus": "+", "minus": "-", "times": "*"}
_LARGEST_FACTOR = 9
_TRIES = 50


def problems(count: int, *, operations: Sequence[str], steps: int, largest: int, seed: int) -> list[Question]:
    """``count`` distinct problems; equal arguments give equal lists, and a longer list begins with the shorter one.

    Args:
        count: how many.
        operations: of plus, minus and times.
        steps: operations in one problem.
        largest: largest number in a question; the result of minus is never below 0.
        seed: of the draws.

    Raises:
        DataError: there are not so many of the kind.
    """
    rng = random.Random(seed)
    seen: set[str] = set()
    made: list[Question] = []
    tries = 0
    while len(made) < count:
        tries += 1
        if tries > _TRIES * count:
            raise DataError(
                f"found only {len(made)} different problems of {count}; raise data.arithmetic.largest or steps, or ask for fewer"
            )
        problem = _problem(rng, operations, steps, largest)
        if problem.text not in seen:
            seen.add(problem.text)
            made.append(problem)
    return made


def _problem(rng: random.Random, operations: Sequence[str], steps: int, largest: int) -> Question:
    value = rng.randint(1, largest)
    text, work = f"What is {value}", []
    for step in range(steps):
        operation = rng.choice(operations)
        most = {"plus": largest, "minus": min(value, largest), "times": min(_LARGEST_FACTOR, largest)}[operation]
        other = rng.randint(0 if most == 0 else 1, most)
        result = {"plus": value + other, "minus": value - other, "times": value * other}[operation]
        text += f"{', then' if step else ''} {operation} {other}"
        work.append(f"{value} {_SIGNS[operation]} {other} = {result}")
        value = result
    return Question(text + "?", str(value), ", ".join(work))
