"""The entry point: runs a command and turns errors of ours into one line and an exit code."""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import signal
import sys
import warnings

import typer

# Imported for the commands they register, in the order in which --help lists them.
import kdcache.commands.recipes

import kdcache.commands.students  # isort: skip
import kdcache.commands.sweeps  # isort: skip
import kdcache.commands.chains  # isort: skip
import kdcache.commands.reinforcement  # isort: skip
import kdcache.commands.evaluation  # isort: skip
import kdcache.commands.inference  # isort: skip
import kdcache.commands.reports  # isort: skip
import kdcache.commands.exports  # isort: skip
import kdcache.commands.caches  # isort: skip
import kdcache.commands.derive  # isort: skip
import kdcache.commands.exchange  # isort: skip
import kdcache.commands.sharing  # noqa: F401 # isort: skip
from kdcache.commands.app import app, say
from kdcache.console import printable
from kdcache.errors import KdcacheError

_INTERRUPTED = 130


def main() -> None:
    """Run a command: errors of ours become one line and exit code 2, Ctrl-C one line and 130."""
    # Deprecations and advice of the libraries are for us, not for who runs the command.
    warnings.simplefilter("ignore")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # Threads that spin while they wait halve the speed of a machine that does anything else.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for stream in (sys.stdout, sys.stderr):
        # A terminal that knows fewer letters shows question marks for the others.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    # A cluster that takes the machine back says so with SIGTERM: as good a reason to end cleanly as Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        code = app(standalone_mode=False)
        # typer turns Ctrl-C inside a command into this exit code, without a word.
        if code == _INTERRUPTED:
            raise KeyboardInterrupt
    except KdcacheError as exc:
        rank = os.environ.get("RANK", "0")
        _fail(f"error: {exc}" if rank == "0" else f"error in process {rank}: {exc}", 2)
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") != "0":  # the first process speaks for all
            sys.exit(_INTERRUPTED)
        _fail(
            "stopped; what is committed stays, run the same command again (train-student and reinforce with --resume) to go on",
            _INTERRUPTED,
        )
    except typer.Abort:
        _fail("stopped", _INTERRUPTED)
    except OSError as exc:
        # Ours are translated where they arise; what is left is an output that cannot be written.
        if exc.errno not in (errno.ENOSPC, errno.EPIPE, errno.EIO):
            raise
        with contextlib.suppress(OSError):
            sys.stdout.close()
        if exc.errno == errno.EPIPE:  # who read it has read enough
            sys.exit(0)
        _fail(f"error: cannot write the output: {exc.strerror}", 2)
    except Exception as exc:
        if type(exc).__name__ == "NoArgsIsHelpError":
            say(str(exc))
            sys.exit(2)
        # click's own usage errors know how to show themselves; anything else is a bug and keeps its traceback.
        show = getattr(exc, "format_message", None)
        if show is None:
            raise
        _fail(f"error: {show()} (see kdcache --help)", 2)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(line: str, code: int) -> None:
    if not sys.stdout.closed:
        sys.stdout.flush()
    print(printable(" ".join(line.split())), file=sys.stderr, flush=True)
    sys.exit(code)
