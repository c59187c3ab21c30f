"""Sweeps as they run: failures stay with their row, and whatever stops a sweep, the same command goes on."""

import copy
import io
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from kdcache.cache.store import open_cache
from kdcache.cli import main
from kdcache.commands.sweeps import LiveTable, PlainLines
from kdcache.errors import RecipeError, TrainingError
from kdcache.progress import Silent
from kdcache.recipe import parse_recipe
from kdcache.report import write_pages
from kdcache.run_record import load_record
from kdcache.student import distill as distill_module
from kdcache.student.agreement import refuse_unfit
from kdcache.student.distill import distill
from kdcache.sweep import crew as crew_module
from kdcache.sweep import run as run_module
from kdcache.sweep import worker as worker_module
from kdcache.sweep.board import FAILED, FINISHED, RUNNING, Board, Earlier, RowState, SweepDirectory
from kdcache.sweep.ready import rows_with_earlier
from kdcache.sweep.rows import expand
from kdcache.sweep.run import run_sweep
from kdcache.sweep.search import Search
from kdcache.sweep.table import leaderboard, leaderboard_markdown, notes, plain_line
from kdcache.sweep_record import read_sweep


@pytest.fixture
def sweep(values, shared_cache, tmp_path):
    """Values of a recipe over the shared cache with a section sweep, in a directory of this test."""

    def make(section, **training):
        own = copy.deepcopy(values)
        own["cache"]["directory"] = str(shared_cache)
        own["output"] = str(tmp_path / "sweep")
        own["training"] |= {"max_steps": 3, **training}
        own["sweep"] = section
        return own

    return make


class InThread(worker_module.Worker):
    """A worker without a process of its own, for tests that are not about processes: it imports nothing anew."""

    def __init__(self, number, workers):
        self.number, self.row, self.kind, self.base, self.spoilt, self.pid = (
            number,
            None,
            None,
            None,
            False,
            os.getpid(),
        )
        self.connection, theirs = multiprocessing.Pipe()
        self._thread = threading.Thread(target=self._live, args=(theirs,))
        self._thread.start()

    def _live(self, connection):
        with connection:
            worker_module.work(connection)

    pid = None

    def death(self):
        return None

    def stop(self):
        self.connection.close()
        self._thread.join()


@pytest.fixture
def in_threads(monkeypatch):
    monkeypatch.setattr(crew_module, "Worker", InThread)


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """Run `kdcache sweep` on values in this process: (exit code, stdout, stderr)."""

    def call(values, *argv):
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(values, sort_keys=False))
        monkeypatch.setattr(sys, "argv", ["kdcache", "sweep", str(path), *argv])
        with pytest.raises(SystemExit) as exited:
            main()
        out, err = capsys.readouterr()
        return exited.value.code or 0, out, err

    return call


def record(values):
    return json.loads((Path(values["output"]) / "sweep.json").read_text())


def states(values):
    return {row["name"]: row["state"] for row in record(values)["rows"]}


def contents(folder, *names):
    return {name: (folder / name).read_bytes() for name in names}


def start(path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "kdcache", "sweep", str(path)], env=environment, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.05)


