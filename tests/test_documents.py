"""The documents against the code: README's commands run, cache_format.md's tables and constants hold."""

import importlib.util
import json
import math
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
from kdcache.cache.manifest import Manifest, Plan

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
    recipe["training"] |= {"epochs": 1, "learning_rate": 0.003}
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


@pytest.fixture(scope="module")
def trained(sandbox):
    """The sandbox after README's first command: models, cache and student are there."""
    if not (Path(sys.executable).parent.parent / ".ready").exists():
        pytest.skip("this environment was not made by make, so make would reinstall it")
    assert commands("bash make") == ["make train-student", "make test"]
    ran = shell("make train-student", sandbox)
    assert ran.returncode == 0, ran.stderr
    assert "student after" in ran.stdout
    return sandbox


def test_make_test_runs_pytest():
    planned = shell("make test --dry-run", ROOT)
    assert planned.returncode == 0
    assert "pytest" in planned.stdout


# Block by block, in order: some use what those before them have made.
@pytest.mark.parametrize("block", blocks("bash"), ids=lambda block: block.split(maxsplit=2)[1])
def test_every_command_of_the_readme_runs(trained, block):
    lines = [line.split("#")[0].strip() for line in block.splitlines()]
    for command in filter(None, lines):
        ran = shell(command, trained)
        assert ran.returncode == 0, (command, ran.stdout, ran.stderr)


def test_every_snippet_runs(trained):
    snippets = blocks("python") + blocks("python", (ROOT / "docs/loss.md").read_text())
    assert len(snippets) == 3
    for snippet in snippets:
        if "import trl" in snippet and importlib.util.find_spec("trl") is None:
            warnings.warn("TRL is not installed; its snippet in docs/loss.md is not run", stacklevel=1)
            continue
        ran = subprocess.run([sys.executable, "-c", snippet], cwd=trained, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stderr
        assert ran.stdout.strip()


def test_every_picture_of_the_documents_is_there():
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").glob("*.md")):
        for link in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page.read_text()):
            assert (page.parent / link).is_file(), (page.name, link)


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


def section(number):
    """The text of one numbered section of cache_format.md."""
    return FORMAT.split(f"\n## {number}. ")[1].split("\n## ")[0]


def table(text):
    """Cells of the Markdown tables of a text, without their heads."""
    lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in text.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line] for line in lines]


def test_sections_are_those_that_were_agreed_on():
    titles = re.findall(r"^## (\d+)\. (.*)", FORMAT, flags=re.MULTILINE)
    assert [int(number) for number, _ in titles] == list(range(1, 18))
    for (_, title), word in zip(titles, (
        "Status", "Terms", "Directory", "Container", "commit record", "Tensors", "Invariants", "Meaning", "manifest",
        "Size", "byte by byte", "Golden", "Compatibility", "What breaks", "Security", "reader", "Change log",
    ), strict=True):  # fmt: skip
        assert word in title
    assert "1.0, frozen" in section(1)
    assert layout.VERSION == 1
    assert {int(n) for n in re.findall(r"[Ss]ections? (\d+)", FORMAT)} <= set(range(1, 18))
    assert all(len(line) <= 120 for line in FORMAT.splitlines() if not line.startswith("|"))


def test_tensor_table():
    rows = re.findall(r"^\| `([a-z._]+)` \| `([^`]+)` \| `([A-Z0-9,]+)` \|", section(6), flags=re.MULTILINE)
    assert {name: (dtype.replace("\\|", "|"), shape) for name, dtype, shape in rows} == layout.TENSORS
    assert [name for name, _, _ in rows] == list(layout.TENSORS)


def test_constants_and_names():
    limits = dict(re.findall(r"^\| ([a-zA-Z, ]+) \| ([\d,]+) \|", section(4), flags=re.MULTILINE))
    assert limits == {
        "safetensors header": f"{layout.HEADER_LIMIT:,}",
        "shard, packed or unpacked": f"{layout.SHARD_LIMIT:,}",
        "JSON file": f"{layout.JSON_LIMIT:,}",
        "vocabulary, packed or unpacked": f"{layout.VOCABULARY_LIMIT:,}",
    }
    for number in (layout.VOCAB_LIMIT, layout.ZSTD_WINDOW_LIMIT):
        assert f"{number:,}" in section(4)
    for name in (
        layout.PLAN_FILE,
        layout.VOCABULARY_FILE,
        f"{layout.SHARD_DIRECTORY}/{layout.shard_name(0)}",
        layout.MANIFEST_FILE,
        layout.CARD_FILE,
        layout.TEMPORARY_PREFIX,
    ):
        assert name in section(3)
    assert f"level {layout.ZSTD_LEVEL} " in section(4)
    assert f"first {layout.DIGEST_BYTES} bytes of SHA-256" in section(6)
    assert (layout.HEAD_STEP, layout.TAIL_STEP, layout.REST_STEP) == (1 / 16, 1 / 2, 2**-10)
    assert layout.REST_LIMIT == 32
    losses = section(6).split("What is lost")[1]
    assert f"{layout.LEVEL_LIMIT / 16:,}" in losses
    assert f"-{layout.HALF_LIMIT:,.0f}" in losses


