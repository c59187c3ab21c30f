"""What a finished training says is wrong with it."""

import math

import pytest

from kdcache.evaluate.perplexity import Score
from kdcache.student.symptoms import symptoms

FALLING = [{"loss": 3 - i / 20} for i in range(20)]


def scores(before=(3.0, 1.0), after=(2.0, 0.5), teacher=1.0):
    return {
        "student before": Score(100 * before[0], 100 * before[1], 100),
        "student after": Score(100 * after[0], 100 * after[1], 100),
        "teacher": Score(100 * teacher, 0.0, 100),
    }


def test_a_good_training_has_none():
    assert symptoms(FALLING, scores()) == []
    assert symptoms([], scores()) == []


@pytest.mark.parametrize(
    ("log", "found", "says"),
    [
        ([{"loss": 3 - i / 5000} for i in range(20)], scores(), "the training loss is flat: 2.9"),
        ([{"loss": 3 + i} for i in range(20)], scores(), "the training loss is flat: 4.5"),
        (FALLING, scores(after=(3.1, 0.5)), f"perplexity {math.exp(3):.3f}, now {math.exp(3.1):.3f}"),
        (FALLING, scores(after=(2.5, 1.2)), "its KL to the teacher rose, 1.0000 to 1.2000"),
        (FALLING, scores(teacher=3.2), "the teacher is worse on the validation split"),
    ],
)
def test_each_symptom_is_told_with_its_figures(log, found, says):
    [told] = symptoms(log, found)
    assert says in told


def test_what_depends_on_the_kd_term_is_not_told_without_one():
    assert symptoms(FALLING, scores(after=(2.5, 1.2), teacher=3.2), distils=False) == []
    assert len(symptoms(FALLING, scores(after=(2.5, 1.2), teacher=3.2))) == 2


def test_a_few_steps_are_no_trend():
    flat = [{"loss": 3.0}, {"eval_loss": 3.0}] * 9
    assert symptoms(flat, scores()) == []
    assert symptoms([*flat, {"loss": 3.0}], scores())
