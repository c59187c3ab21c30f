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
        ([{"loss": 3 - i / 5000} for i in range(20)], scores(after=(2.99, 0.995)), "the training loss is flat: 2.9"),
        ([{"loss": 3 + i} for i in range(20)], scores(after=(3.0, 1.0)), "the training loss is flat: 4.5"),
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
    flat, same = [{"loss": 3.0}, {"eval_loss": 3.0}] * 9, scores(after=(3.0, 1.0))
    assert symptoms(flat, same) == []
    assert symptoms([*flat, {"loss": 3.0}], same)


def test_what_is_learnt_at_once_is_not_flat():
    early = [{"loss": 3.0 if i < 2 else 1.5} for i in range(1000)]
    assert symptoms(early, scores()) == []


def test_a_hair_is_no_harm():
    assert symptoms(FALLING, scores(after=(3.0001, 0.5))) == []
    assert symptoms(FALLING, scores(after=(2.5, 1.0001))) == []


def test_without_labels_only_the_kl_counts():
    assert symptoms(FALLING, scores(after=(3.2, 0.5)), labelled=False) == []
    [told] = symptoms(FALLING, scores(after=(3.2, 1.5)), labelled=False)
    assert "KL to the teacher rose, 1.0000 to 1.5000: train longer" in told