def children(pid):
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for processes in /proc")
@pytest.mark.usefixtures("interruptible")
def test_whatever_ends_it_the_same_command_goes_on(sweep, command, tmp_path, monkeypatch):
    # As in this process: numbers of threads may change the last bits.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    rows = {
        "A": {"loss.temperature": 1},
        "C": {"training.max_steps": 60, "training.max_length": 40, "student.lora.r": 4},
        "B": {"training.max_steps": 150},
        "D": {"training.max_steps": 60, "seed": 2},
    }
    values = sweep({"rows": rows}, save_steps=5)
    folder, path = Path(values["output"]), tmp_path / "killed.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))

    def checkpoints(row):
        return {p.name for p in folder.glob(f"{row}/checkpoints/checkpoint-*")}

    # The sweep's process is killed, while others are refused: none of its own stays.
    process = start(path)
    wait_for((folder / ".lock").exists, process)
    refused = command(values)
    assert refused[0] == 2
    assert "another process is at work on the sweep in" in refused[2]
    wait_for(lambda: checkpoints("C"), process)
    workers = children(process.pid)
    process.kill()
    process.communicate()
    assert states(values) == {"A": "finished", "C": "running", "B": "waiting", "D": "waiting"}
    end = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text() for pid in workers):
        assert time.monotonic() < end
        time.sleep(0.05)
    assert workers

    # A worker is killed, another takes the next row; then Ctrl-C, which reaches every process of a terminal.
    kept = contents(folder, "A/run.json", "A/model/adapter_model.safetensors")
    # Else the sweep would draw them now, for so long that it may not see B at work.
    write_pages(load_record(folder / "A"))
    before, killed, shown = checkpoints("C"), [], PlainLines.show

    def show(self, board):
        shown(self, board)
        if not killed and board["C"].state == RUNNING and checkpoints("C") - before:
            killed.append(board["C"].pid)
            os.kill(board["C"].pid, signal.SIGKILL)
        elif board["C"].state == FAILED and board["B"].state == board["D"].state == RUNNING and checkpoints("B"):
            assert board["D"].pid not in (None, *killed)
            for pid in (board["B"].pid, os.getpid()):
                os.kill(pid, signal.SIGINT)

    monkeypatch.setattr(PlainLines, "show", show)
    code, out, err = command(values, "--jobs", "2")
    assert code == 130, (out, err)
    assert "Traceback" not in err
    written = record(values)
    assert (written["format"], written["name"], written["jobs"]) == ("kdcache-sweep", "sweep", 2)
    assert written["factors"] == [
        "loss.temperature",
        "training.max_steps",
        "training.max_length",
        "student.lora.r",
        "seed",
    ]
    assert "sweep" not in written["recipe"]
    assert written["recipe"]["training"]["max_steps"] == 3
    assert [(r["name"], r["state"], r["directory"]) for r in written["rows"]] == [
        ("A", "finished", "A"), ("C", "failed", "C"), ("B", "stopped", "B"), ("D", "stopped", "D"),
    ]  # fmt: skip
    errors = {r["name"]: r["error"] for r in written["rows"]}
    assert errors["A"] is errors["B"] is None
    assert re.match("its process was ended by SIGKILL: out of memory, as a rule; the same command goes on", errors["C"])
    assert all(r["seconds"] > 0 for r in written["rows"])
    page = (folder / "leaderboard.md").read_text()
    assert "1 of 4 rows finished" in page
    assert "C failed: its process was ended by SIGKILL" in page

    # The same again with a new row: what was finished stays as it is, the others go on.
    monkeypatch.setattr(PlainLines, "show", shown)
    monkeypatch.setattr(crew_module, "Worker", InThread)
    rows["E"], begun = {"seed": 3}, []
    again = run_sweep(
        parse_recipe(values), after_row=write_pages, watch=lambda b: begun.extend(s.name for s in b.having(RUNNING))
    )
    assert {s.state for s in again.rows} == {FINISHED}
    assert set(begun) == {"B", "C", "D", "E"}
    assert contents(folder, *kept) == kept
    assert json.loads((folder / "C/run.json").read_text())["resumed_at"] >= 10
    assert json.loads((folder / "B/run.json").read_text())["resumed_at"] >= 5
    assert states(values) == dict.fromkeys("ACBDE", "finished")
    assert record(values)["seconds"] > written["seconds"]
    assert (folder / "C/loss.png").exists()
    names = [line.split(" | ")[0].strip("| ") for line in (folder / "leaderboard.md").read_text().splitlines()[4:9]]
    by_perplexity = sorted(again.rows, key=lambda s: s.scores["student after"]["perplexity"])
    assert names == [s.name for s in by_perplexity]

    # A row of a sweep, killed twice, is the student that is trained alone.
    alone = distill(again["C"].row.recipe.model_copy(update={"output": str(tmp_path / "alone")}))
    same = "model/adapter_model.safetensors"
    assert (alone.output / same).read_bytes() == (folder / "C" / same).read_bytes()
    assert alone.scores == again["C"].scores


def test_a_search_over_few_values_repeats_itself_and_goes_on(sweep, in_threads):
    values = sweep({"rows": {"A": {}}, "search": {"loss.temperature": [1, 2]}, "trials": 3}, max_steps=1)
    board = run_sweep(parse_recipe(values))
    names = ["A", "trial-000", "trial-001", "trial-002"]
    assert [(s.name, s.state) for s in board.rows] == [(n, FINISHED) for n in names]
    assert set(board["trial-001"].row.changes) == {"loss.temperature"}
    values["sweep"]["trials"] = 4
    again = run_sweep(parse_recipe(values))
    assert [s.name for s in again.rows] == [*names, "trial-003"]
    assert [s.row.changes for s in again.rows][:4] == [s.row.changes for s in board.rows]
    study = Search(parse_recipe(values), Path(values["output"]))._study
    assert [t.value for t in study.trials] == [s.scores["student after"]["loss"] for s in again.rows[1:]]
    assert not list(Path(values["output"]).glob("errors.log"))
    # Rows that are named still have to differ.
    values["sweep"] = {"rows": {"A": {}, "B": {}}}
    with pytest.raises(RecipeError, match="the rows A and B are the same experiment"):
        run_sweep(parse_recipe(values))


