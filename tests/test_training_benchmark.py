"""``benchmarks/training.py`` at toy size: it measures what it says, and a difference in the order of samples ends it."""

import copy
from pathlib import Path

import numpy as np
import pytest

from kdcache.recipe import parse_recipe

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def _findable():
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(str(BENCHMARKS))
    yield
    patch.undo()


@pytest.fixture
def subject(base_values, shared_cache, tmp_path):
    from training_steps import Subject

    values = copy.deepcopy(base_values)
    values["output"] = str(tmp_path / "run")
    values["cache"]["directory"] = str(shared_cache)
    return Subject("toy", parse_recipe(values), 2)


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    """103 sequences that say which ones they are."""
    from training_resume import indexed_cache

    return indexed_cache(tmp_path_factory.mktemp("indexed") / "cache", [17, 20, 9, 21, 19, 17, 3]).split("train")


def test_contenders_train_on_the_same_sequences_and_tell_what_each_step_took(subject):
    import training_workers as workers

    told = {name: [] for name in workers.CONTENDERS}
    for name, answers in told.items():
        waits = []
        workers.train(
            {"recipe": subject.changed(), "contender": name, "steps": 3},
            answers.append,
            lambda waits=waits: waits.append(1),
        )
        assert len(waits) == 4  # before the first step, and after each
        loaded, *steps = answers
        assert loaded["loaded"] > 0
        assert all(0 < step["waited"] < step["seconds"] for step in steps)
        assert [step["workers"] for step in steps] == [0, 0, 0]
        assert steps[-1]["peak"] >= steps[0]["peak"] > 0
    seen = {tuple((step["targets"], step["tokens"]) for step in answers[1:]) for answers in told.values()}
    assert len(seen) == 1


def test_contenders_take_turns_in_processes_of_their_own(subject):
    from training_steps import CACHED, SFT, in_turns

    requests = {SFT: {"recipe": subject.changed(), "contender": SFT}}
    requests[CACHED] = {"recipe": subject.changed(workers=1), "contender": CACHED}
    found = in_turns(requests, 2)
    assert [len(m.seconds) for m in found.values()] == [2, 2]
    assert found[SFT].targets == found[CACHED].targets
    assert found[SFT].workers == 0 < found[CACHED].workers
    assert all(m.peak > m.loaded > 0 for m in found.values())


def test_a_contender_that_fails_is_told_of(subject):
    from training_steps import ContenderError, in_turns

    request = {"recipe": {**subject.changed(), "seed": "none"}, "contender": "cached KD"}
    with pytest.raises(ContenderError, match="seed"):
        in_turns({"cached KD": request}, 1)


def measured(seconds, targets, *, waited=0.0, peak=300.0, workers=0.0):
    from training_turns import Measured

    return Measured(seconds, [waited] * len(seconds), targets, 100.0, peak, workers)


def test_tables_are_made_of_what_was_measured(subject, monkeypatch):
    import training_steps as steps

    found = {
        steps.SFT: measured([0.1, 0.4], [5, 7]),
        steps.CACHED: measured([0.11, 0.36], [5, 7], peak=280.0, workers=50.0),
        steps.LIVE: measured([0.2, 0.8], [5, 7], peak=600.0),
    }
    monkeypatch.setattr(steps, "in_turns", lambda requests, count: {name: found[name] for name in requests})
    text = "\n".join(steps.steps_part(subject))
    assert "| cached KD | 235 | 1.000 | 280 | 330 | 1.100 | 230 | 1.150 |" in text
    assert "Live KD takes 2.02 x the time of cached KD and 1.82 x the memory" in text
    assert "time <= 1.05 x SFT met, memory <= 1.05 x SFT **missed**." in text
    found[steps.LIVE] = measured([0.2, 0.8], [5, 8])
    with pytest.raises(steps.ContenderError, match="not trained on the same sequences"):
        list(steps.steps_part(subject))
    found[steps.CACHED] = measured([0.1, 0.1], [5, 7], waited=0.002)
    assert "with one worker **missed**" in "\n".join(steps.wait_part([subject]))
    found[steps.CACHED] = measured([0.1, 0.1], [5, 7], waited=0.0005)
    assert "0.50% (0.5 ms) |" in "\n".join(steps.wait_part([subject]))


def test_padding_is_that_of_the_batches_that_are_trained(subject, monkeypatch):
    import training_steps as steps
    import training_workers as workers

    requested = []

    def in_turns(requests, count):
        requested.extend(requests.values())
        return {name: measured([0.1] * count, []) for name in requests}

    monkeypatch.setattr(steps, "in_turns", in_turns)
    table = [line for line in steps.padding_part(subject) if line.startswith(("| padded", "| packed", "| grouped"))]
    padding = [float(line.split("|")[2].strip(" %")) for line in table]
    assert len(padding) == 4
    assert padding[1] <= padding[0]
    assert padding[2] < padding[0]
    assert steps.shape([10, 4, 5], packed=True) == 2 * 10 < steps.shape([10, 4, 5], packed=False) == 3 * 10
    for request in requested:
        answers = []
        workers.train({**request, "steps": 3}, answers.append)
        way = request["recipe"]["training"]
        lengths = steps.lengths_of(subject, {key: way[key] for key in ("packing", "group_by_length")})
        assert [a["tokens"] for a in answers[1:]] == [
            steps.shape(list(own), packed=way["packing"]) for own in lengths[:3]
        ]


