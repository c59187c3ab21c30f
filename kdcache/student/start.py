"""The made student of a run directory: ``RUN/base``, an ordinary model folder that the adapter beside it belongs to.

It is made in ``RUN/base.new`` and takes its place when the training begins, which is when an earlier run is forgotten. A file
in it says what it was made from, and what came out; started.json says the same. A run that is gone on with takes the folder
as it is, whatever has become of the model it was made from, and makes one that is lost again only as it was; any other run
makes it again unless it is the very same. Runs of one process that start from the same student share its bytes by hard links
where the file system has them: nothing ever writes into such a folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdcache.cache.files import flush, sync_directory, write_file
from kdcache.cache.strict_json import canonical_sha256
from kdcache.errors import ModelError, StorageError
from kdcache.model_identity import identify
from kdcache.recipe_student import StudentSection
from kdcache.student.initial import describe_init, is_made, made_config, make_student, read_source

BASE = "base"
# Of a training that has not begun: its folder, and what `save_whole` makes that of.
UNBEGUN = ("base.new", "base.new.partial")
_FACTS = "kdcache_init.json"


@dataclass(frozen=True)
class MadeBase:
    """A made student on disk: its folder until the training begins, and a digest of what it is, for as long as it is used."""

    folder: Path
    identity: str


def as_started(student: StudentSection, run: Path) -> StudentSection:
    """The section under which others load the student that a run started from: for a made one an ordinary model folder."""
    if not is_made(student):
        return student
    return student.model_copy(update={"model": str(run / BASE), "revision": None, "init": None})


def refuse_missing_base(student: StudentSection, run: Path) -> None:
    """The student that a run made to start from should still be there.

    Raises:
        ModelError: it is not.
    """
    if is_made(student) and _facts_in(run / BASE) is None:
        raise ModelError(
            f"{run} has lost the student that it made to start from (expected the folder {run / BASE}); bring it back, or train it "
            "again"
        )


def made_base(student: StudentSection, run: Path, *, going_on: bool, like: Path | None = None) -> MadeBase:
    """The folder of the made student for a training in ``run``: the one that is there, if it is the right one, or a new one.

    Args:
        student: with a section ``init`` that makes something.
        run: the run directory, which is held by this process.
        going_on: there are checkpoints of this student. Take ``RUN/base`` without a look at the model that it was made from.
        like: a folder of the same student in another run, to share the bytes of.

    Raises:
        ModelError, TokenizerError: it cannot be made, or one that is lost not as it was.
        StorageError: it cannot be written.
    """
    standing, new = run / BASE, run / UNBEGUN[0]
    init = None if student.init is None else student.init.model_dump(mode="json")
    found, begun = _facts_in(standing), _facts_at_start(run) if going_on else None
    if going_on and found is not None and (found == begun or (begun is None and found.get("init") == init)):
        # Made for another training, which never began.
        _remove_unbegun(run)
        return MadeBase(standing, canonical_sha256(found))
    wanted = {"init": init, "source": _source_of(student), "made": describe_init(student)}
    if going_on and (begun is None or begun.get("source") != wanted["source"]):
        raise _lost(student, run)
    try:
        if found is not None and found == {**wanted, "weights": found.get("weights")}:
            _remove_unbegun(run)
            return MadeBase(standing, canonical_sha256(found))
        made = _facts_in(new)
        if made is None or made != {**wanted, "weights": made.get("weights")}:
            made = _make(student, run, wanted, like)
    except OSError as exc:
        raise StorageError(f"cannot write the student that {run} starts from: {exc.strerror or exc}") from exc
    if begun is not None and made["weights"] != begun.get("weights"):
        _remove_unbegun(run)
        raise _lost(student, run)
    return MadeBase(new, canonical_sha256(made))


def put_in_place(student: StudentSection | None, run: Path, made: MadeBase | None) -> None:
    """The training begins: what was made for it takes its place, and what an earlier one started from goes.

    Args:
        student: of the training.
        run: its directory.
        made: what `made_base` has returned for it; None for a student that is not made.
    """
    standing, new = run / BASE, run / UNBEGUN[0]
    mine = made is not None and made.folder == new
    if mine or student is None or not is_made(student):
        shutil.rmtree(standing, ignore_errors=True)
    if mine:
        new.rename(standing)
    _remove_unbegun(run)


def base_facts(run: Path) -> dict[str, Any]:
    """What started.json says of the made student of a run, beside what the run is compared by; empty without one."""
    found = _facts_in(run / BASE)
    return {} if found is None else {BASE: found}


def base_identity(run: Path) -> str | None:
    """Digest of the made student of a run, as `MadeBase` has it; None where it is not there."""
    found = _facts_in(run / BASE)
    return None if found is None else canonical_sha256(found)


def described_base(run: Path) -> str | None:
    """What the student of a run started from, in half a sentence; None where that was a model as it is."""
    found = _facts_in(run / BASE)
    return None if found is None else str(found.get("made"))


def _source_of(student: StudentSection) -> str:
    """Hash of what the student is made from: weights, or for random ones the configuration they are made by."""
    assert student.init is not None
    if student.init.method == "drop_layers":
        return identify(student.model, student.revision).fingerprint
    values = made_config(read_source(student), student).to_dict()
    # Where it lies, and who wrote it, is no part of it.
    apart = ("_name_or_path", "_commit_hash", "transformers_version")
    return canonical_sha256({key: str(value) for key, value in values.items() if key not in apart})


def _make(student: StudentSection, run: Path, wanted: dict[str, Any], like: Path | None) -> dict[str, Any]:
    """Make ``RUN/base.new``, or share the bytes of ``like`` where these are the same student's; returns its facts."""
    new, shared = run / UNBEGUN[0], None if like is None else _facts_in(like)
    _remove_unbegun(run)
    if like is not None and shared is not None and shared == {**wanted, "weights": shared.get("weights")}:
        shutil.copytree(like, new, copy_function=_link, ignore=shutil.ignore_patterns(_FACTS))
        facts = shared
    else:
        make_student(student, new)
        mask = os.umask(0)
        os.umask(mask)
        for path in new.iterdir():
            path.chmod(0o666 & ~mask)
            flush(path)
        facts = {**wanted, "weights": _weights_in(new)}
    # Last: a folder without it is not whole.
    write_file(new / _FACTS, json.dumps(facts, indent=1).encode() + b"\n")
    sync_directory(run)
    return facts


def _weights_in(folder: Path) -> str:
    """Hash of the weights; not of the configuration, which names the version of the library that wrote it."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _remove_unbegun(run: Path) -> None:
    for name in UNBEGUN:
        shutil.rmtree(run / name, ignore_errors=True)


def _facts_at_start(run: Path) -> dict[str, Any] | None:
    """What the made student was when the run began, by started.json."""
    try:
        found = json.loads((run / "started.json").read_text())[BASE]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, dict) else None


def _lost(student: StudentSection, run: Path) -> ModelError:
    return ModelError(
        f"{run} has lost the student that its checkpoints belong to (expected the folder {run / BASE}), and from {student.model} as "
        "it is now another one would be made; bring back that folder or that model, or start over by --overwrite"
    )


def _facts_in(folder: Path) -> dict[str, Any] | None:
    """What a folder says it was made from; None where it is not there or not whole."""
    try:
        found = json.loads((folder / _FACTS).read_text())
    except (OSError, ValueError):
        return None
    whole = (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))
    return found if whole and isinstance(found, dict) else None


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)
