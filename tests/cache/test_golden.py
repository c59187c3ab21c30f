"""The golden caches: literal bytes of format version 1, read, refused and made again; and a reader that shares no code."""

import importlib.util
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import zstandard

from kdcache.cache import layout
from kdcache.cache.reader import open_cache
from kdcache.cache.verify import verify
from kdcache.errors import CacheError, KdcacheError
from tests import independent_reader
from tests.golden import make
from tests.golden.broken import BROKEN
from tests.golden.contents import GOLDENS, TOKENS, WIDE, content_of, plan_of
from tests.golden.edits import Files

GOLDEN = Path(make.__file__).parent / "v1"
INDEX = json.loads((GOLDEN / "index.json").read_text())
FORMAT = (GOLDEN.parent.parent.parent / "cache_format.md").read_text()
# Values that only a check of every row sees; the independent reader leaves those to ours.
NOT_LOOKED_AT = {name for name in BROKEN if re.fullmatch(r"invariant_([1-35-9]|1[0124])(_.*)?", name)}
# What does not touch a number that it returns: its sixty lines read no vocabulary and no totals, and JSON as Python does.
READ_ALL_THE_SAME = {name for name in BROKEN if name.startswith(("manifest_", "vocabulary_"))} | {
    "frame_window", "header_duplicate_key", "header_field", "header_too_large", "plan_duplicate_key", "plan_sequences",
}  # fmt: skip


def test_every_golden_is_there_and_small():
    assert {p.name for p in (GOLDEN / "valid").iterdir()} == set(GOLDENS)
    assert set(INDEX["invalid"]) == set(BROKEN)
    assert sum(p.stat().st_size for p in GOLDEN.rglob("*") if p.is_file()) < 400 << 10
    described = FORMAT.split("## 12. ")[1].split("## 13. ")[0]
    assert set(re.findall(r"`([a-z0-9_]+)`", described)) >= set(GOLDENS) | set(BROKEN)
    numbers = {int(name.split("_")[1]) for name in BROKEN if name.startswith("invariant_")}
    assert numbers == set(range(1, 15)) - {10}, "16 bits cannot break invariant 10"


@pytest.mark.parametrize("name", GOLDENS)
def test_a_valid_golden_holds_the_expected_numbers(name):
    directory = GOLDEN / "valid" / name
    assert verify(directory) == []
    cache = open_cache(directory)
    found = json.loads(json.dumps(make.expectations(cache)))
    assert_close(found, json.loads((GOLDEN / "expected" / f"{name}.json").read_text()))
    assert cache.vocabulary() == (WIDE if name == "wide_ids" else TOKENS)


@pytest.mark.parametrize("name", GOLDENS)
def test_a_valid_golden_holds_the_content_it_was_made_from(name):
    golden = GOLDENS[name]
    plan = plan_of(golden)
    cache = open_cache(GOLDEN / "valid" / name)
    assert cache.plan == plan
    for shard in range(len(plan.shards)):
        written, read = content_of(golden, plan, shard).rows, cache.shard(shard).rows
        half = plan.selection.values == "half"
        for part, step in (("head", layout.HEAD_STEP), ("tail", layout.TAIL_STEP)):
            assert np.array_equal(getattr(written, f"{part}_ids"), getattr(read, f"{part}_ids"))
            off = np.abs(getattr(written, f"{part}_logits") - getattr(read, f"{part}_logits"))
            bound = 2.0**-11 * 16 if half or (part == "tail" and not plan.selection.tail_logits) else step / 2
            assert off.max(initial=0) <= bound
        assert np.abs(written.rest - read.rest).max() <= layout.REST_STEP / 2


def test_goldens_are_made_again(tmp_path):
    """Content always; literal bytes where zstd and safetensors are the ones they were made with."""
    make.make(tmp_path)
    made, kept = make.files_of(tmp_path), make.files_of(GOLDEN)
    assert set(made) == set(kept)
    if INDEX["made_with"] == make.libraries():
        assert [path for path in kept if made[path] != kept[path]] == []
    for name in GOLDENS:
        pair = [open_cache(root / "valid" / name).manifest.shards for root in (tmp_path, GOLDEN)]
        assert [s.content_sha256 for s in pair[0]] == [s.content_sha256 for s in pair[1]]