def test_a_search_asks_the_same_whether_stopped_or_not(sweep, tmp_path):
    section = {"search": {"training.learning_rate": {"low": 1e-4, "high": 1e-2, "log": True}, "student.lora.r": {"low": 2, "high": 8},
                          "loss.temperature": [1, 2]}, "trials": 14}  # fmt: skip
    recipe = parse_recipe(sweep(section))

    def run(folder, sittings):
        folder.mkdir()
        asked = []
        for count in sittings:
            search = Search(recipe, folder)
            assert list(search.trials().values()) == asked
            for _ in range(count):
                state = search.ask()
                changes = state.row.changes
                asked.append(changes)
                search.tell(state.name, (changes["training.learning_rate"] - 1e-3) ** 2 + changes["student.lora.r"])
        assert not search.wants_more()
        return asked

    whole, parts = run(tmp_path / "whole", [14]), run(tmp_path / "parts", [3, 1, 10])
    assert whole == parts
    assert len({str(changes) for changes in whole}) > 7
    assert all(2 <= c["student.lora.r"] <= 8 and isinstance(c["student.lora.r"], int) for c in whole)
    board = Board(recipe, 1, [RowState(row) for row in expand(recipe)])
    Search(recipe, tmp_path / "whole").agree_with(board, Earlier([{"name": "trial-002", "seconds": 7.0}], 0.0))
    assert [s.row.changes for s in board.rows] == [{k: pytest.approx(v) for k, v in c.items()} for c in whole]
    assert board["trial-002"].seconds == 7.0
    with pytest.raises(TrainingError, match=r"has the search's row trial-000, but its search\.log does not know of it"):
        Search(recipe, tmp_path).agree_with(board, Earlier([], 0.0))
    section["search"]["loss.temperature"] = [1, 3]
    with pytest.raises(TrainingError, match=r"the search in .* is over .*put it back"):
        Search(parse_recipe(sweep(section)), tmp_path / "whole")


