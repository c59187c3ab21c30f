"""What completions are worth: form, numbers in every dress, length; the recipe of reinforcement and its table of keys."""

from decimal import Decimal
from pathlib import Path

import pytest

from kdcache.errors import DataError, RecipeError
from kdcache.recipe_keys import recipe_keys
from kdcache.recipe_reinforce import ReinforceRecipe, load_reinforce_recipe, parse_reinforce_recipe
from kdcache.reinforce.arithmetic import problems
from kdcache.reinforce.questions import load_questions, reinforced
from kdcache.reinforce.rewards import (
    answer_in,
    code_of,
    last_number,
    number_of,
    penalty,
    reference_of,
    reward_functions,
    right,
    same_number,
    well_formed,
)

ROOT = Path(__file__).parent.parent.parent
RECIPES = [p for p in sorted((ROOT / "recipes/reinforce").glob("*.yaml")) if p.name != "embedded-student.yaml"]
MINIMAL = {"output": "o", "data": {"arithmetic": {}}}
GOOD = "<think>1 + 1 = 2</think><answer>2</answer>"


@pytest.mark.parametrize(
    "text", [GOOD, f"  {GOOD}\n", "<think>\na\nb</think>\n\n<answer>\n2\n</answer>", "<think></think><answer></answer>"]
)
def test_well_formed(text):
    assert well_formed(text)


@pytest.mark.parametrize(
    "text",
    [
        "", "2", "<answer>2</answer>", "<think>a</think>2", f"so: {GOOD}", f"{GOOD} done", GOOD + GOOD,
        "<answer>2</answer><think>a</think>", "<think>a<answer>2</answer></think>", "<think>a</think><answer>2",
        "<think>a</think></think><answer>2</answer>", "<think><think>a</think><answer>2</answer>", "</think>a<think><answer>2</answer>",
        "<THINK>a</THINK><answer>2</answer>", "<think>a</think><answer>2</answer><answer>2</answer>",
        "<think>a</think> and <answer>2</answer>",
    ],
)  # fmt: skip
def test_not_well_formed(text):
    assert not well_formed(text)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("42", "42"), (" 42.\n", "42"), ("$42", "42"), ("$1,234.50", "1234.5"), ("1,234,567", "1234567"), ("42.000", "42"),
        ("-3", "-3"), ("\N{MINUS SIGN}3", "-3"), ("-$3", "-3"), ("+7", "7"), (".5", "0.5"), ("007", "7"), ("42 apples", "42"),
        ("about $ 12", "12"), ("**18**", "18"), ("50%", "50"), ("x=5", "5"),
    ],
)  # fmt: skip
def test_one_number_in_any_dress(text, number):
    assert number_of(text) == Decimal(number)


@pytest.mark.parametrize("text", ["", "none", "4 2", "41 or 42", "3/4", "5-3", "12,34", "1e5", "٤٢", "9" * 300])
def test_no_number_or_several(text):
    assert number_of(text) is None


@pytest.mark.parametrize(
    ("answer", "reference", "same"),
    [("1,000.0", "1000", True), ("$7", "7.00", True), ("0.10", ".1", True), ("7.01", "7", False), (None, "7", False), ("", "7", False), ("7 7", "7", False)],
)  # fmt: skip
def test_numbers_are_compared_exactly(answer, reference, same):
    assert same_number(answer, reference) is same


def test_answers_and_references_are_found():
    assert answer_in(GOOD) == "2"
    assert answer_in("I say <answer>2</answer> there") == "2"
    assert answer_in(GOOD + "<answer>3</answer>") is None
    assert answer_in("</answer><answer>") is None
    assert reference_of("He has 5.\n#### 1,042") == "1,042"
    assert reference_of("a #### b #### 7") == "7"
    assert reference_of(" 12 ") == "12"
    assert last_number("first 3, then 1,200.") == Decimal(1200)
    assert last_number("nothing") is None
    assert code_of("```python\nx = 1\n```\nand\n```\ny = 2\n```") == "x = 1\n\ny = 2\n"
    assert code_of("x = 1") == "x = 1"


