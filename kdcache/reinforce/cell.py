"""What runs inside the sandbox: a script for an interpreter of its own, standard library alone, started by `sandbox.run_tests`.

It becomes two processes that share nothing but two pipes. The *worker* runs the generated code and answers calls of its
functions; the *tester* runs the unit tests, in which the generated functions are stand-ins that ask the worker. Arguments and
results cross as plain data (numbers, text, lists, tuples, sets, mappings, None), rebuilt on the other side: an object that
claims to equal everything, a changed builtin, an early exit, a patched ``assert`` stay on the worker's side, and the
worker has never held the tests. The verdict is the tester's, over a pipe that the worker does not have.
"""

from __future__ import annotations

import builtins
import ctypes
import json
import os
import resource
import signal
import struct
import sys
from collections.abc import Callable, Iterator
from typing import Any

FRAME_LIMIT = 1 << 20
_DEPTH = 64
_MOST_ITEMS = 200_000
_NOBODY = 65534
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE = 1, 4
_PLAIN = (bool, int, float, str, type(None))


def main() -> None:
    """Read the job from standard input, judge it, write the verdict as JSON to standard output."""
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # noqa: PTH100, PTH120 (pathlib is slow to import)
    from cell_filter import confine  # type: ignore[import-not-found]

    # Nothing of kdcache is to be had for the generated code.
    del sys.path[0]

    job = json.loads(_read_frame(0))
    for kind, value in (
        (resource.RLIMIT_CPU, job["cpu_seconds"]),
        (resource.RLIMIT_AS, job["memory_bytes"]),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 32),
    ):
        resource.setrlimit(kind, (value, value))
    if os.getuid() == 0:
        leave_root()
    libc = ctypes.CDLL(None)
    # Neither process may look into the other, or be looked into by others of its user.
    libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    (asked, asks), (answered, answers) = os.pipe(), os.pipe()
    verdict, nothing, tester = os.dup(1), os.open(os.devnull, os.O_RDWR), os.getpid()
    worker = os.fork()
    for own in (1, 2) if worker else (0, 1, 2):
        os.dup2(nothing, own)
    if worker == 0:
        # The worker does not outlive the tester.
        libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
        for descriptor in (verdict, nothing, asks, answered):
            os.close(descriptor)
        if os.getppid() == tester:
            resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
            confine()
            work(job["code"], asked, answers)
        os._exit(0)
    for descriptor in (nothing, asked, answers):
        os.close(descriptor)
    tests = _read_frame(0).decode()
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    confine()
    passed, reason = judge(tests, asks, answered)
    os.write(verdict, json.dumps({"passed": passed, "reason": reason[:500]}).encode())
    os._exit(0)


def leave_root() -> None:
    """Become the user nobody, where nobody may read Python's own library: without it honest code could import nothing."""
    library = os.path.dirname(os.__file__)  # noqa: PTH120
    os.setgroups([])
    os.setegid(_NOBODY)
    os.seteuid(_NOBODY)
    readable = os.access(library, os.R_OK | os.X_OK, effective_ids=True)
    os.seteuid(0)
    os.setegid(0)
    if readable:
        os.setgid(_NOBODY)
        os.setuid(_NOBODY)


def work(code: str, asked: int, answers: int) -> None:
    """The worker: run the code, say what it defines, answer calls until nobody asks any more."""
    namespace: dict[str, Any] = {"__name__": "answer"}
    try:
        exec(compile(code, "<answer>", "exec"), namespace)  # noqa: S102 (what the sandbox is for)
    except BaseException as exc:
        _write_frame(answers, {"error": _told(exc)})
        return
    public = {name: value for name, value in list(namespace.items()) if not name.startswith("__")}
    values = {name: value for name, value in public.items() if isinstance(value, _PLAIN)}
    functions = [name for name, value in public.items() if callable(value)]
    _write_frame(answers, {"functions": functions, "values": {name: pack(value) for name, value in values.items()}})
    while True:
        question = json.loads(_read_frame(asked))
        try:
            value = namespace[question["name"]](*unpack(question["positional"]), **unpack(question["named"]))
            reply: dict[str, Any] = {"value": pack(value)}
        except BaseException as exc:
            reply = {"raised": type(exc).__name__, "text": _told(exc)}
        _write_frame(answers, reply)