def respelt(files):
    """What section 13 calls ignorable, all of it other than a writer writes it; the manifest follows."""
    raw = files.raw()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    metadata, data = header.pop("__metadata__"), b""
    record = json.loads(metadata["kdcache"])
    for name in sorted(header, key=len):
        begin, end = header[name]["data_offsets"]
        header[name]["data_offsets"] = [len(data), len(data) + end - begin]
        data += raw[start + begin : start + end]
    metadata["kdcache"] = json.dumps(dict(reversed(record.items())), indent=2)
    text = json.dumps({**header, "__metadata__": metadata}, indent=3).encode()
    raw = len(text).to_bytes(8, "little") + text + data
    files.put(zstandard.ZstdCompressor(level=19, write_checksum=True).compress(raw), raw_bytes=len(raw))
    plan = json.loads(files.files["plan.json"])
    assert plan["selection"]["temperatures"] == [1.0, 2.0]
    plan["selection"]["temperatures"] = [1, 2]
    files.files["plan.json"] = json.dumps(dict(reversed(plan.items()))).encode()
    files.files |= {"README.md": b"notes", "LICENSE": b"", "shards/.tmp-00007": b"half a shard"}


def test_what_is_ignorable_is_ignored(tmp_path):
    files = Files(make.files_of(GOLDEN / "valid/top_k"))
    respelt(files)
    for path, data in files.files.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(data)
    assert verify(tmp_path) == []
    cache, golden = open_cache(tmp_path), open_cache(GOLDEN / "valid/top_k")
    assert read_everything(tmp_path) == make.expectations(golden)
    assert cache.plan.digest == golden.plan.digest
    assert cache.manifest.shards[0].content_sha256 == golden.manifest.shards[0].content_sha256


def broken_copy(name, folder):
    entry = INDEX["invalid"][name]
    shutil.copytree(GOLDEN / "valid" / entry["base"], folder)
    replaced = GOLDEN / "invalid" / name
    if replaced.exists():
        shutil.copytree(replaced, folder, dirs_exist_ok=True)
    for path in entry["removed"]:
        (folder / path).unlink()
    return entry


def read_everything(directory):
    cache = open_cache(directory)
    cache.vocabulary()
    return make.expectations(cache)


@pytest.mark.parametrize("name", BROKEN)
def test_an_invalid_golden_is_refused_by_its_own_error(name, tmp_path):
    entry = broken_copy(name, tmp_path / "cache")
    if entry["error"] is None:
        read_everything(tmp_path / "cache")
    else:
        with pytest.raises(KdcacheError) as refused:
            read_everything(tmp_path / "cache")
        assert (type(refused.value).__name__, entry["text"] in str(refused.value)) == (entry["error"], True), (
            refused.value
        )
        assert "\n" not in str(refused.value)
    try:
        problems = [f.problem for f in verify(tmp_path / "cache")]
    except CacheError as exc:
        problems = [str(exc)]
    assert any(entry["verify"] in problem for problem in problems), problems


def numbers_of(directory):
    """What the independent reader finds, in the shape of `make.expectations`."""
    plan, splits = independent_reader.read_cache(Path(directory))
    chosen, found = plan["selection"], {}
    for number, sequences in splits.items():
        found[plan["data"]["splits"][number]["name"]] = [
            {
                "token_ids": ids,
                "targets": flags,
                "label_log_prob": [row["label"] for row in rows],
                "rest": [row["rest"] for row in rows],
                "log_partition": {
                    f"{t}": [
                        float(independent_reader.weights(row, chosen, t)[0]) if len(row["head_ids"]) else None
                        for row in rows
                    ]
                    for t in chosen["temperatures"]
                },
                "rows": [row_of(row, chosen) for row in rows],
            }
            for ids, flags, rows in sequences
        ]
    return json.loads(json.dumps(found, default=lambda value: value.tolist()))


def row_of(row, chosen):
    kept = {k: v for k, v in row.items() if k not in ("label", "rest")}
    if chosen["method"] != "random_sampling":
        kept = {k: v for k, v in kept.items() if not k.endswith("counts")}
    with np.errstate(divide="ignore"):
        weights = {
            f"{t}": np.concatenate(independent_reader.weights(row, chosen, t)[1:]) for t in chosen["temperatures"]
        }
    return {**kept, "log_weights": {t: [float(w) if w > -1e30 else None for w in own] for t, own in weights.items()}}


