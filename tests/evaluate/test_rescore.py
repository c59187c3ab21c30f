"""A cache against its teacher run again: an honest one is explained by the control, a forged one is found."""

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import kdcache.commands.caches  # noqa: F401 (registers the command)
from kdcache.cache.manifest import Derivation, Plan
from kdcache.cache.merge import merge
from kdcache.cache.reader import open_cache
from kdcache.cache.rows import concatenate
from kdcache.cache.subset import subset
from kdcache.cache.verify import verify
from kdcache.cache.writer import CacheWriter
from kdcache.commands.app import app
from kdcache.errors import CacheError
from kdcache.evaluate.disagreement import COLUMNS, NOT_COMPARED, Disagreement, Drawing, Measure, Membership
from kdcache.evaluate.rescore import _companion, _places, off_chance, pick, rescore
from kdcache.progress import Silent
from kdcache.recipe import parse_recipe
from kdcache.teacher.capture import capture
from kdcache.teacher.forward import TeacherForward
from kdcache.teacher.select import Selection, select

EVERYTHING = 10**6


def forge(source, directory, change, *, derived=False):
    """The cache with its rows changed, every hash computed again; ``derived``: said to be made from another."""
    cache = open_cache(source)
    plan = cache.plan
    if derived:
        claimed = Derivation(operation="subset", parents=("0" * 64,), settings={"sequences": "0:99"})
        plan = Plan(**{**dict(plan), "derived": claimed})
    writer = CacheWriter(directory, plan, cache.vocabulary())
    for index in range(len(plan.shards)):
        content = cache.shard(index)
        rows = change(content) if change is draws_with_true_logits else change(content.rows)
        writer.commit(index, replace(content, rows=rows))
    writer.finalise()
    assert verify(directory) == []
    return directory


def unexplained(found):
    return [m.name for m in (*found.measures, *found.members, *found.drawings) if not m.explained]


