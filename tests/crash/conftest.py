"""Where runs that are killed or fail write to."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest

from tests.crash.reference import make_reference
from tests.crash.small_run import Source


@pytest.fixture(scope="session")
def reference(tmp_path_factory):
    """A cache that one undisturbed process made."""
    return make_reference(tmp_path_factory.mktemp("reference") / "cache")


@pytest.fixture(scope="session")
def source(reference):
    """What it was made from, and its files."""
    return Source.of(reference)


@pytest.fixture
def place():
    """A directory in memory where there is such a thing: no kill of a process loses what the kernel has."""
    memory = Path("/dev/shm")
    place = Path(tempfile.mkdtemp(dir=memory if os.access(memory, os.W_OK) else None))
    yield place
    shutil.rmtree(place)