def assert_close(found, expected, where=""):
    """Equal structure and integers, floats within 5e-6."""
    if isinstance(expected, dict):
        assert isinstance(found, dict), where
        for key in found.keys() | expected.keys():
            assert (key in found and key in expected) or key == f"{make.BETWEEN}", (where, key)
            if key in found:
                assert_close(found[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for i, pair in enumerate(zip(found, expected, strict=True)):
            assert_close(*pair, f"{where}.{i}")
    elif isinstance(expected, float) or isinstance(found, float):
        assert found == pytest.approx(expected, rel=1e-6, abs=5e-6), where
    else:
        assert found == expected, where


@pytest.mark.parametrize("name", GOLDENS)
@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
def test_the_independent_reader_agrees(name):
    assert_close(numbers_of(GOLDEN / "valid" / name), json.loads((GOLDEN / "expected" / f"{name}.json").read_text()))


@pytest.mark.parametrize("name", [name for name in GOLDENS if name != "derived"])  # its 1 / T span seven decades
@pytest.mark.parametrize("temperature", [1.25, make.BETWEEN, 7.0])
def test_the_documented_interpolation(name, temperature):
    """Section 8 by hand, with a general solver for the polynomial."""
    plan, splits = independent_reader.read_cache(GOLDEN / "valid" / name)
    declared = plan["selection"]["temperatures"]
    ours = [
        z
        for split in open_cache(GOLDEN / "valid" / name).splits.values()
        for s in split
        for z in s.rows.log_partition_at(temperature)
    ]
    rows = [row for number in sorted(splits) for _, _, own in splits[number] for row in own]
    assert len(ours) == len(rows) > 0
    for z, row in zip(ours, rows, strict=True):
        if not len(row["head_ids"]):
            continue
        free = np.log(plan["tokenizer"]["vocab_size"] - len(row["head_ids"]))
        inside = [np.log(np.exp(row["head_logits"] / t).sum()) for t in [*declared, temperature]]
        nodes = np.array([free, *(min(r + own, free) for r, own in zip(row["rest"], inside, strict=False))])
        x, wanted = np.array([0.0, *(1 / t for t in declared)]), 1 / temperature
        value = np.vander([wanted], len(x)) @ np.linalg.solve(np.vander(x), nodes)
        between = nodes[[np.where(x <= wanted, x, -1).argmax(), np.where(x >= wanted, x, 9).argmin()]]
        assert z == pytest.approx(np.logaddexp(inside[-1], np.clip(value[0], *sorted(between))), rel=1e-6)


def test_the_independent_reader_agrees_on_a_real_cache(shared_cache):
    assert_close(numbers_of(shared_cache), json.loads(json.dumps(make.expectations(open_cache(shared_cache)))))


@pytest.mark.parametrize("name", sorted(set(BROKEN) - NOT_LOOKED_AT))
@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
def test_the_independent_reader_never_finds_other_numbers(name, tmp_path):
    entry = broken_copy(name, tmp_path / "cache")
    expected = json.loads((GOLDEN / "expected" / f"{entry['base']}.json").read_text())
    try:
        found = numbers_of(tmp_path / "cache")
    except Exception:  # refused, by whatever its few lines run into
        return
    assert name in READ_ALL_THE_SAME
    assert_close(found, expected)


def test_the_independent_reader_is_short_and_on_its_own():
    lines = Path(independent_reader.__file__).read_text().splitlines()
    assert len(lines) <= 60
    assert {line.split()[1] for line in lines if line.startswith(("import", "from"))} == {
        "json", "hashlib", "numpy", "zstandard",
    }  # fmt: skip


def test_the_reader_in_the_document_reads(tmp_path):
    code = FORMAT.split("## 16. ")[1].split("```python\n")[1].split("```")[0]
    assert len([line for line in code.splitlines() if line]) <= 33
    (tmp_path / "reader.py").write_text(code)
    spec = importlib.util.spec_from_file_location("reader_of_the_document", tmp_path / "reader.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in GOLDENS:
        cache = open_cache(GOLDEN / "valid" / name)
        for shard in range(len(cache.plan.shards)):
            rows, found = cache.shard(shard).rows, list(module.read_shard(GOLDEN / "valid" / name, shard))
            assert len(found) == len(rows)
            for i, (head, tail, log_z) in enumerate(found):
                own = rows.slice(i, i + 1)
                for (ids, logits), part in ((head, "head"), (tail, "tail")):
                    assert np.array_equal(ids, getattr(own, f"{part}_ids"))
                    assert np.array_equal(logits, getattr(own, f"{part}_logits"))
                if len(head[0]):
                    expected = [float(own.log_partition_at(t)[0]) for t in cache.temperatures]
                    assert log_z == pytest.approx(expected, rel=1e-6)


def test_the_bytes_in_the_document_are_the_golden_shard():
    section = FORMAT.split("## 11. ")[1].split("## 12. ")[0]
    packed = (GOLDEN / "valid/top_k/shards/00000.safetensors.zst").read_bytes()
    begin, end, size, tensors = [block.split("```")[0] for block in section.split("```text\n")[1:]]
    header = section.split("```json\n")[1].split("```")[0].replace("\n", "")
    assert packed.startswith(bytes_of(begin, at=0))
    assert packed.endswith(bytes_of(end, at=len(packed) - 4))
    raw = bytes_of(size, at=0) + header.encode() + b"  "
    raw += bytes_of(tensors, at=len(raw))
    assert raw == zstandard.ZstdDecompressor().decompress(packed)


def bytes_of(block, *, at):
    """Bytes of lines ``00000010  61 62 63   remark``, whose offsets have to follow on each other."""
    result = b""
    for line in block.splitlines():
        assert line[:8] == f"{at + len(result):08x}"
        assert len(line) <= 120
        result += bytes.fromhex(line[10:57])
    return result
