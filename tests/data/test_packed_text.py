"""Pre-training text: streams that are read as far as they are needed, and documents packed into rows of one length."""

import copy
import json

import datasets
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kdcache.cache.reader import open_cache
from kdcache.data import examples as reading
from kdcache.data.examples import Example, load_examples
from kdcache.data.packing import pack
from kdcache.data.tokens import tokenise
from kdcache.errors import DataError, RecipeError
from kdcache.progress import Silent
from kdcache.recipe import parse_recipe
from kdcache.student.agreement import refuse_other_cache
from kdcache.teacher.capture import ShareResult, capture, capture_share
from kdcache.teacher.planning import plan_cache
from kdcache.teacher.workers import Worker
from kdcache.token_maps import load_tokenizer
from tests.crash.small_run import files
from tests.told import Told

DOCUMENTS = [f"Document {i}: " + "the cat sat on the mat and " * (i % 5) + "that was all." for i in range(60)]


@pytest.fixture(scope="module")
def tokenizer(models):
    return load_tokenizer(str(models / "teacher"))


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in DOCUMENTS))
    return path


@pytest.fixture
def own(values, texts):
    """Recipe values: a stream of which validation has the first four documents and train some rows."""
    values["data"] = {
        "train": {"path": str(texts)},
        "validation": {"path": str(texts), "take": 4},
        "max_length": 24,
        "stream": True,
        "token_budget": 250,
        "pack": True,
    }
    return values