def dense_logits(folder, sequence, vocab_size):
    """float64 ``[positions, V]``, the largest of each row 0."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits = model(torch.from_numpy(sequence.token_ids.astype(np.int64))[None]).logits[0, :, :vocab_size].double()
    logits = logits[:-1][torch.from_numpy(sequence.targets[1:])].numpy()
    return logits - logits.max(axis=1, keepdims=True)


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


def draws_with_true_logits(content):
    """The same draws of other entries than chance would make, each with what the teacher says of it."""
    rows = draws(content.rows)
    logits = np.concatenate(
        [dense_logits(draws_with_true_logits.teacher, s, rows.design.vocab_size) for s in map(content.__getitem__, range(len(content)))]
    )  # fmt: skip
    owner = np.repeat(np.arange(len(rows)), rows.tail)
    return replace(rows, tail_logits=logits[owner, rows.tail_ids].astype(np.float32))


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


def test_sequences_are_picked_at_random_and_by_a_seed_again(shared_cache, models):
    cache = open_cache(shared_cache)
    total = sum(len(s) for s in cache.splits.values())
    picked = pick(cache, 5, seed=1)
    assert picked == pick(cache, 5, seed=1)
    assert len(set(picked)) == 5
    assert {p.split for p in picked} == set(cache.splits)
    assert len({tuple(pick(cache, 5, seed=n)) for n in range(20)}) == 20
    # Every sequence can be asked for.
    assert len({p for n in range(400) for p in pick(cache, 5, seed=n)}) == total
    assert len(set(pick(cache, EVERYTHING, seed=3))) == total
    assert len(pick(cache, 1, seed=2)) == 1
    teacher = str(models / "teacher")
    found = rescore(shared_cache, sequences=3, teacher=teacher)
    assert rescore(shared_cache, sequences=3, teacher=teacher, seed=found.seed) == found
    assert found.seed != rescore(shared_cache, sequences=1, teacher=teacher).seed
    record = found.as_record()
    assert record["seed"] == found.seed
    assert record["looked_at"] == [{"split": p.split, "index": p.index} for p in pick(cache, 3, found.seed)]


TOP_K = {"method": "top_k", "k": 24, "temperatures": [0.5, 2.0]}
THRESHOLD = {"method": "threshold", "k": 24, "temperatures": [1.0], "floors": [0.0005]}


@pytest.mark.parametrize(
    ("selection", "change"),
    [
        (TOP_K, {"k": 10}),
        (TOP_K | {"values": "half"}, {"k": 10}),
        (THRESHOLD, {"k": 10}),
        ({"positions": "entropy", "quantile": 0.5, "bytes_per_position": 48}, {"max_length": 24}),
        ({"positions": "loss", "quantile": 0.5, "bytes_per_position": 48}, {"sequences": (0, 9)}),
        ({"method": "random_sampling", "draws": 12, "temperatures": [1.0]}, {"max_length": 40}),
    ],
)
def test_honest_derived_caches_are_explained(values, models, tmp_path, selection, change):
    values["selection"] = selection
    made = open_cache(capture(parse_recipe(values)).directory)
    part = subset(made, tmp_path / "part", **change).directory
    found = rescore(part, sequences=EVERYTHING, teacher=str(models / "teacher"))
    assert unexplained(found) == []
    assert sum(m.entries for m in found.members) > 0
    if "k" not in change:
        return
    twice = subset(open_cache(part), tmp_path / "twice", k=change["k"] // 2).directory
    both = merge([open_cache(twice), open_cache(twice)], tmp_path / "both", progress=Silent()).directory
    assert unexplained(rescore(both, sequences=EVERYTHING, teacher=str(models / "teacher"))) == []
    # What a derived cache is allowed more does not hide a rest that is made up, nor a head that is cut.
    wrong = forge(part, tmp_path / "rest", lambda rows: replace(rows, rest=rows.rest + np.float32(0.3)))
    assert "rest log-odds" in unexplained(rescore(wrong, sequences=EVERYTHING, teacher=str(models / "teacher")))


@pytest.mark.parametrize("derived", [False, True])
@pytest.mark.parametrize(
    "selection",
    [
        {"bytes_per_position": 48},
        {"bytes_per_position": 40, "temperatures": [1.0]},
        {"method": "random_sampling", "draws": 12, "temperatures": [1.0]},
    ],
)
def test_draws_that_chance_does_not_make_are_found(values, models, tmp_path, selection, derived):
    values["selection"] = selection
    source = capture(parse_recipe(values)).directory
    draws_with_true_logits.teacher = models / "teacher"
    look = partial(rescore, sequences=EVERYTHING, teacher=str(models / "teacher"))
    honest = look(forge(source, tmp_path / "honest", lambda rows: rows, derived=derived))
    assert unexplained(honest) == []
    assert honest.draws == (NOT_COMPARED if derived else "compared")
    found = look(forge(source, tmp_path / "forged", draws_with_true_logits, derived=derived))
    # All that could be said of single numbers is true.
    assert [m.name for m in found.measures if not m.explained] == []
    assert "drawn by id" in unexplained(found)
    assert ("other draws" in unexplained(found)) == (not derived)


SAMPLING = [
    Selection("threshold_sampling", (1.0,), floors=(0.02,)),
    Selection("threshold_sampling", (1.0, 2.0), floors=(0.05, 0.01)),
    Selection("threshold_sampling", (1.0,), floors=(0.5,), tail_logits=False),
    Selection("random_sampling", (0.7,), draws=9),
]


@pytest.mark.parametrize("selection", SAMPLING, ids=str)
def test_what_chance_draws_is_0_on_average_and_as_spread_as_is_said(selection):
    generator = np.random.default_rng(5)
    rows, seeds, questions = 64, 200, 2 + len(selection.temperatures)
    logits = torch.from_numpy(generator.normal(0, 2.5, (rows, 90))).float()
    found = []
    for _ in range(seeds):
        drawn = select(
            logits, torch.zeros(rows, dtype=torch.int64), selection, generator.random((rows, selection.uniforms))
        ).rows
        head, tail = (
            _places(c, i, logits.device) for c, i in ((drawn.head, drawn.head_ids), (drawn.tail, drawn.tail_ids))
        )
        dense = logits.double() - logits.double().amax(dim=1, keepdim=True)
        found.append(off_chance(dense, drawn, head, tail))
    off, variance, reach = np.moveaxis(np.array(found), 3, 0)
    assert off.shape == (seeds, rows, questions)
    assert (variance >= -1e-12).all()
    assert (np.abs(off) <= (reach * (selection.draws if selection.method == "random_sampling" else 1)) + 1e-9).all()
    means, error = off.mean(axis=(0, 1)), np.sqrt(variance.mean(axis=(0, 1)) / (rows * seeds))
    assert (np.abs(means) < 4 * error).all()
    # The bound holds of every row, and is no idle one where draws are independent.
    assert (off.var(axis=0) <= 1.6 * variance[0] + 1e-9).all()
    assert (off.var(axis=0).mean(axis=0) <= 1.05 * variance[0].mean(axis=0)).all()
    if selection.method == "random_sampling":
        assert (off.var(axis=0).mean(axis=0) >= 0.7 * variance[0].mean(axis=0)).all()
    # As many draws, of the least likely entries.
    small = dense.masked_fill(torch.zeros_like(dense, dtype=torch.bool).index_put(head, torch.tensor(True)), torch.inf)
    least = small.argsort(dim=1).numpy()
    places = np.arange(len(drawn.tail_ids)) - drawn.tail_offsets[np.repeat(np.arange(rows), drawn.tail)]
    tail = tail[0], torch.from_numpy(least[tail[0].numpy(), places])
    forged = off_chance(dense, drawn, head, tail)
    assert not Drawing.of("by size", forged[:, 0], forged[:, 0], alarm=1e-5).explained
    # No honest cache is called forged.
    assert all(
        Drawing.of("x", one[:, n], one[:, n], alarm=1e-5).explained for one in np.array(found) for n in range(questions)
    )


def test_draws_are_judged_by_what_chance_may_do():
    def drawing(mean, other=None, rows=400):
        one = np.tile([mean, 1 / 12, 0.5], (rows, 1))
        return Drawing.of("x", one, one if other is None else np.tile([other, 1 / 12, 0.5], (rows, 1)), alarm=1e-5)

    # Bernstein: exp(-n t^2 / 2 / (v + c t / 3)) on both sides.
    t = drawing(0.0).chance
    assert 2 * np.exp(-400 * t**2 / 2 / (1 / 12 + 0.5 * t / 3)) == pytest.approx(1e-5)
    assert drawing(0.99 * t).explained
    assert not drawing(1.01 * t).explained
    assert not drawing(-1.01 * t).explained
    assert drawing(1.5 * t, 1.3 * t).explained
    assert drawing(0.45, rows=1).explained
    assert Drawing.of("x", np.zeros((0, 3)), np.zeros((0, 3)), alarm=1e-5).explained


def test_the_control_is_real_where_every_batch_is_one_sequence(values, models, monkeypatch):
    values["teacher"] |= {"dtype": "bfloat16", "batch_tokens": 16}
    values["selection"] = {"method": "top_k", "k": 8}
    directory = capture(parse_recipe(values)).directory
    batches, hidden = [], TeacherForward.hidden
    monkeypatch.setattr(TeacherForward, "hidden", lambda self, rows: batches.append(len(rows)) or hidden(self, rows))
    assert unexplained(rescore(directory, sequences=1, teacher=str(models / "teacher"))) == []
    assert batches == [1, 2]
    # Most sequences come out the same on a CPU whatever is beside them, but not all.
    found = rescore(directory, sequences=EVERYTHING, teacher=str(models / "teacher"))
    assert max(m.control.largest for m in found.measures) > 1e-3
    assert unexplained(found) == []
    assert _companion([5, 7, 7, 4], 1) == 0
    assert _companion([7, 7], 0) == 1
    assert _companion([7], 0) == 0


def test_sequences_are_scored_in_the_batches_of_their_shard(values, models):
    """Half precision shows the batch: as made, nothing is off but by rounding."""
    values["teacher"] |= {"dtype": "bfloat16", "batch_tokens": 400}
    values["selection"] = {"method": "top_k", "k": 8, "values": "half"}
    directory = capture(parse_recipe(values)).directory
    controls = []
    for seed in range(5):
        found = rescore(directory, sequences=1, teacher=str(models / "teacher"), seed=seed)
        assert all(m.beyond.largest < 1e-4 for m in found.measures)
        controls.append(max(m.control.largest for m in found.measures))
    assert max(controls) > 1e-3


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
    assert all(len(line) <= 80 for line in out.splitlines() if line.startswith(("label", "head", "other", "drawn by")))
    assert f"loading the teacher {models / 'teacher'}" in out.replace("\n", "")
    seed = out.split("--seed ")[1].split(".")[0]
    assert f"--seed {seed}." in run("verify", shared_cache, *options, "--seed", seed)[1]
    part = subset(open_cache(shared_cache), tmp_path / "part", sequences=(0, 20)).directory
    code, out = run("verify", part, *options)
    assert code == 0
    assert "it is what this teacher says" not in out
    assert f"draws {NOT_COMPARED}" in out
    assert json.loads(run("verify", part, *options, "--json")[1])["rescore"]["draws"] == NOT_COMPARED
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
    from kdcache.evaluate.cached_teacher import cached_teacher
    from kdcache.evaluate.rescore import _score

    cache = open_cache(shared_cache)
    content = cache.shard(1)
    sequence = content[2]
    ((scored, alone),) = _score(cache.plan, cached_teacher(cache, str(models / "teacher")), content, 0, [2])
    assert alone.head == pytest.approx(scored.head, abs=1e-4)
    logits = dense_logits(models / "teacher", sequence, cache.vocab_size)
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