def test_a_search_without_optuna_says_what_to_install(sweep, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(RecipeError, match=r"pip install 'kdcache\[search\]'"):
        run_sweep(parse_recipe(sweep({"search": {"seed": [1, 2]}, "trials": 2})))


def test_the_command_lists_its_rows_and_refuses_before_it_begins(sweep, command, in_threads):
    values = sweep({"rows": {"A": {}}})
    code, out, err = command(values, "--dry-run", "--grid", "loss.temperature=[1,4]", "training.seed=1")
    assert (code, out) == (2, "")
    assert "unknown recipe key training.seed" in err
    code, out, err = command(values, "--dry-run", "--grid", "loss.temperature=[1,4]", "--grid", "seed=[1,2]")
    assert (code, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines() if "new" in line] == [
        "A", "temperature=1,seed=1", "temperature=1,seed=2", "temperature=4,seed=1", "temperature=4,seed=2",
    ]  # fmt: skip
    assert "5 rows in" in out
    assert "complete" in out
    for options, message in (
        (["--grid", "loss.temperature=2"], "--grid loss.temperature takes a list of values, such as 'loss.temperature=[2]'"),
        (["--grid", "loss.temperature=[]"], "loss.temperature has an empty list"),
        (["--grid", "loss.temperature=[0.5]"], "row temperature=0.5: loss.temperature 0.5 is below"),
        (["--grid", "nonsense"], "should look like key.path=value"),
        (["--trials", "3"], "sweep.trials goes with sweep.search"),
        (["sweep=null"], "nothing to sweep"),
        (["sweep=null", "--grid", "training.optimizer=[adamw_torch, nonsense]"],
         "row optimizer=nonsense: transformers refuses the training section"),
        (["sweep=null", "--grid", "student.model=[/no/such/folder]"], "row model=no-such-folder: "),
        (["cache.directory=/nowhere/at/all", "--no-make-cache"], "the cache /nowhere/at/all is not complete"),
    ):  # fmt: skip
        code, out, err = command(values, *options)
        assert (code, out) == (2, ""), options
        assert message in err
        assert not (Path(values["output"]) / "sweep.json").exists()


def test_the_command_makes_what_is_missing_and_starts_over_when_told(sweep, command, in_threads, tmp_path, monkeypatch):
    values = sweep({"grid": {"loss.temperature": [1, 2]}})
    values["cache"]["directory"] = str(tmp_path / "own-cache")
    folder = Path(values["output"])
    code, out, err = command(values)
    assert (code, err) == (0, "")
    assert "cache id" in out
    assert "written:" in out
    assert states(values) == {"temperature=1": "finished", "temperature=2": "finished"}
    first = (folder / "temperature=1/run.json").read_bytes()
    values["training"]["max_steps"] = 4
    code, out, err = command(values)
    assert code == 2
    assert "row temperature=1: " in err
    assert "training.max_steps was 3, now 4" in err
    assert (folder / "temperature=1/run.json").read_bytes() == first
    # What is wrong with the directory is said before the teacher runs.
    later = copy.deepcopy(values)
    later["cache"]["directory"] = str(tmp_path / "later-cache")
    code, out, err = command(later)
    assert (code, out) == (2, "")
    assert "row temperature=1: " in err
    assert "training.max_steps was 3, now 4" in err
    assert not (tmp_path / "later-cache").exists()
    for changes, message in (
        ({"student.lora.targets": ["nothing"]}, "row A: student.lora does not fit the model"),
        ({"training.max_length": 3}, "row A: no sequence of split validation has a target within its first 3"),
    ):
        values["sweep"] = {"rows": {"B": {}, "A": changes}}
        code, out, err = command(values, "--overwrite")
        assert (code, out) == (2, "")
        assert message in err
        assert (folder / "temperature=1/run.json").read_bytes() == first
    train = distill_module.train_to_end

    def breaks(trainer, *rest):
        if Path(trainer.args.output_dir).parent.name == "A":
            raise TrainingError("out of luck")
        return train(trainer, *rest)

    monkeypatch.setattr(distill_module, "train_to_end", breaks)
    values["sweep"] = {"rows": {"A": {"seed": 1}, "B": {}}}
    code, out, err = command(values, "--overwrite")
    # A row fails, and of the old ones nothing is left: they were forgotten together.
    assert code == 1
    assert "A failed: out of luck" in out
    assert states(values) == {"A": "failed", "B": "finished"}
    assert not (folder / "temperature=1").exists()


def test_one_row_does_not_bring_the_others_down(sweep, in_threads, monkeypatch):
    class Heard(Silent):
        def __init__(self):
            self.warnings = []

        def warning(self, text):
            self.warnings.append(text)

    values, heard, train = (
        sweep({"rows": {"A": {}, "B": {"seed": 1}}}, max_steps=1),
        Heard(),
        distill_module.train_to_end,
    )
    folder = Path(values["output"])

    def breaks(trainer, *rest):
        if Path(trainer.args.output_dir).parent.name == "A":
            raise RuntimeError("broken")
        return train(trainer, *rest)

    def stumbles(done):
        raise ValueError("no table")

    monkeypatch.setattr(distill_module, "train_to_end", breaks)
    # Where the tracebacks should go, nothing can be written.
    board = run_sweep(
        parse_recipe(values),
        after_row=stumbles,
        progress=heard,
        watch=lambda board: (folder / "errors.log").mkdir(exist_ok=True),
    )
    assert {s.name: s.state for s in board.rows} == {"A": FAILED, "B": FINISHED}
    assert board["A"].error == "RuntimeError: broken"
    assert any("A: cannot write" in text for text in heard.warnings)
    assert any(text == "B: its pages are not written, ValueError: no table" for text in heard.warnings)
    # A run.json of another version, which has no more than every reader needs.
    monkeypatch.setattr(distill_module, "train_to_end", train)
    run = json.loads((folder / "B/run.json").read_text())
    after = {key: run["scores"]["student after"][key] for key in ("loss", "perplexity")}
    few = {key: run[key] for key in ("format", "recipe", "cache_id")} | {"scores": {"student after": after}}
    (folder / "B/run.json").write_text(json.dumps(few))
    board = run_sweep(parse_recipe(values))
    assert {s.state for s in board.rows} == {FINISHED}
    assert "| B | seed 1 | " in (folder / "leaderboard.md").read_text()
    assert plain_line(board["B"]).startswith(f"B: finished, perplexity {after['perplexity']:.3f}, KL to teacher ?, ")


@pytest.mark.parametrize(
    ("gpus", "visible", "seen"), [(1, None, None), (4, None, "1"), (2, "6,7", "7"), (3, "GPU-a, GPU-b,GPU-c", "GPU-c")]
)
def test_every_worker_has_a_gpu_of_its_own(monkeypatch, gpus, visible, seen):
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    # Set first, so that it is put back.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    worker_module._take_share(5, 8)
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == seen


def test_a_broken_record_is_its_rows_failure_and_no_others(sweep, command, in_threads, tmp_path):
    values = sweep({"rows": {"A": {}, "B": {"seed": 1}}})
    assert command(values)[0] == 0
    record = tmp_path / "sweep" / "A" / "run.json"
    record.write_text("{broken")
    values["sweep"]["rows"]["C"] = {"seed": 2}
    code, out, err = command(values)
    assert code == 1
    assert err == ""
    assert f"remove {record.parent} to train it again" in out
    assert [row["state"] for row in read_sweep(tmp_path / "sweep")["rows"]] == ["failed", "finished", "finished"]
    assert record.read_text() == "{broken"


def test_a_dry_run_refuses_what_the_run_would_refuse(sweep, command, in_threads, tmp_path):
    values = sweep({"rows": {"A": {}}})
    assert command(values)[0] == 0
    code, _, err = command(values, "--dry-run", "training.max_steps=2")
    assert code == 2
    assert "row A" in err
    assert "training.max_steps was 3, now 2" in err
    before = sorted(p.name for p in (tmp_path / "sweep").iterdir())
    assert command(values, "--dry-run")[0] == 0
    assert sorted(p.name for p in (tmp_path / "sweep").iterdir()) == before


def test_what_is_no_sweep_is_left_alone(sweep, tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "Crew", lambda *a: pytest.fail("a process was started"))
    values = sweep({"rows": {"A": {}}})
    folder = Path(values["output"])
    folder.mkdir()
    (folder / "thesis.txt").write_text("x")
    with pytest.raises(TrainingError, match=r"holds something that is no sweep \(thesis\.txt\)"):
        run_sweep(parse_recipe(values))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(TrainingError, match="without a launcher"):
        run_sweep(parse_recipe(values))


def one_row(**other):
    row = {"name": "A", "changes": {}, "directory": "A", "state": "finished", "error": None, "seconds": 1} | other
    return json.dumps({"format": "kdcache-sweep", "seconds": 1, "rows": [row]})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not the record of a sweep"),
        ('{"format": "other"}', "its format is 'other'"),
        ('{"format": "kdcache-sweep", "rows": [{}]}', "is not the record of a sweep"),
        ('{"format": "kdcache-sweep"}', "lacks rows"),
        (one_row(seconds="soon"), "row 1: its seconds are no number"),
        (one_row(seconds=float("nan")), "row 1: its seconds are no number"),
        (one_row(directory="../A"), r"row 1: its directory '\.\./A' does not lie in the sweep's"),
        (one_row(directory=".."), "does not lie in the sweep's"),
        (one_row(directory="."), "does not lie in the sweep's"),
        (one_row(directory="/A"), "does not lie in the sweep's"),
        (one_row(directory="A" * 300), "does not lie in the sweep's"),
        (one_row(state="dancing"), "the state 'dancing'"),
        (one_row(name=None), "row 1: it has no name"),
        (one_row(changes=[]), "row 1: its changes are no mapping"),
        (one_row(error=[]), "row 1: its error is no text"),
        ('{"format": "kdcache-sweep", "rows": [1]}', "row 1: it is no mapping"),
        ('{"format": "kdcache-sweep", "rows": [], "jobs": 1' + "0" * 400 + "}", "lacks jobs"),
        (one_row()[:-2] + "," + one_row().partition("[")[2], "two rows have the name 'A'"),
    ],
)  # fmt: skip
def test_a_damaged_record_is_refused(tmp_path, text, message):
    (tmp_path / "sweep.json").write_text(text)
    with SweepDirectory(tmp_path) as directory, pytest.raises(TrainingError, match=message):
        directory.earlier()