def test_the_penalty_is_a_ramp():
    assert [penalty(n, 10, 20) for n in (0, 10, 15, 20, 99)] == [0, 0, 0.5, 1, 1]


def recipe(**changes):
    return parse_reinforce_recipe({**MINIMAL, **changes})


def test_reward_functions_are_those_with_a_weight():
    plain = reward_functions(recipe())
    assert [(f.__name__, w) for f, w in plain] == [("format", 0.2), ("correct", 1.0)]
    chosen = recipe(rewards={"format": 0, "length": 0.5, "length_target": 10}, training={"max_completion_length": 20})
    functions = reward_functions(chosen)
    assert [(f.__name__, w) for f, w in functions] == [("correct", 1.0), ("length", 0.5)]
    messages = [[{"role": "assistant", "content": GOOD}], "<answer>3</answer>"]
    given = {
        "completions": messages,
        "reference": ["2", "2"],
        "completion_ids": [[1] * 15, [1] * 5],
        "prompts": ["", ""],
        "trainer_state": None,
    }
    assert [f(**given) for f, _ in functions] == [[1.0, 0.0], [-0.5, 0.0]]
    assert plain[0][0](**given) == [1.0, 0.0]


def test_python_is_judged_by_its_tests(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text('{"question": "f", "answer": ["assert f(1) == 2", "assert f(2) == 3"]}\n')
    chosen = recipe(data={"train": {"path": str(path)}}, rewards={"check": "python"})
    (question,), _ = load_questions(chosen)
    texts = [
        "<think>add</think><answer>\n```python\ndef f(x):\n    return x + 1\n```\n</answer>",
        "<answer>def f(x): return 2</answer>",
        "def f(x): return x + 1",
        "<answer>import os; os._exit(0)</answer>",
    ]
    assert right(chosen, texts, [question.reference] * 4) == [True, False, False, False]


def test_problems_are_right_distinct_and_repeatable():
    settings = {"operations": ("plus", "minus", "times"), "steps": 3, "largest": 9, "seed": 4}
    made = problems(200, **settings)
    assert made == problems(200, **settings)
    assert problems(50, **settings) == made[:50]
    assert problems(5, **{**settings, "seed": 5}) != made[:5]
    assert len({p.text for p in made}) == 200
    for problem in made:
        value, *rest = problem.text.removeprefix("What is ").removesuffix("?").replace(", then", "").split()
        total = int(value)
        for operation, number in zip(rest[::2], map(int, rest[1::2]), strict=True):
            total = {"plus": total + number, "minus": total - number, "times": total * number}[operation]
            assert total >= 0
        assert str(total) == problem.reference
        assert problem.solution.endswith(f"= {total}")
        assert all(eval(s.split("=")[0]) == int(s.split("=")[1]) for s in problem.solution.split(", "))
    with pytest.raises(DataError, match=r"different problems of 999.*data\.arithmetic\.largest"):
        problems(999, operations=("plus",), steps=1, largest=3, seed=0)


def test_held_out_problems_are_not_learnt_from():
    train, test = load_questions(recipe(data={"arithmetic": {"train": 300, "test": 50}}, evaluation={"examples": 20}))
    assert (len(train), len(test)) == (300, 20)
    assert not {q.text for q in train} & {q.text for q in test}
    assert reinforced(recipe(training={"questions": 7}), train) == train[-7:]
    assert reinforced(recipe(), train) == train


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": {}}, "either arithmetic .* or train"),
        ({"data": {"arithmetic": {}, "train": {"path": "x"}}}, "either arithmetic .* or train"),
        ({"data": {"arithmetic": {}, "solution": "s"}}, r"leave data\.test and data\.solution out"),
        ({"data": {"arithmetic": {"operations": ["divide"]}}}, r"data\.arithmetic\.operations"),
        ({"data": {"arithmetic": {}, "qestion": "q"}}, r"unknown recipe key data\.qestion; did you mean data\.question\?"),
        ({"rewards": {"format": 0, "correct": 0}}, "nothing to earn"),
        ({"rewards": {"length": 1}}, r"rewards\.length above 0 and rewards\.length_target go together"),
        ({"rewards": {"length_target": 9}}, "go together"),
        ({"rewards": {"length": 1, "length_target": 900}}, r"length_target \(900\) should be below training\.max_completion_length \(512\)"),
        ({"rewards": {"check": "python"}}, "needs a data set with unit tests"),
        ({"training": {"prompts": 3, "num_generations": 3}}, r"3 x 3 completions a step.*multiple of training\.batch_size \(8\)"),
        ({"training": {"num_generations": 1}}, r"training\.num_generations"),
        ({"training": {"beta": -1}}, r"training\.beta"),
        ({"training": {"loss_type": "ppo"}}, r"training\.loss_type"),
        ({"cold_start": {}, "data": {"train": {"path": "x"}}}, r"cold_start needs data\.solution"),
        ({"student": {"model": "m"}}, "a recipe for a cache and its students"),
        ({"reward": {"format": 1}}, "unknown recipe key reward"),
        ({"seed": -1}, "recipe key seed"),
    ],
)  # fmt: skip
def test_bad_recipes_name_the_key_and_the_way_out(change, message):
    with pytest.raises(RecipeError, match=message):
        recipe(**change)