def test_reads_after_resuming_are_counted(tmp_path):
    from training_resume import Resumable, indexed_cache, resume_part

    from kdcache.student.batches import OrderOptions

    lines = list(resume_part(shards=12, size=40, batch=4, places=2))
    assert len([line for line in lines if line.startswith(("| by default", "| grouped by length"))]) == 6
    assert "Target: at most 2 shard reads met." in lines[-1]
    indexed_cache(tmp_path / "cache", [20] * 12 + [3])
    # Batches of four shards' sequences: a window of four needs most of them, and the count shows it.
    wide = Resumable(tmp_path / "cache", tmp_path / "run", 16, OrderOptions(window=4))
    assert wide.steps == 45
    assert max(wide.at(step).wanted for step in (5, 22)) > 2


@pytest.mark.parametrize("processes", [False, True])
def test_batches_are_read_as_the_order_defines_them(split, processes):
    from training_order import batches_between, expected, refuse_difference

    from kdcache.student.batches import OrderOptions

    whole = expected(split, OrderOptions(), 2)
    assert [len(batch) for batch in whole] == 2 * (8 * [12] + [7])
    found = batches_between(split, OrderOptions(), 3, 1, 0, 10, processes=processes)
    found |= batches_between(split, OrderOptions(), 4, 1, 10, 18, processes=processes)
    refuse_difference(found, whole, 103, "here")
    found = batches_between(split, OrderOptions(seed=1), 3, 0, 0, 18, processes=False)
    with pytest.raises(Exception, match="here: other global batches"):
        refuse_difference(found, whole, 103, "here")


def test_a_duplicate_and_an_omission_are_seen(split):
    from training_order import expected, refuse_difference

    from kdcache.student.batches import OrderOptions

    whole = expected(split, OrderOptions(), 1)
    found = {step: list(batch) for step, batch in enumerate(whole)}
    refuse_difference(found, whole, 103, "here")
    found[3][0] = found[7][0]
    with pytest.raises(Exception, match="here: 1 duplicates and 1 omissions in epoch 0"):
        refuse_difference(found, whole, 103, "here")


def test_the_order_is_checked_for_every_combination():
    from training_order import on_paper, order_part

    text = "\n".join(order_part(cuts=2, loader_cuts=0, shards=3, trials=2))
    assert "x 2 cut points x 2 resumes, twice (plain, grouped) | 48 |" in text
    assert "one cut | 8 |" in text
    checked, batches = on_paper(4)
    assert checked == 16 < batches


def test_mixing_tells_a_sorted_order_from_a_shuffled_one():
    from training_mixing import mixing, mixing_part

    shuffled = np.random.default_rng(0).permutation(4096)
    distinct, spread, correlation = mixing([shuffled], 512, 16)
    assert distinct == pytest.approx(8 * (1 - (7 / 8) ** 16), rel=0.05)
    assert spread == pytest.approx(4096 / 12**0.5 / 4, rel=0.15)
    assert abs(correlation) < 0.2
    assert mixing([np.arange(4096)], 512, 16)[0] == 1.0
    table = [line.split("|") for line in mixing_part(shards=20, size=64, epochs=2) if line[:3] in ("| 1", "| 2", "| 6")]
    spreads = [float(cells[4]) for cells in table]
    assert spreads == sorted(spreads, reverse=True)
    assert spreads[-1] == pytest.approx(1.0, abs=0.15)


def test_students_are_trained_on_a_sorted_cache(models):
    from training_mixing import FULL, mixing_training_part

    lines = list(
        mixing_training_part(
            str(models), windows=(1, FULL), seeds=1, changes=("training.max_steps=2", "cache.positions_per_shard=100")
        )
    )
    assert lines[-1].startswith("| all |")
    assert lines[-1].endswith("| 1.0000 |")
    assert float(lines[-2].split("|")[3]) != 1


def test_the_script_writes_what_it_prints(tmp_path, capsys):
    import training

    training.main(["--only", "mixing", "--output", str(tmp_path / "training.md")])
    printed = capsys.readouterr().out
    assert (tmp_path / "training.md").read_text() == printed
    assert "one thread; Python" in printed
    assert "### Mixing" in printed
    with pytest.raises(SystemExit):
        training.main(["--only", "steps"])
    assert "--subjects wide" in capsys.readouterr().err
