"""A cache against its teacher run again: an honest one is explained by the control, a forged one is found."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import kdcache.commands.caches  # noqa: F401 (registers the command)
from kdcache.cache.reader import open_cache
from kdcache.cache.rows import concatenate
from kdcache.cache.verify import verify
from kdcache.cache.writer import CacheWriter
from kdcache.commands.app import app
from kdcache.errors import CacheError
from kdcache.evaluate.disagreement import COLUMNS, Disagreement, Measure, Membership
from kdcache.evaluate.rescore import pick, rescore
from kdcache.recipe import parse_recipe
from kdcache.teacher.capture import capture

EVERYTHING = 10**6


def forge(source, directory, change):
    """The cache with its rows changed, every hash computed again."""
    cache = open_cache(source)
    writer = CacheWriter(directory, cache.plan, cache.vocabulary())
    for index in range(len(cache.plan.shards)):
        content = cache.shard(index)
        writer.commit(index, replace(content, rows=change(content.rows)))
    writer.finalise()
    assert verify(directory) == []
    return directory


def unexplained(found):
    return [m.name for m in (*found.measures, *found.members) if not m.explained]


def labels(rows):
    """The teacher is made surer of what is there."""
    return replace(rows, label_log_prob=rows.label_log_prob * np.float32(0.9))


def one_label(rows):
    changed = rows.label_log_prob.copy()
    changed[0] -= 0.25
    return replace(rows, label_log_prob=changed)


def head_logits(rows):
    return replace(rows, head_logits=rows.head_logits * np.float32(1.1))


def tail_logits(rows):
    return replace(rows, tail_logits=rows.tail_logits - np.float32(0.5))


def rest(rows):
    return replace(rows, rest=rows.rest + np.float32(0.05))


def draws(rows):
    """Other entries are drawn than chance would, each with a logit that could be its own."""
    taken = {(p, i) for p, i in zip(np.repeat(np.arange(len(rows)), rows.head), rows.head_ids.tolist(), strict=True)}
    ids, start = rows.tail_ids.copy(), 0
    for p, count in enumerate(rows.tail.tolist()):
        free = (i for i in range(rows.design.vocab_size) if (p, i) not in taken)
        ids[start : start + count] = [next(free) for _ in range(count)]
        start += count
    return replace(rows, tail_ids=ids)


def head_cut(rows):
    """Every third row loses its least head entry, whose mass goes to the rest, as an honest writer would count it."""
    drop = np.zeros(len(rows.head_ids), dtype=bool)
    shrunk = rows.rest.astype(np.float64).copy()
    for p in range(0, len(rows), 3):
        own = slice(rows.head_offsets[p], rows.head_offsets[p + 1])
        if rows.head[p] < 2:
            continue
        least = own.start + int(np.argmin(rows.head_logits[own]))
        drop[least] = True
        for b, t in enumerate(rows.design.temperatures):
            weights = np.exp(rows.head_logits[own].astype(np.float64) / t)
            out = weights[least - own.start]
            outside = np.exp(shrunk[p, b]) * weights.sum() + out
            shrunk[p, b] = np.log(outside / (weights.sum() - out))
    head = rows.head - np.add.reduceat(drop, rows.head_offsets[:-1]).astype(np.int64)
    return replace(
        rows,
        head=head,
        head_ids=rows.head_ids[~drop],
        head_logits=rows.head_logits[~drop],
        rest=shrunk.astype(np.float32),
    )


def test_an_honest_cache_is_explained(shared_cache, models):
    found = rescore(shared_cache, sequences=EVERYTHING, teacher=str(models / "teacher"))
    cache = open_cache(shared_cache)
    assert unexplained(found) == []
    assert found.sequences == sum(len(s) for s in cache.splits.values())
    assert found.positions == sum(s.positions for s in cache.manifest.splits)
    by_name = {m.name: m for m in found.measures}
    rows = concatenate([s.rows for split in cache.splits.values() for s in split])
    assert by_name["head logits"].cache.count == len(rows.head_ids)
    assert by_name["tail logits"].cache.count == len(rows.tail_ids)
    # What is left of the differences is the format's rounding, which is there.
    assert 0.01 < by_name["head logits"].cache.largest <= 1 / 32 + 1e-3
    assert 0.2 < by_name["tail logits"].cache.largest <= 1 / 4 + 1e-3
    assert all(m.beyond.largest < 1e-3 for m in found.measures)
    assert [m.entries for m in found.members] == [len(rows.head_ids), len(rows.tail_ids)]


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (labels, "label log-prob"),
        (one_label, "label log-prob"),
        (head_logits, "head logits"),
        (tail_logits, "tail logits"),
        (rest, "rest log-odds"),
        (draws, "other draws"),
        (head_cut, "other heads"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_forged_cache_is_found(shared_cache, models, tmp_path, change, name):
    forged = forge(shared_cache, tmp_path / "forged", change)
    assert name in unexplained(rescore(forged, sequences=EVERYTHING, teacher=str(models / "teacher")))


@pytest.mark.parametrize(
    "selection",
    [
        {"method": "top_k", "k": 12},
        {"method": "random_sampling", "draws": 12, "temperatures": [1.0]},
        {"method": "threshold_sampling", "temperatures": [2.0], "tail_logits": False},
        {"values": "half"},
        {"positions": "entropy", "quantile": 0.5},
    ],
    ids=lambda s: "-".join(map(str, s)),
)
def test_every_kind_of_row(values, models, selection):
    values["selection"] = {
        **({} if selection.get("method") in ("top_k", "random_sampling") else values["selection"]),
        **selection,
    }
    directory = capture(parse_recipe(values)).directory
    found = rescore(directory, sequences=EVERYTHING, teacher=str(models / "teacher"))
    assert unexplained(found) == []
    assert all(m.cache.count > 0 for m in found.measures if m.name != "tail logits")
    assert sum(m.entries for m in found.members) == sum(s.entries for s in open_cache(directory).manifest.splits)
    kept = sum(s.kept_positions for s in open_cache(directory).manifest.splits)
    temperatures = len(open_cache(directory).temperatures)
    assert {m.name: m.cache.count for m in found.measures}["rest log-odds"] == kept * temperatures
    assert (kept < found.positions) == ("positions" in selection)


def test_another_teacher_is_refused_and_a_missing_one_says_how_to_go_on(shared_cache, models, tmp_path):
    with pytest.raises(CacheError, match="is not the teacher of"):
        rescore(shared_cache, sequences=2, teacher=str(models / "student"))
    with pytest.raises(CacheError, match="--teacher"):
        rescore(shared_cache, sequences=2, teacher=str(tmp_path / "gone"))


def test_sequences_are_picked_evenly_and_the_same_each_time(shared_cache):
    cache = open_cache(shared_cache)
    total = sum(len(s) for s in cache.splits.values())
    picked = pick(cache, 5)
    assert [n for n, _ in picked] == [n for n, _ in pick(cache, 5)]
    assert len({s.token_ids.tobytes() for _, s in picked}) == 5
    assert {n for n, _ in picked} == {0, 1}
    assert len(pick(cache, EVERYTHING)) == total
    assert len(pick(cache, 1)) == 1


def test_disagreement_is_judged_against_rounding_and_control():
    def measure(beyond, control):
        off = [Disagreement.of(np.array(x)) for x in (beyond, beyond, control)]
        return Measure("x", *off)

    assert measure([0.0, 0.001], [0.0, 0.0]).explained
    assert not measure([0.0, 0.1], [0.0, 0.001]).explained
    assert measure([0.0, 0.1], [0.0, 0.05]).explained
    # A bias that no single number shows.
    assert not measure([0.04] * 1000, [0.0] * 990 + [0.05] * 10).explained
    assert Disagreement.of(np.zeros(0)) == Disagreement(0, 0.0, 0.0, 0.0)
    assert Membership("x", 100, cache=0.01, control=0.0).explained
    assert not Membership("x", 100, cache=0.2, control=0.01).explained
    assert Membership("x", 100, cache=0.2, control=0.06).explained


def run(*arguments):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout


def test_the_command(shared_cache, models, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    options = ("--rescore", 6, "--teacher", models / "teacher")
    code, out = run("verify", shared_cache, *options)
    assert code == 0
    assert "it is what this teacher says" in out
    for expected in (*COLUMNS, "label log-prob", "other draws"):
        assert expected in out
    assert all(len(line) <= 80 for line in out.splitlines() if line.lstrip().startswith(("label", "head", "other")))
    forged = forge(shared_cache, tmp_path / "forged", labels)
    code, out = run("verify", forged, *options)
    assert code == 1
    assert "NO" in out
    assert "is whole" in out
    assert "not what this teacher says" in out
    code, out = run("verify", forged, *options, "--json")
    record = json.loads(out)
    assert (code, record["whole"], record["rescore"]["explained"]) == (1, True, False)
    assert [m["name"] for m in record["rescore"]["measures"] if not m["explained"]] == ["label log-prob"]


def test_numbers_of_the_teacher_are_those_of_dense_logits(shared_cache, models):
    """Against a plain forward pass of the model in float64 arithmetic behind the logits."""
    import transformers

    from kdcache.evaluate.rescore import _score, cached_teacher

    cache = open_cache(shared_cache)
    number, sequence = pick(cache, 3)[1]
    (scored,) = _score(
        cache.plan, cached_teacher(cache, str(models / "teacher")), [(number, sequence)], 1, lambda n: None
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(models / "teacher", dtype=torch.float32).eval()
    with torch.inference_mode():
        logits = (
            model(torch.from_numpy(sequence.token_ids.astype(np.int64))[None]).logits[0, :, : cache.vocab_size].double()
        )
    logits = logits[:-1][torch.from_numpy(sequence.targets[1:])].numpy()
    logits -= logits.max(axis=1, keepdims=True)
    rows = sequence.rows
    owner = np.repeat(np.arange(len(rows)), rows.head)
    assert scored.head == pytest.approx(logits[owner, rows.head_ids], abs=1e-4)
    inside = np.zeros_like(logits, dtype=bool)
    inside[owner, rows.head_ids] = True
    for b, t in enumerate(cache.temperatures):
        mass = np.exp(logits / t)
        odds = np.log((mass * ~inside).sum(axis=1) / (mass * inside).sum(axis=1))
        assert scored.rest.reshape(len(rows), -1)[:, b] == pytest.approx(odds, abs=1e-4)
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    assert scored.label == pytest.approx(log_p[np.arange(len(rows)), sequence.token_ids[sequence.targets]], abs=1e-4)
