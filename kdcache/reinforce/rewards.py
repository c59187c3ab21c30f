"""What a completion is worth: its form, whether it is right, and how long it is.

A completion is well-formed when it is one ``<think>…</think>`` and one ``<answer>…</answer>``, in this order and each
exactly once, with nothing but white space around them. The answer is looked for in the only answer element, well-formed or not,
so that form and correctness are learnt apart. The penalty on length rises linearly from 0 at the target to 1 at the limit
(soft overlong punishment, Yu et al. 2025, DAPO, https://arxiv.org/abs/2503.14476, eq. 13).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdcache.recipe_reinforce import ReinforceRecipe

_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_FORM = re.compile(r"\s*<think>.*</think>\s*<answer>.*</answer>\s*", re.DOTALL)
# A number in English notation; signs of minus as typographers know them are replaced before.
_NUMBER = re.compile(r"[-+]?\$?\s?(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|[-+]?\$?\.[0-9]+")
_FENCE = re.compile(r"```(?:[A-Za-z0-9_+-]*)\n(.*?)```", re.DOTALL)
_LONGEST_NUMBER = 200


def well_formed(text: str) -> bool:
    """Whether think and answer stand there exactly once and in order, and nothing else."""
    return all(text.count(tag) == 1 for tag in _TAGS) and _FORM.fullmatch(text) is not None


def answer_in(text: str) -> str | None:
    """What stands in the only answer element; None where there is none, or more than one."""
    if text.count("<answer>") != 1 or text.count("</answer>") != 1:
        return None
    _, _, rest = text.partition("<answer>")
    answer, end, _ = rest.partition("</answer>")
    return answer if end else None


def number_of(text: str) -> Decimal | None:
    """The one number in a text, such as ``$1,234.50``; None where there is none, or several."""
    found = _NUMBER.findall(text.replace("\N{MINUS SIGN}", "-")[: 10 * _LONGEST_NUMBER])
    return _decimal(found[0]) if len(found) == 1 else None


def last_number(text: str) -> Decimal | None:
    """The last number in a text, as benchmarks read answers of models that know no tags."""
    found = _NUMBER.findall(text.replace("\N{MINUS SIGN}", "-"))
    return _decimal(found[-1]) if found else None


def _decimal(found: str) -> Decimal | None:
    plain = re.sub(r"[$,\s]", "", found)
    return Decimal(plain) if len(plain) <= _LONGEST_NUMBER else None


def reference_of(text: str) -> str:
    """What is right, from a column that may hold the way there before a ``####`` (GSM8K)."""
    return text.rpartition("####")[2].strip()


def same_number(text: str | None, reference: str) -> bool:
    """Whether an answer's one number is the reference's; commas, $ and trailing zeros do not count."""
    mine, right = None if text is None else number_of(text), number_of(reference)
    return mine is not None and mine == right


def code_of(answer: str) -> str:
    """Python in an answer: what is fenced, or all of it."""
    fenced = _FENCE.findall(answer)
    return "\n".join(fenced) if fenced else answer


def penalty(tokens: int, target: int, limit: int) -> float:
    """0 up to ``target`` tokens, 1 from ``limit`` on, linear in between."""
    return min(1.0, max(0.0, (tokens - target) / (limit - target)))


def right(recipe: ReinforceRecipe, texts: Sequence[str], references: Sequence[str]) -> list[bool]:
    """Whether each completion has the right answer.

    Raises:
        TrainingError: generated Python cannot be confined on this machine.
    """
    answers = [answer_in(text) for text in texts]
    if recipe.rewards.check == "numeric":
        return [same_number(answer, reference) for answer, reference in zip(answers, references, strict=True)]
    from kdcache.reinforce.sandbox import Limits, judge_all

    limits = Limits(recipe.rewards.python.seconds, recipe.rewards.python.memory_mib << 20)
    asked = [(code_of(a), r) for a, r in zip(answers, references, strict=True) if a is not None]
    verdicts = iter(judge_all(asked, limits))
    return [answer is not None and next(verdicts).passed for answer in answers]


def reward_functions(recipe: ReinforceRecipe) -> list[tuple[Callable[..., list[float]], float]]:
    """TRL's reward functions with their weights, of those that the recipe gives a weight.

    TRL calls them with the lists ``completions`` (text, or messages), ``completion_ids`` and the columns of the data set, here
    ``reference``; each gives one number per completion.
    """
    rewards = recipe.rewards

    def format(completions: list[Any], **_: Any) -> list[float]:
        return [float(well_formed(text)) for text in texts_of(completions)]

    def correct(completions: list[Any], reference: list[str], **_: Any) -> list[float]:
        return [float(r) for r in right(recipe, texts_of(completions), reference)]

    def length(completion_ids: list[list[int]], **_: Any) -> list[float]:
        target = rewards.length_target or 0
        return [-penalty(len(ids), target, recipe.training.max_completion_length) for ids in completion_ids]

    chosen: list[tuple[Callable[..., list[float]], float]] = [
        (format, rewards.format),
        (correct, rewards.correct),
        (length, rewards.length),
    ]
    return [(function, weight) for function, weight in chosen if weight]


def texts_of(completions: Sequence[Any]) -> list[str]:
    """The texts of TRL's completions, which are messages where the prompts were."""
    return [c if isinstance(c, str) else "".join(str(turn["content"]) for turn in c) for c in completions]
