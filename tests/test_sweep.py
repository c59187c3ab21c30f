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

from kdcache.cli import main
from kdcache.commands.sweeps import LiveTable, PlainLines
from kdcache.errors import RecipeError, TrainingError
from kdcache.progress import Silent
from kdcache.recipe import parse_recipe
from kdcache.report import write_pages
from kdcache.student.distill import distill
from kdcache.sweep import crew as crew_module
from kdcache.sweep import run as run_module
from kdcache.sweep import worker as worker_module
from kdcache.sweep.board import FAILED, FINISHED, RUNNING, Board, Earlier, RowState, SweepDirectory
from kdcache.sweep.rows import expand
from kdcache.sweep.run import run_sweep
from kdcache.sweep.search import Search
from kdcache.sweep.table import leaderboard, leaderboard_markdown, notes


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
        path.write_text(yaml.safe_dump(values))
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


def test_failures_stay_with_their_row_and_are_tried_again(sweep, monkeypatch):
    # As in this process: numbers of threads may change the last bits.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    rows = {
        "A": {"loss.temperature": 1},
        "C": {"training.max_steps": 60, "training.save_steps": 5},
        "D": {"training.max_length": 40, "student.lora.r": 4},
    }
    values = sweep({"rows": rows})
    folder = Path(values["output"])

    def kill(board):
        if list(folder.glob("C/checkpoints/checkpoint-*")) and board["C"].state == RUNNING:
            os.kill(board["C"].pid, signal.SIGKILL)

    board = run_sweep(parse_recipe(values), jobs=2, after_row=write_pages, watch=kill)
    assert {s.name: s.state for s in board.rows} == {"A": FINISHED, "C": FAILED, "D": FINISHED}
    written = record(values)
    assert (written["format"], written["name"], written["jobs"]) == ("kdcache-sweep", "sweep", 2)
    assert written["factors"] == ["loss.temperature", "training.max_steps", "training.save_steps",
                                  "training.max_length", "student.lora.r"]  # fmt: skip
    assert "sweep" not in written["recipe"]
    assert written["recipe"]["training"]["max_steps"] == 3
    assert [(r["name"], r["state"], r["directory"]) for r in written["rows"]] == [
        ("A", "finished", "A"),
        ("C", "failed", "C"),
        ("D", "finished", "D"),
    ]
    errors = {r["name"]: r["error"] for r in written["rows"]}
    assert errors["A"] is errors["D"] is None
    assert re.match("its process was ended by SIGKILL: out of memory, as a rule; the same command goes on", errors["C"])
    assert all(r["seconds"] > 0 for r in written["rows"])
    assert written["seconds"] >= max(r["seconds"] for r in written["rows"])
    page = (folder / "leaderboard.md").read_text()
    assert "2 of 3 rows finished" in page
    assert "C failed: its process was ended by SIGKILL" in page
    assert (folder / "A/loss.png").exists()

    # The same again with a new row: what was finished stays as it is, C goes on.
    kept = contents(folder, "A/run.json", "A/model/adapter_model.safetensors", "D/run.json")
    earlier = record(values)["seconds"]
    values = sweep({"rows": {**rows, "E": {"seed": 3}}})
    begun = []
    again = run_sweep(parse_recipe(values), watch=lambda board: begun.extend(s.name for s in board.having(RUNNING)))
    assert {s.state for s in again.rows} == {FINISHED}
    assert set(begun) == {"C", "E"}
    assert contents(folder, *kept) == kept
    assert json.loads((folder / "C/run.json").read_text())["resumed_at"] >= 5
    assert states(values) == dict.fromkeys("ACDE", "finished")
    assert record(values)["seconds"] > earlier
    names = [line.split(" | ")[0].strip("| ") for line in (folder / "leaderboard.md").read_text().splitlines()[4:8]]
    by_perplexity = sorted(again.rows, key=lambda s: s.scores["student after"]["perplexity"])
    assert names == [s.name for s in by_perplexity]

    # A row of a sweep, stopped or not, is the student that is trained alone.
    for name in "CD":
        row = next(s.row for s in again.rows if s.name == name)
        alone = distill(row.recipe.model_copy(update={"output": str(folder.parent / f"alone-{name}")}))
        same = f"{name}/model/adapter_model.safetensors"
        assert (alone.output / "model/adapter_model.safetensors").read_bytes() == (folder / same).read_bytes()
        assert alone.scores == again[name].scores


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
def test_killed_and_interrupted_it_goes_on_and_leaves_no_process(sweep, command, tmp_path):
    values = sweep({"rows": {"A": {}, "B": {"training.max_steps": 250}}}, save_steps=10)
    folder, path = Path(values["output"]), tmp_path / "killed.yaml"
    path.write_text(yaml.safe_dump(values))

    def trains(process):
        seen = sorted(p.name for p in folder.glob("B/checkpoints/checkpoint-*"))
        wait_for(lambda: sorted(p.name for p in folder.glob("B/checkpoints/checkpoint-*")) not in ([], seen), process)

    process = start(path)
    trains(process)
    assert states(values) == {"A": "finished", "B": "running"}
    refused = command(values)
    assert refused[0] == 2
    assert "another process is at work on the sweep in" in refused[2]
    workers = children(process.pid)
    process.kill()
    process.communicate()
    end = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text() for pid in workers):
        assert time.monotonic() < end
        time.sleep(0.05)
    assert workers

    finished = (folder / "A/run.json").read_bytes()
    process = start(path)
    trains(process)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, (out, err)
    assert "Traceback" not in err
    assert states(values) == {"A": "finished", "B": "stopped"}

    code, out, err = command(values)
    assert (code, err) == (0, "")
    assert states(values) == {"A": "finished", "B": "finished"}
    assert "B: finished, perplexity" in out
    assert (folder / "A/run.json").read_bytes() == finished
    assert json.loads((folder / "B/run.json").read_text())["resumed_at"] >= 20


