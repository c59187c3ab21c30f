import gzip
import json
from decimal import Decimal
from pathlib import Path

import lm_eval
import pytest
import torch
from lm_eval import tasks as lm_tasks

from kdcache.errors import DataError, ModelError
from kdcache.evaluate.harness import Harness, Measured, as_record, bundled_tasks
from kdcache.evaluate.task_files import answer_number, local_splits
from kdcache.models import load_model
from kdcache.progress import Silent
from kdcache.token_maps import load_tokenizer

CHOICES = {"text": ["red", "blue", "green", "grey"], "label": ["A", "B", "C", "D"]}
ROWS = {
    "gsm8k/test": [{"question": f"{n} plus 1?", "answer": f"It is {n + 1}.\n#### {n + 1}"} for n in range(4)],
    "gsm8k/train": [{"question": f"{n} plus 2?", "answer": f"#### {n + 2}"} for n in range(9)],
    "mgsm/en_test": [{"question": "1 plus 1?", "answer": None, "answer_number": 2}],
    "mgsm/es_test": [{"question": "¿1 más 1?", "answer": None, "answer_number": 2}],
    "squad/xquad_en": [
        {"context": "Ann is 30.", "question": "How old?", "answers": {"text": ["30", "30 years"], "answer_start": [7]}}
    ],
    "mmlu/test": [
        {"question": f"{subject} {n}", "subject": subject, "choices": ["1", "2", "3", "4"], "answer": n % 4}
        for subject in ("art", "law_theory")
        for n in range(3)
    ],
    "mmlu/dev": [
        {"question": f"shown {subject} {n}", "subject": subject, "choices": ["1", "2", "3", "4"], "answer": 1}
        for subject in ("art", "law_theory")
        for n in range(5)
    ],
    "hellaswag/val_olmes1000": [
        {"activity_label": "Cooking", "ctx": "She takes", "endings": ["a pan.", "off.", "two.", "no."], "label": "2"}
    ],
    "arc_challenge/test": [{"question": "Which colour has the sky?", "choices": CHOICES, "answerKey": "B"}] * 3,
    "openbookqa/test": [{"question_stem": "Grass is", "choices": CHOICES, "answerKey": "C"}],
    **{
        f"agieval/{name}": [
            {"passage": None, "question": name, "options": ["(A)1", "(B)2", "(C)3", "(D)4"], "label": "D"}
        ]
        * 2
        for name in ("aqua-rat", "logiqa-en", "lsat-ar", "lsat-lr", "lsat-rc", "sat-en", "sat-math")
    },
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder in the layout of the bundled tasks."""
    folder = tmp_path_factory.mktemp("data")
    for name, rows in ROWS.items():
        path = folder / f"{name}.jsonl.gz"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(gzip.compress("\n".join(json.dumps(r, ensure_ascii=False) for r in rows).encode()))
    return folder


@pytest.fixture(scope="module")
def student(models):
    return load_model(str(models / "student"), dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def tokenizer(models):
    return load_tokenizer(str(models / "student"))


def prompts(harness, task=0):
    """The first request of every example, as text."""
    return [i.args[0] for i in harness._built[task][0].instances if i.idx == 0]


def run(harness, student, tokenizer, progress=None):
    return harness.run(student, tokenizer, batch_size=4, progress=progress or Silent())


def test_every_bundled_task_runs_on_local_files(data, student, tokenizer):
    harness = Harness(bundled_tasks(), task_data=data)
    results = run(harness, student, tokenizer)
    assert sorted(results) == bundled_tasks() == sorted(p.stem for p in Path("kdcache/evaluate/tasks").glob("*.yaml"))
    assert {name: (r.examples, r.shots) for name, r in results.items() if r.shots} == {
        "gsm8k_8shot": (4, 8),
        "mmlu": (6, 5),
    }
    assert results["agieval"].examples == 14
    assert set(results["squad"].metrics) == {"contains", "exact_match"}
    assert set(results["arc_challenge"].metrics) == {"acc", "acc_norm"}
    for result in results.values():
        assert all(0 <= value <= 1 for value, _ in result.metrics.values())


def test_multiple_choice_is_by_log_likelihood(data, student, tokenizer):
    harness = Harness(["arc_challenge", "openbookqa"], task_data=data)
    results = run(harness, student, tokenizer)
    for name, prompt, wanted in (
        ("arc_challenge", "Question: Which colour has the sky?\nAnswer:", 1),
        ("openbookqa", "Grass is", 2),
    ):
        scores = []
        for text in CHOICES["text"]:
            context, whole = tokenizer(prompt)["input_ids"], tokenizer(f"{prompt} {text}")["input_ids"]
            with torch.inference_mode():
                log_p = torch.log_softmax(student(input_ids=torch.tensor([whole])).logits[0].float(), dim=1)
            scores.append(sum(float(log_p[i - 1, whole[i]]) for i in range(len(context), len(whole))))
        best = max(range(4), key=lambda i: scores[i])
        normed = max(range(4), key=lambda i: scores[i] / len(CHOICES["text"][i]))
        assert results[name].metrics["acc"][0] == float(best == wanted)
        assert results[name].metrics["acc_norm"][0] == float(normed == wanted)


def test_examples_that_are_shown_are_of_the_question_s_subject(data, student, tokenizer):
    harness = Harness(["mmlu"], task_data=data, limit=3)
    (result,) = run(harness, student, tokenizer).values()
    assert result.examples == 3
    seen = prompts(harness)
    # Subjects take turns, so that a limit does not leave all but the first out.
    assert ["law_theory" in text for text in seen] == [False, True, False]
    for text, subject, other in zip(
        seen, ("art", "law_theory", "art"), ("law_theory", "art", "law_theory"), strict=True
    ):
        assert [f"shown {subject} {n}" in text for n in range(5)] == [True] * 5
        assert f"shown {other}" not in text
        assert text.startswith(f"Multiple-choice questions about {subject.replace('_', ' ')}.\n\nQuestion: shown")
        assert text.endswith("\nAnswer:")


def test_eight_worked_examples_come_first(data, student, tokenizer):
    harness = Harness(["gsm8k_8shot", "gsm8k"], task_data=data, limit=1)
    run(harness, student, tokenizer)
    (shown,), (bare,) = prompts(harness, 0), prompts(harness, 1)
    assert bare == "Question: 0 plus 1?\nAnswer:"
    assert shown.endswith(f"Question: 7 plus 2?\nAnswer: #### 9\n\n{bare}")
    assert shown.count("plus 2") == 8


def test_the_chat_template_is_put_around_prompts(data, student, tokenizer):
    harness = Harness(["gsm8k"], task_data=data, limit=1, chat_template=True)
    (result,) = run(harness, student, tokenizer).values()
    assert result.chat_template
    asked = [{"role": "user", "content": "Question: 0 plus 1?\nAnswer:"}]
    assert prompts(harness) == [tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("It costs 3 and 4, so\n#### 1,234.50 then 9", "1234.50"),
        ("#### $ 7", "7"),
        ("first 3, then -12.", "-12"),
        ("2 * 3 = 6", "6"),
        ("none at all", None),
        ("between 10-12", "12"),
        ("(3)-12", "12"),
        ("it fell to -12", "-12"),
        ("3,5", "5"),
        ("1,234,567 apples", "1234567"),
        ("#### 1. First, 40 and 2. #### 42", "42"),
    ],
)
def test_the_answer_is_the_marked_number_or_else_the_last(text, number):
    assert answer_number(text) == (None if number is None else pytest.approx(float(number)))


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("son 3,5", "3.5"), ("son 1.000.", "1000"), ("son 1.234.567,25 euros", "1234567.25"), ("son 3.5", "3.5"), ("son 2.1234", "2.1234"),
        ("#### -1.000, no 3", "-1000"), ("entre 10-12", "12"), ("#### 5\n#### 7,25", "7.25"), ("nada", None),
    ],
)  # fmt: skip
def test_spanish_answers_have_spanish_separators(text, number):
    assert answer_number(text, "es") == (None if number is None else Decimal(number))


class Says:
    """A model that gives the same answer to everything."""

    def __init__(self, harness, text):
        self.task = harness._built[0][0]
        self.text = text

    def judged(self, n=0):
        return self.task.process_results(self.task.task_docs[n], [self.text])


@pytest.mark.parametrize(
    ("text", "contains", "same"),
    [(" 30", 1, 1), ("She is 30  years old", 1, 0), ("3", 0, 0), ("", 0, 0)],
)
def test_verbatim_completion(data, text, contains, same):
    assert Says(Harness(["squad"], task_data=data), text).judged() == {"contains": contains, "exact_match": same}


def test_exact_answers_count_as_numbers(data):
    harness = Harness(["gsm8k"], task_data=data)
    assert Says(harness, "so it is\n#### 1.0").judged()["exact_match"] == 1
    assert Says(harness, "1 and then 2").judged()["exact_match"] == 0
    spanish = Harness(["mgsm_es"], task_data=data)
    assert [Says(spanish, text).judged()["exact_match"] for text in ("son 2", "son 2,0", "son 20", "son 2.000")] == [
        1,
        1,
        0,
        0,
    ]


def test_files_that_are_missing_or_broken_are_named(data, tmp_path):
    with pytest.raises(DataError, match=r"no file .*squad/xquad_en\.jsonl\.gz; --task-data names"):
        Harness(["squad"], task_data=tmp_path)
    with pytest.raises(DataError, match="is no folder"):
        Harness(["squad"], task_data=tmp_path / "gone")
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(DataError, match=r"rows\.jsonl has rows without 'b'; a, b are needed"):
        local_splits(task_data=str(tmp_path), files={"test": "rows.jsonl"}, columns=["a", "b"])
    # Unpacked files are taken as well.
    splits = local_splits(task_data=str(tmp_path), files={"test": "rows.jsonl.gz"}, columns=["a"])
    assert splits["test"][0] == {"a": 1}
    (tmp_path / "rows.jsonl").write_text("nothing of the kind")
    with pytest.raises(DataError, match="should hold JSON Lines"):
        local_splits(task_data=str(tmp_path), files={"test": "rows.jsonl"}, columns=["a"])
    (tmp_path / "half.jsonl.gz").write_bytes(gzip.compress(b'{"a": 1}\n' * 50)[:-12])
    with pytest.raises(DataError, match="should hold JSON Lines"):
        local_splits(task_data=str(tmp_path), files={"test": "half.jsonl.gz"}, columns=["a"])


@pytest.fixture
def few_tasks(monkeypatch):
    """The harness with two folders of its own tasks: reading all fourteen thousand takes ten seconds."""
    manager, own = lm_tasks.TaskManager, Path(lm_eval.__file__).parent / "tasks"

    def short(**options):
        return manager(**options) if options else manager(
            include_path=[str(own / "piqa"), str(own / "gsm8k")], include_defaults=False
        )  # fmt: skip

    monkeypatch.setattr(lm_tasks, "TaskManager", short)


@pytest.mark.usefixtures("few_tasks")
def test_tasks_of_the_hub_say_so_before_anything_else(data):
    with pytest.raises(DataError, match=r"task piqa .* needs the network: .*Nothing was loaded"):
        Harness(["arc_challenge", "piqa"], task_data=data)
    with pytest.raises(DataError, match=r"task gsm8k .* needs the network.*--task-data DIR takes local files"):
        Harness(["gsm8k"])


@pytest.mark.usefixtures("few_tasks")
def test_unknown_tasks_name_the_nearest(data):
    with pytest.raises(DataError, match=r"no task 'hellaswagg'; the nearest are hellaswag\. With --task-data"):
        Harness(["hellaswagg"], task_data=data)
    with pytest.raises(DataError, match=r"task squad comes with kdcache.*--task-data"):
        Harness(["squad"])


def test_a_context_too_short_for_the_task_is_told(data, student, tokenizer, monkeypatch):
    monkeypatch.setattr(student.config, "max_position_embeddings", 200)
    with pytest.raises(ModelError, match=r"cannot put its tasks to student: AssertionError.*256"):
        run(Harness(["gsm8k"], task_data=data), student, tokenizer)
    heard = []
    monkeypatch.setattr(student.config, "max_position_embeddings", 60)
    monkeypatch.setattr(Silent, "warning", lambda _, text: heard.append(text))
    harness = Harness(["mmlu", "openbookqa"], task_data=data)
    run(harness, student, tokenizer)
    run(harness, student, tokenizer)
    assert [text[:60] for text in heard] == ["24 of 28 requests are longer than the 60 tokens that student"]


def test_models_stand_side_by_side():
    one = {"arc": Measured(20, 0, {"acc": (0.5, 0.1), "acc_norm": (0.25, None)})}
    two = {"arc": Measured(20, 0, {"acc": (0.75, 0.1), "acc_norm": (0.5, 0.1)})}
    assert as_record({"student after": one, "teacher": two}) == {
        "arc": {
            "metric": "acc",
            "examples": 20,
            "shots": 0,
            "chat_template": False,
            "models": {"student after": {"value": 0.5, "stderr": 0.1}, "teacher": {"value": 0.75, "stderr": 0.1}},
            "also": {
                "acc_norm": {
                    "student after": {"value": 0.25, "stderr": None},
                    "teacher": {"value": 0.5, "stderr": 0.1},
                }
            },
        }
    }