@pytest.mark.parametrize(
    ("lines", "change", "message"),
    [
        ('{"q": "a", "answer": "1"}', {}, r"columns question and answer, found .*; name them with data\.question and data\.answer"),
        ('{"question": "a", "answer": "no number"}', {}, r"row 0: column 'answer' should be a number, or end in ####"),
        ('{"question": "a", "answer": "1 or 2"}', {}, "should be a number"),
        ('{"question": " ", "answer": "1"}', {}, r"row 0: column 'question' should be a question"),
        ('{"question": "a", "answer": "1"}', {"data": {"solution": "s"}}, r"no column 's' for data\.solution"),
        ('{"question": "a", "answer": "1", "s": ""}', {"data": {"solution": "s"}, "cold_start": {}}, "row 0 .* no worked solution"),
        ('{"question": "a", "answer": ""}', {"rewards": {"check": "python"}}, "should be unit tests"),
        ('{"question": "a", "answer": [1]}', {"rewards": {"check": "python"}}, "should be unit tests"),
        ("not json", {}, "cannot read"),
        ("", {}, "is empty"),
    ],
)  # fmt: skip
def test_bad_data_is_named_by_file_row_and_column(tmp_path, lines, change, message):
    path = tmp_path / "d.jsonl"
    path.write_text(lines + "\n" * bool(lines))
    data = {"train": {"path": str(path)}, **change.get("data", {})}
    with pytest.raises(DataError, match=message):
        load_questions(recipe(**{**change, "data": data}))


def test_gsm8k_is_read(tmp_path):
    path = tmp_path / "gsm.jsonl"
    path.write_text('{"question": "Two and $1,000?", "answer": "2 + 1000 = <<2+1000=1002>>1002\\n#### 1,002"}\n')
    (question,), test = load_questions(recipe(data={"train": {"path": str(path)}, "solution": "answer"}))
    assert (question.reference, question.solution, test) == ("1,002", "2 + 1000 = <<2+1000=1002>>1002", [])


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
def test_shipped_recipes_load_and_can_be_read_again(path):
    chosen = load_reinforce_recipe(path)
    assert parse_reinforce_recipe(chosen.model_dump(mode="json")) == chosen


def test_every_key_is_documented():
    page = (ROOT / "recipes/reinforce/README.md").read_text()
    for key, (default, description) in recipe_keys(ReinforceRecipe).items():
        assert description, key
        line = f"| `{key}` | {'required' if default is ... else f'`{default!r}`'} | {description} |"
        assert line in page, f"recipes/reinforce/README.md lacks: {line}"
