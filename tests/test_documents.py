"""The documents against the code: README's commands run, cache_format.md's tables and constants hold."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import yaml

from kdcache.cache import layout
from kdcache.cache.manifest import (
    DataPlan,
    Derivation,
    Manifest,
    Plan,
    ShardEntry,
    ShardPlan,
    SplitPlan,
    SplitSummary,
    TeacherIdentity,
    TokenizerIdentity,
)
from kdcache.cache.selection import SelectionPlan

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
FORMAT = (ROOT / "cache_format.md").read_text()


def blocks(kind, text=README):
    return re.findall(rf"^```{kind}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def commands(kind):
    lines = [line.split("#")[0].strip() for block in blocks(kind) for line in block.splitlines()]
    return [line for line in lines if line]


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory):
    """A clone's files with the embedded recipe made small, so that README's commands take seconds."""
    folder = tmp_path_factory.mktemp("sandbox")
    for name in ("recipes", "Makefile", "pyproject.toml", "constraints.txt"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy2)(source, folder / name)
    path = folder / "recipes/embedded.yaml"
    recipe = yaml.safe_load(path.read_text())
    recipe["embedded"] |= {
        "train_examples": 48, "validation_examples": 12, "pretrain_examples": 64, "teacher_steps": 2, "student_steps": 2,
    }  # fmt: skip
    recipe["training"] |= {"epochs": 1, "learning_rate": 0.002}
    path.write_text(yaml.safe_dump(recipe))
    return folder


def shell(command, folder):
    bin_folder = Path(sys.executable).parent
    environment = {
        **os.environ, "PATH": f"{bin_folder}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        "VENV": str(bin_folder.parent),
    }  # fmt: skip
    return subprocess.run(
        ["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def test_every_command_of_the_readme_runs(sandbox):
    ready = Path(sys.executable).parent.parent / ".ready"
    if not ready.exists():
        pytest.skip("this environment was not made by make, so make would reinstall it")
    make = commands("bash make")
    assert make == ["make train-student", "make test"]
    ran = shell(make[0], sandbox)
    assert ran.returncode == 0, ran.stderr
    assert "student after" in ran.stdout
    planned = shell(f"{make[1]} --dry-run", ROOT)
    assert planned.returncode == 0
    assert "pytest" in planned.stdout
    for command in commands("bash"):
        ran = shell(command, sandbox)
        assert ran.returncode == 0, (command, ran.stdout, ran.stderr)
    snippets = blocks("python") + blocks("python", (ROOT / "docs/loss.md").read_text())
    assert len(snippets) == 3
    for snippet in snippets:
        if "import trl" in snippet and importlib.util.find_spec("trl") is None:
            warnings.warn("TRL is not installed; its snippet in docs/loss.md is not run", stacklevel=1)
            continue
        ran = subprocess.run([sys.executable, "-c", snippet], cwd=sandbox, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stderr
        assert ran.stdout.strip()


def test_the_gpu_commands_fail_clearly_where_there_is_no_hub(sandbox):
    import torch

    if torch.cuda.is_available():
        pytest.skip("a GPU is here; the reference experiment would really run")
    assert len(commands("bash gpu")) == 4
    for command in commands("bash gpu")[:1]:
        ran = shell(command, sandbox)
        assert ran.returncode == 2
        assert ran.stderr.startswith("error: ")
        assert "Traceback" not in ran.stderr


def test_every_command_and_make_target_is_in_the_readme_or_its_help():
    ran = shell("kdcache --help", ROOT)
    names = re.findall(r"^  ([a-z][a-z-]+) {2,}", ran.stdout, flags=re.MULTILINE)
    assert len(names) >= 6
    makefile = (ROOT / "Makefile").read_text()
    for name in names:
        assert re.search(rf"^{name}:", makefile, flags=re.MULTILINE), name


def test_ci_runs_the_readmes_test_command():
    assert (ROOT / ".ci/run").read_text().rstrip().endswith("exec make test")


def test_tensor_table():
    rows = re.findall(r"^\| `([a-z._]+)` \| `([^`]+)` \| `([A-Z0-9,]+)` \|", FORMAT, flags=re.MULTILINE)
    assert {name: (dtype.replace("\\|", "|"), shape) for name, dtype, shape in rows} == layout.TENSORS
    assert [name for name, _, _ in rows] == list(layout.TENSORS)


def test_constants_and_names():
    for number in (
        layout.HEADER_LIMIT, layout.SHARD_LIMIT, layout.JSON_LIMIT, layout.VOCAB_LIMIT, layout.ZSTD_WINDOW_LIMIT,
    ):  # fmt: skip
        assert f"{number:,}" in FORMAT
    for name in (
        layout.PLAN_FILE,
        layout.VOCABULARY_FILE,
        layout.MANIFEST_FILE,
        layout.CARD_FILE,
        layout.shard_name(0),
    ):
        assert name in FORMAT
    assert f"version {layout.VERSION}" in FORMAT
    assert layout.TEMPORARY_PREFIX in FORMAT


def test_fields_of_plan_and_manifest():
    models = (
        Plan, TeacherIdentity, TokenizerIdentity, DataPlan, SplitPlan, SelectionPlan, ShardPlan, Derivation, Manifest,
        SplitSummary, ShardEntry,
    )  # fmt: skip
    for model in models:
        for field in model.model_fields:
            assert f"`{field}`" in FORMAT or f"{field}[]`" in FORMAT, (model.__name__, field)


def test_every_invariant_has_a_number_in_the_document():
    source = "".join((ROOT / "kdcache/cache" / n).read_text() for n in ("invariants.py", "codec.py"))
    used = {int(n) for n in re.findall(r"invariant (\d+) ", source)} | {
        int(n) for n in re.findall(r"\b_refuse\((\d+)", source)
    }
    section = FORMAT.split("## 5. Invariants")[1].split("## 6.")[0]
    assert used == {int(n) for n in re.findall(r"^(\d+)\. ", section, flags=re.MULTILINE)}


def test_the_documented_arithmetic_reads_a_shard(shared_cache):
    """Section 6 by hand: raw safetensors and numpy only, against the library."""
    import numpy as np
    import safetensors.numpy
    import zstandard

    import kdcache

    cache = kdcache.open_cache(shared_cache)
    data = (shared_cache / "shards/00000.safetensors.zst").read_bytes()
    tensors = safetensors.numpy.load(zstandard.ZstdDecompressor().decompress(data))
    plan = json.loads((shared_cache / "plan.json").read_text())
    column = plan["selection"]["temperatures"].index(2.0)
    floors = plan["selection"]["floors"]

    def numbers(name):
        return sum(plane.astype(np.int64) << (8 * i) for i, plane in enumerate(tensors[name]))

    head, tail = int(numbers("row.head")[0]), int(numbers("row.tail")[0])
    rest = [
        (int(tensors["row.rest"][0, b, 0]) + 256 * int(tensors["row.rest"][1, b, 0]) - 32768) / 1024 for b in (0, 1)
    ]
    logits = -numbers("head.value")[:head] / 16
    z = [np.log(np.exp(logits / t).sum()) + np.log1p(np.exp(r)) for t, r in zip((1.0, 2.0), rest, strict=True)]
    log_p = logits / 2.0 - z[column]
    rows = cache.split("train")[0].rows
    assert np.exp(log_p).sum() == pytest.approx(rows.kept_mass()[0, column], rel=1e-5)
    assert np.cumsum(numbers("head.id")[:head]).tolist() == rows.head_ids[:head].tolist()
    drawn = -numbers("tail.value")[:tail] / 2
    inclusion = np.max([np.exp(drawn / t - z[b]) / floors[b] for b, t in enumerate((1.0, 2.0))], axis=0)
    _, weights = rows.log_weights_at(2.0, rows.log_partition_at(2.0))
    assert np.exp(weights[:tail]) == pytest.approx(np.exp(drawn / 2.0 - z[column]) / inclusion, rel=1e-4)
    assert np.cumsum(numbers("tail.id")[:tail]).tolist() == rows.tail_ids[:tail].tolist()


def test_the_documented_draws():
    """Section 6: the uniform numbers from the digests alone."""
    import hashlib

    import numpy as np

    from kdcache.cache.codec import sequence_digest
    from kdcache.data.tokens import TokenRow
    from kdcache.teacher.draws import uniforms

    ids, targets = np.array([5, 6, 7], dtype=np.uint32), np.array([False, True, True])
    stream = hashlib.shake_256(bytes.fromhex("ab" * 32) + sequence_digest(ids, targets)).digest(16)
    expected = [(int.from_bytes(stream[8 * i : 8 * i + 8], "little") >> 11) * 2.0**-53 for i in range(2)]
    assert uniforms("ab" * 32, TokenRow(0, ids, targets), 1)[:, 0].tolist() == expected