def test_a_search_tells_its_study_and_goes_on(sweep, in_threads):
    search = {"training.learning_rate": {"low": 1e-4, "high": 1e-2, "log": True}, "loss.temperature": [1, 2]}
    values = sweep({"rows": {"A": {}}, "search": search, "trials": 2})
    board = run_sweep(parse_recipe(values))
    assert [(s.name, s.state) for s in board.rows] == [(n, FINISHED) for n in ("A", "trial-000", "trial-001")]
    assert set(board["trial-001"].row.changes) == set(search)
    values["sweep"]["trials"] = 3
    again = run_sweep(parse_recipe(values))
    assert [s.name for s in again.rows] == ["A", "trial-000", "trial-001", "trial-002"]
    assert [s.row.changes for s in again.rows][:3] == [s.row.changes for s in board.rows]
    study = Search(parse_recipe(values), Path(values["output"]))._study
    assert [t.value for t in study.trials] == [s.scores["student after"]["loss"] for s in again.rows[1:]]
    assert not list(Path(values["output"]).glob("errors.log"))


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


def test_the_command_makes_what_is_missing_and_starts_over_when_told(sweep, command, in_threads, tmp_path):
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
    values["sweep"] = {"rows": {"A": {"student.lora.targets": ["nothing"]}, "B": {}}}
    code, out, err = command(values, "--overwrite")
    # A row fails, and of the old ones nothing is left: they were forgotten together.
    assert code == 1
    assert "A failed: student.lora does not fit the model" in out
    assert states(values) == {"A": "failed", "B": "finished"}
    assert not (folder / "temperature=1").exists()


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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not the record of a sweep"),
        ('{"format": "other"}', "its format is 'other'"),
        ('{"format": "kdcache-sweep", "rows": [{}]}', "is not the record of a sweep"),
        ('{"format": "kdcache-sweep", "seconds": 1, "rows": [{"name": "A", "changes": {}, "directory": "../A", "state": "finished",'
         ' "error": null, "seconds": 1}]}', "lies outside"),
    ],
)  # fmt: skip
def test_a_damaged_record_is_refused(tmp_path, text, message):
    (tmp_path / "sweep.json").write_text(text)
    with SweepDirectory(tmp_path) as directory, pytest.raises(TrainingError, match=message):
        directory.earlier()


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
