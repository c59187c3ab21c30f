import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from rouge_score import rouge_scorer, tokenize

from kdcache.cache.store import open_cache
from kdcache.errors import CacheError
from kdcache.evaluate.generation import Prompts, answer_text, generate, judged, prompts_of, retention, words
from kdcache.models import load_model
from kdcache.progress import Silent
from kdcache.token_maps import load_tokenizer


@pytest.fixture(scope="module")
def student(models):
    """A model that has something different to say to each prompt, which the barely trained one has not."""
    model = load_model(str(models / "student"), dtype="float32", device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture(scope="module")
def tokenizer(models):
    return load_tokenizer(str(models / "student"))


@pytest.fixture(scope="module")
def validation(shared_cache):
    return open_cache(shared_cache).split("validation")


def greedy(model, prompt, budget, eos_id):
    """One token after the other, without cache, padding or batch."""
    ids = list(prompt)
    with torch.inference_mode():
        while len(ids) < len(prompt) + budget:
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == eos_id:
                break
    return ids[len(prompt) :]


@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_answers_are_those_of_one_prompt_alone(student, tokenizer, validation, batch_size):
    prompts = prompts_of(validation, 7, 9)
    assert len({len(p) for p in prompts.prompts}) > 1, "prompts of one length need no padding"
    answers = generate(student, prompts, tokenizer, batch_size=batch_size, progress=Silent())
    alone = [greedy(student, p, 9, prompts.eos_id) for p in prompts.prompts]
    assert answers == [answer_text(a, prompts.eos_id, tokenizer) for a in alone]
    assert len(set(answers)) > 1


def test_answers_stop_at_the_end_of_the_cache_and_not_at_the_model_s(student, tokenizer, validation):
    prompts = prompts_of(validation, 1, 12)
    said = greedy(student, prompts.prompts[0], 12, -1)
    # Whatever comes third is made the end, of the cache and not of the model.
    ended = Prompts(prompts.prompts, prompts.references, said[2], prompts.pad_id, 12)
    (answer,) = generate(student, ended, tokenizer, batch_size=2, progress=Silent())
    assert answer == answer_text(said[: said.index(said[2])], -1, tokenizer)


def test_what_a_released_model_brings_for_chatting_is_put_aside_and_back(student, tokenizer, validation):
    prompts = prompts_of(validation, 3, 10)
    plain = generate(student, prompts, tokenizer, batch_size=3, progress=Silent())
    own = student.generation_config
    student.generation_config = brought = transformers.GenerationConfig(
        do_sample=True, temperature=5.0, repetition_penalty=9.0, max_new_tokens=1, eos_token_id=own.eos_token_id
    )
    try:
        assert generate(student, prompts, tokenizer, batch_size=3, progress=Silent()) == plain
        assert student.generation_config is brought
    finally:
        student.generation_config = own


def test_prompts_end_where_the_first_answer_begins(validation):
    prompts = prompts_of(validation, 1000)
    assert len(prompts.prompts) == len(validation)
    for sequence, prompt, reference in zip(validation, prompts.prompts, prompts.references, strict=True):
        assert prompt + reference == sequence.token_ids.tolist()
        assert np.flatnonzero(sequence.targets).tolist() == list(range(len(prompt), len(sequence.token_ids)))
    assert prompts.budget == max(map(len, prompts.references))
    assert prompts_of(validation, 2, 5).budget == 5


class Conversations(list):
    """A split of made-up sequences."""

    name = "validation"

    def __init__(self, sequences, shape="chat"):
        super().__init__(SimpleNamespace(token_ids=np.array(i), targets=np.array(t, bool)) for i, t in sequences)
        plan = SimpleNamespace(data=SimpleNamespace(shape=shape), tokenizer=SimpleNamespace(eos_id=1, pad_id=0))
        self.cache = SimpleNamespace(plan=plan, directory="somewhere")


def test_of_a_conversation_the_first_answer_is_asked_for():
    split = Conversations([([5, 6, 7, 8, 9, 10], [0, 0, 1, 1, 0, 1]), ([5, 6], [1, 1]), ([7, 8], [0, 1])])
    prompts = prompts_of(split, 5)
    assert prompts.prompts == [[5, 6], [7]]
    assert prompts.references == [[7, 8], [8]]


def test_plain_text_has_no_prompts():
    with pytest.raises(CacheError, match="no prompts, only plain text"):
        prompts_of(Conversations([([5, 6, 7], [0, 1, 1])], shape="text"), 2)


@pytest.mark.parametrize(
    "text", ["The cat's 2nd hat, e.g. a_b-c!", "", "  ...  ", "x1 + 3.5 = Y", "snake_case and CamelCase"]
)
def test_words_of_ascii_are_rouge_score_s(text):
    assert words(text) == tokenize.tokenize(text, None)


def test_words_of_other_scripts_are_words():
    assert words("¿Dónde está el NIÑO?") == ["dónde", "está", "el", "niño"]
    assert words("हिन्दी भाषा") == ["हिन्दी", "भाषा"]
    assert words("\uff21\uff22") == ["ab"]
    assert words("你好 world") == ["你", "好", "world"]
    assert rouge_scorer.RougeScorer(["rougeL"]).score("你好", "你好")["rougeL"].fmeasure == 0
    assert judged(["你好"], ["你好"])["rouge_l"] == 1


def test_rouge_and_exact_match_with_the_errors_of_their_means():
    references = ["the cat sat", "a b c d", "one", ""]
    answers = ["the  cat\nsat", "a c", "two", "something"]
    found = judged(answers, references)
    values = [1.0, 2 * (1.0 * 0.5) / 1.5, 0.0, 0.0]
    assert found["rouge_l"] == pytest.approx(np.mean(values))
    assert found["rouge_l_stderr"] == pytest.approx(np.std(values, ddof=1) / 2)
    assert found["exact_match"] == 0.25
    assert found["exact_match_stderr"] == pytest.approx(0.25)
    assert judged(["x"], ["x"])["rouge_l_stderr"] is None


def test_retention_is_in_percent_of_a_teacher_that_has_something():
    teacher = {"rouge_l": 0.5, "exact_match": 0.0}
    student = copy.copy(teacher) | {"rouge_l": 0.4}
    assert retention(student, teacher) == {"rouge_l": pytest.approx(80), "exact_match": None}
