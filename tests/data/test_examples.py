"""Every kind of source, and every way in which one can be wrong."""

import gzip
import json

import datasets
import pytest

from kdcache.data.examples import load_examples
from kdcache.errors import DataError

ROWS = [{"instruction": f"say {i}", "input": "x" if i % 2 else "", "output": str(i)} for i in range(20)]


def lines(rows):
    return "".join(json.dumps(r) + "\n" for r in rows).encode()


@pytest.fixture
def jsonl(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(lines(ROWS))
    return path


def make(kind, folder):
    table = datasets.Dataset.from_list(ROWS)
    if kind == "jsonl":
        (folder / "d.jsonl").write_bytes(lines(ROWS))
        return folder / "d.jsonl"
    if kind == "jsonl.gz":
        (folder / "d.jsonl.gz").write_bytes(gzip.compress(lines(ROWS)))
        return folder / "d.jsonl.gz"
    if kind == "json":
        (folder / "d.json").write_text(json.dumps(ROWS))
        return folder / "d.json"
    if kind == "parquet":
        table.to_parquet(str(folder / "d.parquet"))
        return folder / "d.parquet"
    if kind == "directory":
        (folder / "files").mkdir()
        (folder / "files" / "train.jsonl").write_bytes(lines(ROWS))
        return folder / "files"
    if kind == "saved":
        table.save_to_disk(str(folder / "saved"))
        return folder / "saved"
    datasets.DatasetDict({"train": table}).save_to_disk(str(folder / "dict"))
    return folder / "dict"


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "parquet", "directory", "saved", "dict"])
def test_every_source_gives_the_same_examples(kind, tmp_path):
    path = str(make(kind, tmp_path))
    examples = list(load_examples(path))
    assert len(examples) == 20
    assert examples[3].messages[0].content == "say 3\nx"
    assert examples[4].messages[0].content == "say 4"
    assert [m.role for m in examples[0].messages] == ["user", "assistant"]
    for split, expected in (("train[:25%]", range(5)), ("train[25%:30%]", range(5, 6)), ("train[2:4]", range(2, 4))):
        part = [e.messages[1].content for e in load_examples(path, split=split)]
        assert part == [str(i) for i in expected]


def test_columns_can_be_renamed_and_shapes_are_found_by_columns(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(lines([{"prompt": "p", "answer": "a"}]))
    renamed = load_examples(str(path), columns={"instruction": "prompt", "output": "answer"})
    assert renamed.shape == "instruction"
    chat = tmp_path / "c.jsonl"
    chat.write_bytes(lines([{"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]}]))
    assert load_examples(str(chat)).shape == "chat"
    text = tmp_path / "t.jsonl"
    text.write_bytes(lines([{"text": "once"}, {"text": " "}, {"text": None}]))
    assert [e.empty for e in load_examples(str(text))] == [False, True, True]


def test_empty_responses_are_kept_and_marked(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(lines([ROWS[0], {"instruction": "q", "input": None, "output": " "}]))
    assert [e.empty for e in load_examples(str(path))] == [False, True]


@pytest.mark.parametrize(
    ("content", "split", "message"),
    [
        (None, "train", "does not exist"),
        (b"", "train", "is empty"),
        (lines([{"question": "q", "reply": "r"}]), "train", r"columns .*found question, reply"),
        ('{"instruction": "caf\u00e9", "output": "x"}\n'.encode("latin-1"), "train", "UTF-8"),
        (b'{"instruction": "a", "output": ', "train", "cannot read"),
        (lines(ROWS), "train[50:60]", "cannot read|no rows"),
        (lines(ROWS), "train[:0]", "corresponds to no data|no rows"),
        (lines([{"instruction": 1, "output": "x"}]), "train", "should be text, found int"),
        (lines([{"messages": [{"role": "robot", "content": "x"}]}]), "train", "role 'robot'"),
    ],
    ids=["missing", "empty", "columns", "encoding", "cut", "beyond", "none", "number", "role"],
)
def test_bad_data_is_one_typed_error(tmp_path, content, split, message):
    path = tmp_path / "d.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(load_examples(str(path), split=split))


def test_an_unreachable_hub_data_set_is_a_data_error():
    with pytest.raises(DataError, match="cannot read some-org/some-data"):
        load_examples("some-org/some-data")
