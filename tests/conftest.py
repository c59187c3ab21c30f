"""Tiny models, data and a cache made once per session; nothing is read from outside the repository."""

import copy
import logging
import os
import signal

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

import pytest  # noqa: E402
import torch  # noqa: E402

from kdcache.embedded.make import make_embedded  # noqa: E402
from kdcache.recipe import EmbeddedSection, parse_recipe  # noqa: E402
from kdcache.teacher.capture import capture  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Folder with train.jsonl, validation.jsonl, teacher/ and student/, barely trained."""
    section = EmbeddedSection(
        directory=str(tmp_path_factory.mktemp("models")),
        train_examples=48,
        validation_examples=12,
        pretrain_examples=64,
        teacher_steps=3,
        student_steps=2,
    )
    return make_embedded(section)


@pytest.fixture(scope="session")
def base_values(models, tmp_path_factory):
    """Recipe values over the tiny models; tests change copies."""
    return {
        "output": str(tmp_path_factory.mktemp("run") / "student"),
        "cache": {"directory": str(tmp_path_factory.mktemp("cache") / "cache"), "positions_per_shard": 100},
        "data": {
            "train": {"path": str(models / "train.jsonl")},
            "validation": {"path": str(models / "validation.jsonl")},
            "max_length": 96,
        },
        "teacher": {
            "model": str(models / "teacher"),
            "quantization": "none",
            "dtype": "float32",
            "device": "cpu",
            "batch_tokens": 512,
        },
        "selection": {"bytes_per_position": 48},
        "student": {"model": str(models / "student"), "quantization": "none", "dtype": "float32", "device": "cpu"},
        "training": {
            "epochs": 1,
            "batch_size": 4,
            "optimizer": "adamw_torch",
            "precision": "fp32",
            "gradient_checkpointing": False,
            "logging_steps": 2,
            "save_steps": 4,
            "workers": 0,
        },
    }


@pytest.fixture
def values(base_values, tmp_path):
    """A copy of the recipe values that writes into this test's own directory."""
    own = copy.deepcopy(base_values)
    own["output"] = str(tmp_path / "student")
    own["cache"]["directory"] = str(tmp_path / "cache")
    return own


@pytest.fixture(scope="session")
def shared_cache(base_values):
    """A complete cache that tests read and never change."""
    return capture(parse_recipe(base_values)).directory


@pytest.fixture
def interruptible():
    """Ctrl-C interrupts, although a test run in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
