"""Generated code that is wrong, hostile or clever: what the sandbox makes of it. Each attack ends within seconds and fails."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from kdcache.errors import TrainingError
from kdcache.reinforce import sandbox
from kdcache.reinforce.cell import pack, unpack
from kdcache.reinforce.sandbox import Limits, judge_all, refuse_without_walls, run_tests

SHORT = Limits(seconds=4.0, memory_bytes=128 << 20)
TESTS = "assert f(1) == 2\nassert f(5) == 6"


def judged(code, tests=TESTS, limits=SHORT):
    """The verdict, which must come soon whatever the code does."""
    started = time.monotonic()
    verdict = run_tests(code, tests, limits)
    assert time.monotonic() - started < limits.seconds + 8
    return verdict


@pytest.mark.parametrize(
    ("code", "tests"),
    [
        ("def f(x):\n    return x + 1", TESTS),
        ("import math, re, collections, functools, itertools, heapq, statistics\ndef f(x): return math.floor(x) + 1", TESTS),
        ("f = lambda x: x + 1\nLIMIT = 3", TESTS + "\nassert LIMIT == 3"),
        ("def f(x):\n    return sorted(set(x)), {1: (2, 3)}, None, b'a', 1j, {4}", "assert f([2, 1]) == ([1, 2], {1: (2, 3)}, None, b'a', 1j, {4})"),
        ("from collections import Counter\ndef f(s):\n    return Counter(s)", "assert f('aab') == {'a': 2, 'b': 1}"),
        ("def f(n):\n    yield from range(n)", "assert list(f(3)) == [0, 1, 2]"),
        ("def f(x):\n    raise ValueError('no')", "try:\n    f(1)\nexcept ValueError as e:\n    assert 'no' in str(e)\nelse:\n    assert False"),
        ("def f(x):\n    return x + 1", "def check(candidate):\n    assert candidate(1) == 2\ncheck(f)"),
        ("def f(x):\n    return x + 1\nif __name__ == '__main__':\n    raise SystemExit(1)", TESTS),
    ],
)  # fmt: skip
def test_right_code_passes(code, tests):
    verdict = judged(code, tests)
    assert verdict.passed, verdict.reason


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("def f(x):\n    return x + 2", "AssertionError"),
        ("def f(x", "SyntaxError"),
        ("def g(x):\n    return x + 1", "NameError"),
        ("", "NameError"),
        ("1/0", "ZeroDivisionError"),
        ("def f(x):\n    return f(x)", "RecursionError"),
    ],
)
def test_wrong_code_fails_and_says_why(code, reason):
    verdict = judged(code)
    assert not verdict.passed
    assert reason in verdict.reason


@pytest.mark.parametrize(
    "code",
    [
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "def f(x):\n    import sys; sys.exit(0)",
        "def f(x):\n    import os; os._exit(0)",
        "raise KeyboardInterrupt",
        "quit = exit = None\nraise SystemExit",
        # Objects that equal everything, as themselves and in the coat of a number.
        "class E:\n    def __eq__(self, other): return True\n    __hash__ = None\ndef f(x): return E()",
        "class E(int):\n    def __eq__(self, other): return True\n    __hash__ = int.__hash__\ndef f(x): return E()",
        "class E(list):\n    def __eq__(self, other): return True\n    __hash__ = None\ndef f(x): return E()",
        "class E(type):\n    def __eq__(self, other): return True\nclass F(metaclass=E): pass\ndef f(x): return F",
        # What asserts, compares or catches, taken apart on the code's own side.
        "import builtins\nbuiltins.AssertionError = type('A', (Exception,), {})\ndef f(x): return 0",
        "import builtins\nbuiltins.compile = builtins.exec = lambda *a, **k: None\ndef f(x): return 0",
        "import json\njson.dumps = lambda *a, **k: '{\"passed\": true, \"reason\": \"\"}'\ndef f(x): return 0",
        "import sys\nsys.excepthook = lambda *a: None\nsys.modules['__main__'].judge = lambda *a: (True, '')\ndef f(x): return 0",
        # The tests are nowhere in the worker's memory to be found and answered.
        "import gc, sys\ndef f(x):\n    texts = [o for o in gc.get_objects() if isinstance(o, (str, bytes))]\n"
        "    frame = sys._getframe()\n    found = []\n    while frame:\n        found += [str(v) for v in frame.f_locals.values()]\n"
        "        frame = frame.f_back\n    return x + 1 if any('f(1) == ' + '2' in t for t in found) else 0",
        # A verdict of one's own, on every descriptor that is open.
        "import os\nfor d in range(32):\n    try:\n        os.write(d, b'{\"passed\": true, \"reason\": \"\"}')\n    except OSError:\n        pass\n"
        "def f(x): return 0",
    ],
)  # fmt: skip
def test_cheating_does_not_pass(code):
    assert not judged(code).passed


def test_tests_that_never_call_the_code_prove_nothing():
    assert "never call" in judged("def f(x): return 0", "assert True").reason
    assert not judged("def f(x): return 0", "assert f(1) == 0\nraise SystemExit(0)").passed


def test_endless_loops_end():
    for code in ("while True: pass", "def f(x):\n    while True: pass", "import time\ndef f(x): time.sleep(60)"):
        verdict = judged(code, limits=Limits(seconds=1.5))
        assert not verdict.passed
        assert "1.5 s" in verdict.reason or "CPU" in verdict.reason


def test_signals_of_limits_can_not_be_ignored():
    code = "import signal\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n    except (OSError, ValueError): pass\nwhile True: pass"
    assert not judged(code, limits=Limits(seconds=2.0)).passed


def processes_of(marker):
    """Command lines of running processes that hold a text."""
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=False).stdout
    return [line for line in listed.splitlines() if marker in line and "ps -eo" not in line]


@pytest.mark.parametrize(
    "attack",
    [
        "import os\nwhile True: os.fork()",
        "import os\nif os.fork() == 0:\n    os.setsid()\n    while True: pass",
        "import os\nos.posix_spawn('/bin/sleep', ['sleep', '987'], {})",
        "import subprocess\nsubprocess.Popen(['sleep', '987'])",
        "import multiprocessing\nmultiprocessing.Process(target=print).start()",
        "import threading\nwhile True: threading.Thread(target=lambda: 0).start()",
        "import os\nos.execv('/bin/sleep', ['sleep', '987'])",
        "import os\nos.setsid()",
        "import ctypes\nwhile True:\n    if ctypes.CDLL(None).fork() < 0: raise OSError('no')",
    ],
)
def test_no_processes_are_started(attack):
    verdict = judged(f"{attack}\ndef f(x): return x + 1")
    assert not verdict.passed
    assert "not done" not in verdict.reason
    assert processes_of("sleep 987") == []


def test_nothing_outlives_its_judgement():
    judged("def f(x):\n    while True: pass", limits=Limits(seconds=1.0))
    deadline = time.monotonic() + 5
    while (left := processes_of(str(sandbox._CELL))) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left == []


@pytest.mark.parametrize(
    "attack",
    [
        "a = []\n    while True: a.append(' ' * 10**7)",
        "return bytearray(1 << 34)",
        "return [0] * 10**10",
        "return 'x' * 10**8",
    ],
)
def test_memory_is_limited(attack):
    assert not judged(f"def f(x):\n    {attack}").passed


@pytest.mark.parametrize(
    "attack",
    [
        "open('huge', 'wb').write(b'x' * 10**9)",
        "open('/tmp/kdcache-escaped', 'w')",
        "__import__('os').open('/tmp/kdcache-escaped', __import__('os').O_CREAT | __import__('os').O_RDWR)",
        "__import__('tempfile').TemporaryFile()",
        "__import__('os').mkdir('here')",
        "__import__('os').unlink(VICTIM)",
        "__import__('os').rename(VICTIM, '/tmp/kdcache-escaped')",
        "__import__('os').chmod(VICTIM, 0)",
        "__import__('os').truncate(VICTIM, 0)",
        "__import__('os').symlink(VICTIM, 'link')",
        "__import__('shutil').rmtree(__import__('os').path.dirname(VICTIM))",
        "__import__('os').memfd_create('x')",
    ],
)
def test_nothing_is_written(attack, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    tmp_path.chmod(0o777)
    victim.chmod(0o666)
    verdict = judged(f"VICTIM = {str(victim)!r}\ndef f(x):\n    {attack}\n    return x + 1")
    assert not verdict.passed
    assert victim.read_text() == "precious"
    assert not Path("/tmp/kdcache-escaped").exists()


def test_output_without_end_goes_nowhere():
    started = time.monotonic()
    verdict = run_tests(
        "import sys\ndef f(x):\n    while True: print('x' * 10**6); sys.stderr.write('y' * 10**6)", TESTS, Limits(1.5)
    )
    assert not verdict.passed
    assert time.monotonic() - started < 10
    assert judged("def f(x):\n    print('thinking')\n    return x + 1").passed


@pytest.mark.parametrize(
    "attack",
    [
        "import os; os.kill(os.getppid(), 9)",
        "import os; os.kill(PARENT, 9)",
        "import os; os.killpg(0, 9)",
        "import os; os.kill(-1, 9)",
        "import signal, os; signal.pthread_kill(__import__('threading').main_thread().ident, 9)",
        # The owner of a descriptor is signalled about it: the parent, with a signal of choice.
        "import fcntl, os\n    r, w = os.pipe(); fcntl.fcntl(r, 8, PARENT); fcntl.fcntl(r, 10, 9)",
        "import resource; resource.prlimit(PARENT, resource.RLIMIT_CPU, (0, 0))",
        "import os; os.sched_setaffinity(PARENT, {0}); os.setpriority(0, PARENT, 19)",
        "open(f'/proc/{PARENT}/mem', 'r+b')",
    ],
)
def test_others_are_left_alone(attack):
    verdict = judged(f"PARENT = {os.getpid()}\ndef f(x):\n    {attack}\n    return x + 1")
    assert not verdict.passed


def test_there_is_no_network():
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        port = server.getsockname()[1]
        for attack in (
            f"import socket; socket.create_connection(('127.0.0.1', {port}))",
            "import socket; socket.socket(socket.AF_UNIX)",
            "import socket; socket.socketpair()",
            f"import ctypes\n    if ctypes.CDLL(None).socket(2, 1, 0) < 0: raise OSError('{port}')",
            "import ctypes\n    if ctypes.CDLL(None).syscall(425, 8, ctypes.create_string_buffer(256)) < 0: raise OSError('io_uring')",
        ):
            assert not judged(f"def f(x):\n    {attack}\n    return x + 1").passed
        with pytest.raises(TimeoutError):
            server.accept()


def test_the_environment_and_the_standard_input_are_its_own(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    code = "import os, sys\ndef f(x):\n    return [v for v in os.environ.values() if 'hunter' in v] + [sys.stdin.read()] + os.listdir('.')"
    assert judged(code, "assert f(1) == ['']").passed


def test_its_limits_can_not_be_raised():
    code = "import resource\ndef f(x):\n    resource.setrlimit(resource.RLIMIT_AS, (-1, -1))\n    return x + 1"
    assert not judged(code).passed


def test_huge_or_deep_answers_do_no_harm():
    assert not judged("def f(x):\n    a = []\n    for _ in range(10**5): a = [a]\n    return a").passed
    assert not judged("def f(x):\n    return list(range(10**6))", "assert len(f(1)) == 10**6").passed
    assert not judged("def f(x):\n    return 10**10000").passed
    assert "longer than" in run_tests("x" * (2 << 20), TESTS).reason


@pytest.mark.parametrize(
    "value",
    [None, True, 3, 2.5, float("inf"), "ü\n", [1, [2]], (1,), {1, 2}, frozenset({3}), {1: {(2, 3): "x"}}, b"\0", 2j],
)
def test_plain_data_crosses_as_it_is(value):
    back = unpack(pack(value))
    assert back == value
    assert type(back) is type(value)


def test_verdicts_come_in_the_order_of_the_jobs_and_from_threads():
    jobs = [(f"def f(x): return x + {i % 2 + 1}", TESTS) for i in range(6)]
    found = []
    thread = threading.Thread(target=lambda: found.extend(v.passed for v in judge_all(jobs, SHORT)))
    thread.start()
    thread.join()
    assert found == [True, False] * 3


def test_without_walls_no_code_is_run(tmp_path, monkeypatch):
    broken = tmp_path / "cell.py"
    broken.write_text("# cell_filter\nraise OSError('cell_filter: the kernel refuses')\n")
    monkeypatch.setattr(sandbox, "_CELL", broken)
    refuse_without_walls.cache_clear()
    with pytest.raises(TrainingError, match=r"none is run: OSError: .*the kernel refuses"):
        run_tests("def f(x): return 1", TESTS)
    with pytest.raises(TrainingError):
        refuse_without_walls()
    monkeypatch.undo()
    refuse_without_walls.cache_clear()
    refuse_without_walls()


@pytest.mark.usefixtures("interruptible")
def test_a_ctrl_c_stops_the_cell_too():
    script = (
        "from kdcache.reinforce.sandbox import run_tests, Limits\n"
        "run_tests('def f(x):\\n    while True: pass', 'f(1)', Limits(seconds=60.0))\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 30
        while not processes_of(str(sandbox._CELL)) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        try:
            process.communicate(timeout=20)
        finally:
            process.kill()
    deadline = time.monotonic() + 5
    while (left := processes_of(str(sandbox._CELL))) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left == []
