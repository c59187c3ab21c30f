"""Opening a stranger's cache is boring: the short form of what ``benchmarks/robustness.py --soak`` does a million times."""

import json
import random
import threading
from pathlib import Path

import pytest

from kdcache.cache import layout
from kdcache.cache.reader import open_cache
from kdcache.errors import KdcacheError
from tests.hostile import independent, pool, random_bytes, structural
from tests.hostile.files import ATTACKS
from tests.hostile.probe import probe
from tests.hostile.victims import FILES, SHARDS, load_victims, make_victims, seen, write_files


@pytest.fixture(scope="module")
def victims(tmp_path_factory):
    folder = tmp_path_factory.mktemp("victims")
    make_victims(folder)
    return load_victims(folder)


@pytest.mark.parametrize(("attack", "cases", "kinds"), [
    ("random_bytes", 5000, set(random_bytes.KINDS)),
    ("structural", 2000, {kind.__name__.replace("_", " ") for kind in structural.KINDS}),
])  # fmt: skip
def test_no_change_crashes_hangs_or_goes_unseen(attack, cases, kinds):
    tally = pool.run(attack, cases)
    assert tally.failures == []
    assert (tally.cases, tally.crashes, tally.hangs) == (cases, 0, 0)
    assert {kind for kind, _ in tally.outcomes} == kinds
    assert tally.count("refused") > cases / 2
    assert tally.slowest < pool.HANG_SECONDS


def test_hostile_files_cost_neither_memory_nor_time(tmp_path, victims):
    directories = []
    for number, make in enumerate(ATTACKS.values()):
        directories.append(tmp_path / str(number))
        directories[-1].mkdir()
        make(directories[-1], victims[0])
    costs = dict(zip(ATTACKS, probe(directories), strict=True))
    assert {name: cost for name, cost in costs.items() if not cost.harmless} == {}
    assert [name for name, cost in costs.items() if "none" in cost.outcome] == []


def test_every_hostile_file_is_in_the_table_of_attacks():
    table = (Path(__file__).parent / "README.md").read_text()
    assert [name for name in ATTACKS if f"| {name} |" not in table] == []
    assert [kind for kind in random_bytes.KINDS if f"| {kind} |" not in table] == []
    assert [k.__name__ for k in structural.KINDS if f"| {k.__name__.replace('_', ' ')} |" not in table] == []


def test_a_file_replaced_while_it_is_read_is_read_whole_or_refused(tmp_path, victims):
    victim, path, stop = victims[0], tmp_path / SHARDS[0], threading.Event()
    write_files(tmp_path, victim.files)
    good, other = victim.files[SHARDS[0]], victims[1].files[SHARDS[0]]

    def replace():
        draw = random.Random(0)
        while not stop.is_set():
            data = draw.choice((good, good, other, good[: draw.randrange(len(good))], good + other))
            if draw.random() < 0.5:
                path.write_bytes(data)
            else:
                (tmp_path / "next").write_bytes(data)
                (tmp_path / "next").replace(path)

    thread, outcomes = threading.Thread(target=replace), []
    thread.start()
    cache = open_cache(tmp_path)
    try:
        for _ in range(600):
            try:
                outcomes.append(seen(cache, SHARDS[0]) == victim.digests[SHARDS[0]])
            except KdcacheError:
                outcomes.append(None)
    finally:
        stop.set()
        thread.join()
    assert False not in outcomes
    assert {True, None} <= set(outcomes)


def test_the_second_reader_sees_what_the_first_one_sees(victims):
    for victim in victims:
        plan = json.loads(victim.files[layout.PLAN_FILE])
        for index, name in enumerate(SHARDS):
            shard = independent.read(victim.files[name], plan, index)
            assert independent.broken(shard, victim.files[name], plan, index) == []
            forgery = structural.Forgery(victim, index)
            forgery.tensors["row.label"] = b"\xff" * len(forgery.tensors["row.label"])
            forged = forgery.seal()[name]
            assert independent.broken(independent.read(forged, plan, index), forged, plan, index) == [11]


def test_the_pool_sees_crashes_hangs_and_foreign_errors():
    """The instrument itself: an attack that misbehaves on purpose."""
    tally = pool.run("misbehaving", 8, workers=2)
    assert (tally.crashes, tally.hangs, tally.count("FOREIGN ERROR"), tally.count("SILENT DIFFERENCE")) == (1, 1, 1, 1)
    assert tally.count("refused") == 4
    assert len(tally.failures) == 4


def test_restored_victims_are_what_they_were(tmp_path, victims):
    victim = victims[2]
    write_files(tmp_path / victim.name, victim.files)
    directories = {v.name: tmp_path / v.name for v in victims}
    for v in victims:
        write_files(directories[v.name], v.files)
    for index in range(40):
        random_bytes.attack(victims, directories, index)
        structural.attack(victims, directories, index)
    for v in victims:
        assert {name: (directories[v.name] / name).read_bytes() for name in FILES} == v.files
