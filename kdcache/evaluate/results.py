"""evaluation.json: what earlier evaluations of a run found, and how a new one is laid over it.

Several evaluations of one run may be at work at the same time, for hours: what another has written since is read again
when this one writes, while the run's evaluations are locked.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kdcache import __version__
from kdcache.cache.files import write_file
from kdcache.errors import StorageError, TrainingError
from kdcache.progress import Progress, Silent
from kdcache.run_record import EVALUATION_FILE, read_json, record_digest

FORMAT = "kdcache-evaluation"
_LOCK = ".evaluation.lock"
_KEPT = ("generation", "samples")


def earlier_results(run: Path, digest: str, progress: Progress) -> dict[str, Any]:
    """What was measured of this training before; nothing where there is no evaluation, or one of an earlier training.

    Args:
        run: the run directory.
        digest: of the training, as `record_digest` has it.
        progress: told of an evaluation that will be replaced.

    Raises:
        TrainingError: there is an evaluation.json that is none, or cannot be read.
    """
    file = run / EVALUATION_FILE
    try:
        values = read_json(file)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as exc:
        raise TrainingError(f"{file} is not readable ({exc}); move it away, or delete it") from exc
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise TrainingError(f"{file} is not an evaluation by kdcache; move it away, or delete it")
    if values.get("run_sha256") != digest:
        progress.warning(f"{file} is of an earlier training in this directory and is replaced")
        return {}
    return values


def write_results(run: Path, digest: str, cache_id: str, parts: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Lay newly measured parts over evaluation.json as it is by now; returns what it holds then.

    Args:
        run: the run directory.
        digest: of the training that was measured.
        cache_id: of the run's cache.
        parts: ``scores``, and what else was measured. Tasks are laid over tasks, everything else replaces what was there.
        progress: told of what could not be kept.

    Raises:
        TrainingError: the run was trained again meanwhile.
        StorageError: it cannot be written.
    """
    with _locked(run):
        if record_digest(run) != digest:
            raise TrainingError(f"{run} was trained again while it was evaluated; evaluate it again")
        try:
            # What is replaced was told when the work began.
            before = earlier_results(run, digest, Silent())
        except TrainingError as exc:
            # It was readable when the work began. Hours of work are not thrown away for it, nor is what it holds now.
            aside = run / f"{EVALUATION_FILE}.unreadable"
            (run / EVALUATION_FILE).replace(aside)
            progress.warning(f"{exc}: moved to {aside.name}")
            before = {}
        kept = {key: before[key] for key in _KEPT if key in before}
        tasks = {**before.get("tasks", {}), **parts.get("tasks", {})}
        values = {
            "format": FORMAT,
            "kdcache": __version__,
            "cache_id": cache_id,
            "run_sha256": digest,
            **kept,
            **parts,
            **({"tasks": tasks} if tasks else {}),
        }
        write_file(run / EVALUATION_FILE, json.dumps(values, indent=1, ensure_ascii=False).encode() + b"\n")
    return values


@contextmanager
def _locked(run: Path) -> Iterator[None]:
    """Alone with the evaluations of a run; not the lock of its training, which is held for hours."""
    try:
        lock = (run / _LOCK).open("a")
    except OSError as exc:
        raise StorageError(f"cannot write the evaluation of {run}: {exc.strerror}") from exc
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