def test_fields_of_the_commit_record():
    from kdcache.cache import codec, shard
    from tests.cache.samples import sample_sequences

    packed = shard.pack(codec.encode(sample_sequences(2), values="quantised"), plan_digest="a" * 64, index=0)
    raw = shard.decompress(packed, limit=1 << 20)
    size = int.from_bytes(raw[:8], "little")
    record = json.loads(json.loads(raw[8 : 8 + size])["__metadata__"][layout.METADATA_KEY])
    assert {name.strip("`") for name, _ in table(section(5))} == set(record)


def described(schema):
    """A pydantic field's type in the words of cache_format.md."""
    if "anyOf" in schema:
        return f"{described(schema['anyOf'][0])} or null"
    if "const" in schema or "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema.get("enum") or [schema["const"]])
    low, high, below = (schema.get(k) for k in ("minimum", "maximum", "exclusiveMaximum"))
    match schema.get("type"):
        case None:
            return "object"
        case "object":
            return "texts by name" if schema.get("additionalProperties") else "object"
        case "string":
            pattern = schema.get("pattern")
            return {None: "text", "^[0-9a-f]{64}$": "SHA-256"}.get(pattern, f"`{pattern}`")
        case "array":
            sizes = f"{schema.get('minItems', 0)} to {schema['maxItems']:,}: " if "maxItems" in schema else ""
            return f"list of {sizes}{described(schema['items'])}"
        case "integer" if below == 1 << 53:
            return "count" if low == 0 else f"count, at least {low}"
        case "integer" | "number" as kind:
            if kind == "integer" and below is not None:
                high, below = below - 1, None
            bounds = {"at least": low, "above": schema.get("exclusiveMinimum"), "at most": high, "below": below}
            shown = {k: f"{v:,g}" if kind == "number" else f"{v:,}" for k, v in bounds.items() if v is not None}
            return ", ".join([kind, *(f"{k} {v}" for k, v in shown.items())])
        case kind:
            return kind


def documented_fields(model):
    """Dotted name and type of every field, in order."""
    schema = model.model_json_schema()

    def walk(node, prefix):
        for name, field in node["properties"].items():
            inner = field.get("anyOf", [field])[0]
            items = inner.get("items", {})
            reference = inner.get("$ref") or items.get("$ref")
            dotted = f"{prefix}{name}{'[]' if '$ref' in items else ''}"
            yield f"`{dotted}`", described(field)
            if reference:
                yield from walk(schema["$defs"][reference.split("/")[-1]], f"{dotted}.")

    return list(walk(schema, ""))


@pytest.mark.parametrize(("model", "title"), [(Plan, "### 9.2 "), (Manifest, "### 9.4 ")])
def test_fields_of_plan_and_manifest(model, title):
    text = section(9).split(title)[1].split("\n### ")[0]
    assert [(name, kind) for name, kind, _ in table(text)] == documented_fields(model)


def test_every_invariant_is_in_the_document_with_its_rule():
    source = "".join((ROOT / "kdcache/cache" / n).read_text() for n in ("invariants.py", "codec.py"))
    used = re.findall(r"invariant (\d+) \(([^){]+)", source) + re.findall(r"\brefuse\((\d+), f?\"([^\"{]+)", source)
    items = dict(re.findall(r"^(\d+)\. (.*?)(?=^\d+\. |^$)", section(7), flags=re.MULTILINE | re.DOTALL))
    assert {number for number, _ in used} == set(items)
    for number, rule in used:
        assert f'"{rule.strip()}' in re.sub(r"\s+", " ", items[number])


def test_the_documented_size_is_that_of_the_tensors():
    """Section 10: bytes before zstd, beside the header."""
    from kdcache.cache.codec import expected_tensors
    from tests.cache.samples import SELECTIONS, VOCAB

    counts = {"sequences": 7, "tokens": 90, "positions": 60, "head": 500, "tail": 800}
    for name, selection in SELECTIONS.items():
        tensors = expected_tensors(**counts, design=selection.design(VOCAB))
        size = sum(math.prod(shape) * {"U8": 1, "U32": 4}[dtype] for dtype, shape in tensors.values())
        documented = 60 * (2 * len(selection.temperatures) + 6) + 7 * 20 + 90 * (2 + 1) + 1300 * (2 + 2)
        documented += {"ids_alone": 60 * 2 - 800 * 2, "random_sampling": 1300}.get(name, 0)
        assert size == documented, name


def test_the_documented_arithmetic_reads_a_shard(shared_cache):
    """Section 8 by hand: raw safetensors and numpy only, against the library."""
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
    """Section 8: the uniform numbers from the digests alone."""
    import hashlib

    import numpy as np

    from kdcache.cache.codec import sequence_digest
    from kdcache.data.tokens import TokenRow
    from kdcache.teacher.draws import uniforms

    ids, targets = np.array([5, 6, 7], dtype=np.uint32), np.array([False, True, True])
    stream = hashlib.shake_256(bytes.fromhex("ab" * 32) + sequence_digest(ids, targets)).digest(16)
    expected = [(int.from_bytes(stream[8 * i : 8 * i + 8], "little") >> 11) * 2.0**-53 for i in range(2)]
    assert uniforms("ab" * 32, TokenRow(0, ids, targets), 1)[:, 0].tolist() == expected