def test_the_recipe_in_the_record_can_be_trained(sweep, shared_cache):
    values = sweep({"rows": {"A": {}, "B": {"loss.temperature": 1}}})
    # The cache was made with another selection than the default one.
    del values["selection"]
    recipe = parse_recipe(values)
    board = Board(recipe, 3, [RowState(row) for row in expand(recipe)])
    with SweepDirectory(board.path) as directory:
        board.write()
        assert directory.earlier().of("B") == {
            "name": "B", "changes": {"loss.temperature": 1.0}, "directory": "B", "state": "waiting", "error": None, "seconds": 0.0,
        }  # fmt: skip
    written = read_sweep(board.path)
    assert (written["name"], written["jobs"], written["factors"]) == ("sweep", 3, ["loss.temperature"])
    assert "selection" not in written["recipe"]
    refuse_unfit(parse_recipe(written["recipe"]), open_cache(shared_cache))


def test_an_earlier_row_whose_run_is_gone_is_forgotten(sweep):
    recipe = parse_recipe(sweep({"rows": {"A": {}}}))
    row = {"changes": {"seed": 1}, "state": "finished", "error": None, "seconds": 5.0}
    earlier = Earlier(
        [{"name": "B", "directory": "B", **row}, {"name": "C", "directory": "C", **row, "changes": {"seed": 2}}], 10.0
    )
    run = Path(recipe.output) / "B/run.json"
    run.parent.mkdir(parents=True)
    run.write_text("{}")
    assert [(s.name, s.seconds) for s in rows_with_earlier(recipe, expand(recipe), earlier)] == [("A", 0.0), ("B", 5.0)]