def written(documents):
    return [Example(i, text=t, empty=not t.strip()) for i, t in enumerate(documents)]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    documents=st.lists(st.text("abc 12.\n\u00e9", max_size=60), min_size=1, max_size=8),
    max_length=st.integers(2, 40),
    budget=st.none() | st.integers(40, 120),
)
def test_rows_are_the_documents_laid_end_to_end(tokenizer, documents, max_length, budget):
    rows = pack(written(documents), tokenizer, max_length=max_length, budget=budget).rows
    line = []
    for document in documents:
        if document.strip():
            line += [*tokenizer(document, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    if budget is not None:
        line = line[: budget // max_length * max_length]
    cut = [line[i : i + max_length] for i in range(0, len(line), max_length)]
    # One token alone has nothing before it and is no row.
    assert [r.ids.tolist() for r in rows] == [c for c in cut if len(c) > 1]
    assert all(r.targets.tolist() == [False] + [True] * (len(r.ids) - 1) for r in rows)


def test_beginnings_stand_before_every_document_and_are_not_learnt(tokenizer):
    from tokenizers.processors import TemplateProcessing

    with_bos = copy.deepcopy(tokenizer)
    with_bos.bos_token = "<|im_start|>"
    with_bos._tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    [row] = pack(written(["once", "twice"]), with_bos, max_length=99).rows
    assert with_bos.decode(row.ids) == "<|im_start|>once<|im_end|><|im_start|>twice<|im_end|>"
    assert (row.targets == (row.ids != with_bos.bos_token_id)).all()


def test_counts_and_places_of_documents(tokenizer):
    made = pack(written(["  ", "one two three four five", "", "six", "seven"]), tokenizer, max_length=4, budget=8)
    assert (made.examples, made.dropped_empty, made.truncated, made.tokens) == (2, 1, 0, 8)
    assert [r.index for r in made.rows] == [1, 1]
    later = pack(written(["one", "two", "three"]), tokenizer, max_length=3).rows
    assert later[0].index == 0
    assert later[-1].index == 2


def test_reading_stops_with_the_document_that_fills_the_budget(tokenizer):
    def endless():
        for i in range(10**9):
            read.append(i)
            yield Example(i, text=DOCUMENTS[i % 60])

    for whole in (pack, tokenise):
        read = []
        made = whole(endless(), tokenizer, max_length=16, budget=160)
        assert made.tokens == 160 if whole is pack else 144 < made.tokens <= 160
        # A document a row: the one that does not fit any more has been read.
        assert len(read) == made.examples + (whole is tokenise) < 20


def stream_of(monkeypatch, count):
    """A data set without a file, which counts what is read of it."""
    read = []

    def rows():
        for i in range(count):
            read.append(i)
            yield {"text": DOCUMENTS[i % 60]}

    def load(path, *args, streaming, **options):
        assert streaming, "the whole data set would be loaded"
        return datasets.IterableDataset.from_generator(rows)

    monkeypatch.setattr(datasets, "load_dataset", load)
    return read


def test_a_stream_without_end_is_read_as_far_as_it_is_needed(own, monkeypatch):
    own["data"] |= {"train": {"path": "org/web"}, "validation": {"path": "org/web", "take": 4}}
    read, told = stream_of(monkeypatch, 10**9), Told()
    planned = plan_cache(parse_recipe(own), told)
    assert len(read) < 40
    assert planned.plan.data.splits[0].tokens == 240
    assert not told.warnings


def test_of_many_files_only_the_first_are_opened(own, tmp_path):
    folder = tmp_path / "many"
    folder.mkdir()
    for i in range(8):
        lines = [json.dumps({"text": t}) for t in DOCUMENTS[6 * i : 6 * i + 6]]
        (folder / f"{i}.jsonl").write_text("\n".join(lines if i < 3 else ["{broken"]))
    own["data"] |= {"train": {"path": str(folder)}, "validation": {"path": str(folder), "take": 4}}
    assert plan_cache(parse_recipe(own), Silent()).plan.data.splits[0].tokens == 240
    own["data"]["token_budget"] = "5k"
    with pytest.raises(DataError, match="many train, row"):
        plan_cache(parse_recipe(own), Silent())


def test_validation_has_the_first_documents_and_train_those_behind_them(own, tokenizer):
    planned = plan_cache(parse_recipe(own), Silent())
    train, validation = ("".join(tokenizer.decode(r.ids) for r in rows) for rows in planned.rows)
    end = tokenizer.eos_token
    assert validation == "".join(t + end for t in DOCUMENTS[:4])
    assert (end.join(DOCUMENTS[4:])).startswith(train.removesuffix(end))
    splits = planned.plan.data.splits
    assert splits[0].selected == "train, behind the first 4 examples, at most 250 tokens, packed"
    assert splits[1].selected == "train, 4 examples, packed"
    assert {len(r.ids) for r in planned.rows[0]} == {24}


def test_another_source_leaves_the_train_stream_whole(own, tmp_path, tokenizer):
    (tmp_path / "held.jsonl").write_text(json.dumps({"text": "held out"}) + "\n")
    own["data"]["validation"] = {"path": str(tmp_path / "held.jsonl"), "take": 1}
    planned = plan_cache(parse_recipe(own), Silent())
    assert tokenizer.decode(planned.rows[0][0].ids).startswith("Document 0")
    assert planned.plan.data.splits[0].selected == "train, at most 250 tokens, packed"


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "directory", "saved"])
def test_every_source_streams_the_same(kind, tmp_path, texts):
    table = datasets.Dataset.from_list([{"text": t} for t in DOCUMENTS])
    path = texts
    if kind == "parquet":
        path = tmp_path / "t.parquet"
        table.to_parquet(str(path))
    if kind == "directory":
        path = tmp_path / "folder"
        path.mkdir()
        texts.rename(path / "train.jsonl")
    if kind == "saved":
        path = tmp_path / "saved"
        table.save_to_disk(str(path))
    found = load_examples(str(path), stream=True, skip=3, take=5)
    assert [(e.index, e.text) for e in found] == list(enumerate(DOCUMENTS[3:8]))
    assert found.shape == "text"


def test_a_cache_of_packed_text_is_the_same_however_it_is_made(own):
    own["cache"]["positions_per_shard"] = 60
    recipe = parse_recipe(own)
    reference = files(capture(recipe).directory)
    cache = open_cache(recipe.cache.directory)
    assert cache.plan.data.shape == "text"
    assert sum(int(s.targets.sum()) for s in cache["train"]) == 10 * 23
    refuse_other_cache(recipe, cache)
    own["cache"]["directory"] += "-shared"
    assert isinstance(capture_share(parse_recipe(own), Worker(1, 2)), ShareResult)
    assert files(capture(parse_recipe(own)).directory) == reference


def test_documents_one_a_row_and_examples_of_other_shapes_have_a_budget_too(own, models, tokenizer):
    own["data"] |= {"pack": False, "token_budget": 200, "max_length": 40}
    planned = plan_cache(parse_recipe(own), Silent())
    assert 160 < planned.plan.data.splits[0].tokens <= 200
    assert tokenizer.decode(planned.rows[0][0].ids).startswith("Document 4")
    path = str(models / "train.jsonl")
    own["data"] |= {"train": {"path": path, "take": 7}, "validation": {"path": path, "take": 2}, "max_length": 96}
    del own["data"]["token_budget"]
    plan = plan_cache(parse_recipe(own), Silent()).plan
    assert (plan.data.shape, plan.data.splits[0].examples) == ("instruction", 7)
    own["data"] = {"train": {"path": path}, "validation": {"path": path}, "token_budget": 600, "max_length": 96}
    assert 500 < plan_cache(parse_recipe(own), Silent()).plan.data.splits[0].tokens <= 600


def test_a_stream_that_ends_early_says_so(own):
    told = Told()
    own["data"]["token_budget"] = "100k"
    plan = plan_cache(parse_recipe(own), told).plan
    assert any("ends after" in w and "of 100,000 tokens (data.token_budget)" in w for w in told.warnings)
    assert plan.data.splits[0].examples == 56
    own["data"]["validation"]["take"] = 59
    own["data"] |= {"token_budget": None}
    own["data"]["train"]["take"] = 10
    told = Told()
    plan_cache(parse_recipe(own), told)
    assert any("ends after 1 of 10 examples (data.train.take)" in w for w in told.warnings)
    own["data"]["validation"]["take"] = 60
    with pytest.raises(DataError, match=r"ends within the 60 examples that data\.validation\.take holds out"):
        plan_cache(parse_recipe(own), Silent())


@pytest.mark.parametrize(
    ("written_as", "tokens"),
    [("10M", 10_000_000), ("500k", 500_000), ("2.5b", 2_500_000_000), ("4096", 4096), (4096, 4096)],
)
def test_large_numbers_are_written_as_people_do(own, written_as, tokens):
    own["data"]["token_budget"] = written_as
    assert parse_recipe(own).data.token_budget == tokens


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"train": {"path": "p", "split": "train[:5%]"}},
            r"data\.train\.split is train\[:5%\], and a stream has no length",
        ),
        ({"validation": {"path": "p", "split": "train[:9]", "take": 9}}, r"data\.validation\.split is train\[:9\]"),
        ({"token_budget": 23}, r"data\.token_budget 23 is less than one row of data\.max_length 24"),
        ({"token_budget": None}, r"data\.stream has no end of its own: give data\.token_budget"),
        ({"validation": {"path": "p"}}, r"data\.stream has no end of its own: give data\.validation\.take"),
        ({"stream": False}, r"data\.validation\.take goes with data\.stream; .* data\.validation\.split train\[:4\]"),
        ({"shape": "chat"}, r"data\.pack packs documents of plain text, data\.shape is chat"),
        ({"token_budget": "10 MB"}, r"data\.token_budget"),
        ({"token_budget": -5}, r"data\.token_budget"),
    ],
)
def test_contradictions_are_named(own, change, message):
    with pytest.raises(RecipeError, match=message):
        parse_recipe({**own, "data": {**own["data"], **change}})


