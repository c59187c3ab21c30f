"""Greedy answers to held-out questions: how many are right, well-formed, and how long they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kdcache.data.examples import Example, Message
from kdcache.data.tokens import prompt_ids
from kdcache.evaluate.generation import Prompts, generate
from kdcache.intervals import half_width
from kdcache.progress import Progress
from kdcache.recipe_reinforce import ReinforceRecipe
from kdcache.reinforce.questions import Question
from kdcache.reinforce.rewards import last_number, number_of, right, well_formed

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

COLUMNS = ("held-out questions", "right", "well-formed", "last number right", "tokens")
NOTE = (
    "Greedy answers. right: what stands between the answer tags; last number right: the last number anywhere in the text, for a "
    "student that knows no tags."
)


def held_out(
    recipe: ReinforceRecipe,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: list[Question],
    *,
    date: str,
    what: str,
    progress: Progress,
) -> dict[str, float]:
    """Shares in [0, 1] and the mean length in tokens of greedy answers, and how many there were.

    Args:
        recipe: prompts, check, and the longest completion.
        model: with its adapter in place.
        tokenizer: of the model.
        questions: held-out ones.
        date: what chat templates are told is today.
        what: a name for the progress.
        progress: told about every batch.

    Raises:
        TrainingError: generated Python cannot be confined on this machine.
        TokenizerError: there is no chat template.
    """
    shape, system = recipe.prompt.shape, recipe.prompt.system
    prompts = [
        prompt_ids(
            Example(i, messages=(Message("user", q.text),)), tokenizer, prompt=shape, system=system, date=date
        ).tolist()
        for i, q in enumerate(questions)
    ]
    eos: Any = tokenizer.eos_token_id
    pad: Any = tokenizer.pad_token_id
    asked = Prompts(prompts, [], eos, eos if pad is None else pad, recipe.training.max_completion_length)
    training = model.training
    model.eval()
    texts = generate(
        model,
        asked,
        tokenizer,
        batch_size=recipe.evaluation.batch_size,
        precision=recipe.training.precision,
        what=what,
        progress=progress,
    )
    model.train(training)
    count = len(questions)
    references = [q.reference for q in questions]
    found = {
        "questions": float(count),
        "right": sum(right(recipe, texts, references)) / count,
        "well_formed": sum(map(well_formed, texts)) / count,
        "tokens": sum(len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]) / count,
    }
    if recipe.rewards.check == "numeric":
        same = [last_number(text) == number_of(reference) for text, reference in zip(texts, references, strict=True)]
        found["last_number_right"] = sum(same) / count
    return found


def answer_rows(results: dict[str, dict[str, float]]) -> list[list[str]]:
    """Cells for `COLUMNS`, one row for each student, with half the width of the 95 % interval behind a share."""
    return [
        [
            name,
            *(_share(found.get(key), int(found["questions"])) for key in ("right", "well_formed", "last_number_right")),
            f"{found['tokens']:.1f}",
        ]
        for name, found in results.items()
    ]


def _share(value: float | None, count: int) -> str:
    if value is None:
        return "-"
    half = half_width(value, (value * (1 - value) / max(1, count - 1)) ** 0.5, count)
    return f"{value:.3f} ± {half:.3f}"