def judge(tests: str, asks: int, answered: int) -> tuple[bool, str]:
    """The tester: whether every test passes and asked the generated code at least once; and in words why not."""
    calls = 0

    def stand_in(name: str) -> Callable[..., Any]:
        def ask(*positional: Any, **named: Any) -> Any:
            nonlocal calls
            calls += 1
            question = {"name": name, "positional": pack(positional), "named": pack(named)}
            _write_frame(asks, question)
            reply = json.loads(_read_frame(answered))
            if "value" in reply:
                return unpack(reply["value"])
            known = getattr(builtins, str(reply.get("raised")), None)
            ordinary = isinstance(known, type) and issubclass(known, Exception)
            raise (known if ordinary else RuntimeError)(str(reply.get("text")))  # type: ignore[misc]

        return ask

    try:
        opening = json.loads(_read_frame(answered))
        if "error" in opening:
            return False, f"the code fails before any test: {opening['error']}"
        namespace = {"__name__": "tests", **{name: unpack(value) for name, value in opening["values"].items()}}
        namespace |= {name: stand_in(name) for name in opening["functions"]}
        exec(compile(tests, "<tests>", "exec"), namespace)  # noqa: S102
    except EOFError:
        return False, "the code ended its process, or was stopped at its limit of CPU time or memory"
    except BaseException as exc:
        return False, f"a test fails: {_told(exc)}"
    return (True, "") if calls else (False, "the tests never call the code")


def pack(value: Any, depth: int = 0) -> Any:
    """Plain data in terms of JSON; containers name their kind. A subclass goes as what it is a subclass of.

    Raises:
        TypeError: something that is no plain data.
        ValueError: nested too deeply, or too large.
    """
    if depth > _DEPTH:
        raise ValueError("plain data is nested too deeply")
    if value is None or type(value) in _PLAIN:
        return value
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, bytes | bytearray):
        return {"bytes": bytes(value).hex()}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, dict):
        return {"dict": [[pack(k, depth + 1), pack(v, depth + 1)] for k, v in dict.items(value)]}
    for name, container in _CONTAINERS.items():
        if isinstance(value, container):
            return {name: [pack(v, depth + 1) for v in container.__iter__(value)]}
    if isinstance(value, Iterator | range):
        return {"iterator": [pack(v, depth + 1) for v, _ in zip(value, range(_MOST_ITEMS), strict=False)]}
    raise TypeError(f"{type(value).__name__} is no plain data")


def unpack(value: Any) -> Any:
    """What `pack` made, as fresh objects of the builtin types alone."""
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "bytes":
        return bytes.fromhex(content)
    if kind == "complex":
        return complex(*content)
    if kind == "dict":
        return {unpack(k): unpack(v) for k, v in content}
    items = [unpack(v) for v in content]
    return iter(items) if kind == "iterator" else _CONTAINERS[kind](items)


_CONTAINERS: dict[str, Any] = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}


def _told(exc: BaseException) -> str:
    return f"{type(exc).__name__}: {str(exc)[:300]}"


def _read_frame(descriptor: int) -> bytes:
    """One frame: four bytes of length, and as many bytes.

    Raises:
        EOFError: the other side is gone.
        ValueError: longer than a frame may be.
    """
    (length,) = struct.unpack("<I", _read(descriptor, 4))
    if length > FRAME_LIMIT:
        raise ValueError(f"an answer of {length} bytes is too long")
    return _read(descriptor, length)


def _read(descriptor: int, length: int) -> bytes:
    parts = bytearray()
    while len(parts) < length:
        part = os.read(descriptor, length - len(parts))
        if not part:
            raise EOFError
        parts += part
    return bytes(parts)


def _write_frame(descriptor: int, value: Any) -> None:
    content = json.dumps(value).encode()
    content = struct.pack("<I", len(content)) + content
    try:
        while content:
            content = content[os.write(descriptor, content) :]
    except BrokenPipeError as exc:
        raise EOFError from exc


if __name__ == "__main__":
    main()