def test_streams_without_text(own, models, tmp_path, monkeypatch):
    own["data"]["columns"] = {"text": "body"}
    with pytest.raises(DataError, match=r"should have the columns .*body, found text"):
        plan_cache(parse_recipe(own), Silent())
    own["data"] |= {"columns": {}, "train": {"path": str(models / "train.jsonl")}}
    with pytest.raises(DataError, match=r"are of shape instruction; leave it out"):
        plan_cache(parse_recipe(own), Silent())
    own["data"]["train"] = {"path": str(tmp_path / "none.jsonl")}
    with pytest.raises(DataError, match="does not exist"):
        plan_cache(parse_recipe(own), Silent())
    (tmp_path / "blank.jsonl").write_text('{"text": " "}\n')
    own["data"]["train"] = {"path": str(tmp_path / "blank.jsonl")}
    with pytest.raises(DataError, match="no example has a response token"):
        plan_cache(parse_recipe(own), Silent())
    stream_of(monkeypatch, 0)
    with pytest.raises(DataError, match="has no rows"):
        load_examples("org/nothing", stream=True)


def test_a_stream_that_breaks_is_a_data_error(monkeypatch):
    def rows():
        yield {"text": "fine"}
        raise ConnectionError("the line is dead")

    monkeypatch.setattr(reading, "load_rows", lambda *args, **options: datasets.IterableDataset.from_generator(rows))
    with pytest.raises(DataError, match=r"org/web train, row 1: ConnectionError: the line is dead"):
        list(load_examples("org/web", stream=True))


def test_rows_of_one_document_are_as_they_would_be_alone(tokenizer):
    text = "word " * 50
    alone = tokenise(written([text]), tokenizer, max_length=20).rows[0]
    packed = pack(written([text]), tokenizer, max_length=20).rows[0]
    assert (alone.ids == packed.ids).all()
    assert (alone.targets == packed.targets).all()
    assert packed.ids.dtype == np.uint32
