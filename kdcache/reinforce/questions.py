"""Questions with what is right about them, from a data set, and the prompts and worked solutions made of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kdcache.data.examples import Example, Message, load_examples
from kdcache.data.tokens import TokenRow, tokenise
from kdcache.errors import DataError
from kdcache.recipe_reinforce import QuestionsSection, ReinforceRecipe
from kdcache.reinforce.rewards import number_of, reference_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_END_OF_WORK = "####"


@dataclass(frozen=True)
class Question:
    """A question, what is right (a number, or unit tests), and how one gets there where that is known."""

    text: str
    reference: str
    solution: str | None = None


def load_questions(recipe: ReinforceRecipe) -> tuple[list[Question], list[Question]]:
    """Questions to learn from, and held-out ones; none of the latter is among the former where they are built in.

    Raises:
        DataError: a data set that cannot be read, lacks a column, or has a row without a question or a usable answer.
    """
    from kdcache.reinforce.arithmetic import problems

    section = recipe.data.arithmetic
    if section is not None:
        every = problems(
            section.test + section.train,
            operations=section.operations,
            steps=section.steps,
            largest=section.largest,
            seed=section.seed,
        )
        return every[section.test :], every[: min(section.test, recipe.evaluation.examples)]
    assert recipe.data.train is not None
    train = _read(recipe, recipe.data.train, None)
    if recipe.cold_start is not None:
        _refuse_unsolved(train[: recipe.cold_start.examples], recipe)
    test = recipe.data.test
    return train, [] if test is None else _read(recipe, test, recipe.evaluation.examples)


def reinforced(recipe: ReinforceRecipe, train: list[Question]) -> list[Question]:
    """The questions of the train split that are reinforced."""
    return train if recipe.training.questions is None else train[-recipe.training.questions :]


def _read(recipe: ReinforceRecipe, source: QuestionsSection, most: int | None) -> list[Question]:
    data = recipe.data
    columns = {"instruction": data.question, "output": data.answer}
    try:
        rows = load_examples(
            source.path,
            split=source.split,
            name=source.name,
            revision=source.revision,
            shape="instruction",
            columns=columns,
        ).rows
    except DataError as exc:
        # The keys by which this recipe names its columns.
        raise DataError(str(exc).replace("data.columns", "data.question and data.answer")) from exc
    if data.solution is not None and data.solution not in rows.column_names:
        raise DataError(
            f"{source.path} has no column {data.solution!r} for data.solution, found {', '.join(sorted(rows.column_names))}"
        )
    found = []
    for place, row in enumerate(rows):
        if place == most:
            break
        where = f"{source.path} {source.split}, row {place}"
        question = row[data.question]
        if not isinstance(question, str) or not question.strip():
            raise DataError(f"{where}: column {data.question!r} should be a question, found {question!r:.60}")
        found.append(
            Question(
                question.strip(), _reference(recipe, row[data.answer], where), _solution(row.get(data.solution or ""))
            )
        )
    return found


def _refuse_unsolved(questions: list[Question], recipe: ReinforceRecipe) -> None:
    for place, question in enumerate(questions):
        if not question.solution:
            raise DataError(
                f"row {place} of the train split has no worked solution in column {recipe.data.solution!r}, which cold_start learns; "
                "choose other rows, or leave cold_start out"
            )


def _reference(recipe: ReinforceRecipe, value: Any, where: str) -> str:
    column = recipe.data.answer
    if recipe.rewards.check == "python":
        lines = value if isinstance(value, list) else [value]
        if not lines or not all(isinstance(line, str) and line.strip() for line in lines):
            raise DataError(
                f"{where}: column {column!r} should be unit tests, as text or a list of lines, found {value!r:.60}"
            )
        return "\n".join(lines)
    reference = reference_of(str(value))
    if isinstance(value, bool) or number_of(reference) is None:
        raise DataError(
            f"{where}: column {column!r} should be a number, or end in #### and a number, found {str(value)[-40:]!r}"
        )
    return reference


def _solution(value: Any) -> str | None:
    return value.partition(_END_OF_WORK)[0].strip() if isinstance(value, str) else None


def conversation(recipe: ReinforceRecipe, question: Question) -> list[dict[str, str]] | str:
    """A prompt as TRL takes it: messages for a chat template, or one text."""
    system = recipe.prompt.system
    if recipe.prompt.shape == "plain":
        return "".join(f"{part}\n" for part in (system, question.text) if part)
    messages = [{"role": "system", "content": system}] if system is not None else []
    return [*messages, {"role": "user", "content": question.text}]


def worked(question: Question) -> str:
    """The completion that a cold start learns."""
    return f"<think>{question.solution}</think><answer>{question.reference}</answer>"


def token_rows(
    recipe: ReinforceRecipe, questions: list[Question], tokenizer: PreTrainedTokenizerBase, *, date: str
) -> list[TokenRow]:
    """Prompts with worked solutions as targets, tokenised as for a cache; a question without one gets an empty thought.

    Raises:
        TokenizerError: no chat template, or no end of sequence.
    """
    examples = [
        Example(i, messages=(Message("user", q.text), Message("assistant", worked(q)))) for i, q in enumerate(questions)
    ]
    return tokenise(
        examples, tokenizer, prompt=recipe.prompt.shape, system=recipe.prompt.system, date=date, max_length=1 << 20
    ).rows