def test_train_student_does_not_train_a_sweep(sweep):
    with pytest.raises(RecipeError, match="train them with kdcache sweep, or one student with sweep=null"):
        distill(parse_recipe(sweep({"rows": {"A": {}}})))


def scores(perplexity, tokens=100):
    row = {"loss": 1.0, "perplexity": perplexity, "kl_to_teacher": 0.5, "tokens": tokens}
    return {"student before": {**row, "perplexity": 9.0}, "student after": row, "teacher": {**row, "perplexity": 2.0}}


@pytest.fixture
def board(sweep):
    """A board of four rows in every state, without any process."""
    rows = {"A": {}, "B": {"loss.temperature": 1}, "C": {"seed": 2}, "D": {"training.max_length": 40}}
    recipe = parse_recipe(sweep({"rows": rows}))
    made = Board(recipe, 1, [RowState(row) for row in expand(recipe)])
    made["A"].state, made["A"].scores, made["A"].seconds = FINISHED, scores(5.0), 12.0
    made["B"].begin(1)
    made["B"].hear("begin", ["train student", 100, "steps"])
    made["B"].hear("advance", [25, "loss 1.2345  ce 1.0000"])
    made["B"].hear("message", ["step 20: validation perplexity 6.125, KL to teacher 0.9"])
    made["C"].leave(FAILED, "out of luck")
    made["D"].state, made["D"].scores, made["D"].seconds = FINISHED, scores(4.0, 50), 10.0
    return made


def test_the_leaderboard_is_sorted_and_ends_with_what_failed(board):
    columns, rows = leaderboard(board)
    assert columns == ("row", "changes", "perplexity", "KL to teacher", "tokens", "seconds")
    assert rows[:2] == [
        ("D", "max_length 40", "4.000", "0.5000", "50", "10"),
        ("A", "-", "5.000", "0.5000", "100", "12"),
    ]
    assert [(r[0], r[2]) for r in rows[2:]] == [("C", "failed"), ("B", "running")]
    assert "Perplexity of student before 9.000, teacher 2.000." in notes(board)
    assert "C failed: out of luck" in notes(board)
    assert any("compare those with as many tokens" in line for line in notes(board))
    page = leaderboard_markdown(board)
    assert page.startswith("# sweep\n\n| row | changes |")
    assert "2 of 4 rows finished" in page


def test_the_live_table_shows_every_row(board):
    text = io.StringIO()
    table = LiveTable(Console(file=text, force_terminal=True, width=120))
    with table:
        table.show(board)
        table.progress.message("a line above")
    shown = text.getvalue()
    for part in (
        "finished",
        "running",
        "failed",
        "25/100",
        "1.2345",
        "6.125",
        "temperature 1",
        "out of luck",
        "a line above",
    ):
        assert part in shown


def test_plain_lines_tell_what_is_new(board):
    class Heard(Silent):
        def __init__(self):
            self.lines = []

        def message(self, text):
            self.lines.append(text)

    heard = Heard()
    with PlainLines(heard) as lines:
        lines.show(board)
        assert [line.split(":")[0] for line in heard.lines] == ["A", "B", "C", "D"]
        assert heard.lines[2] == "C: failed: out of luck"
        lines.show(board)
        assert len(heard.lines) == 4
        lines._last -= 11
        lines.show(board)
        assert len(heard.lines) == 5
        assert heard.lines[4].startswith("B: train student 25/100  loss 1.2345  ce 1.0000  ETA ")
