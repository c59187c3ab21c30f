"""Tables of strangers that lie about their types or sizes, imports that are changed in between, folders that are not ours."""

import datetime
import json
import shutil

import datasets
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from typer.testing import CliRunner

import kdcache.cli  # noqa: F401 - registers the commands
from kdcache.cache.derive import write_derived
from kdcache.cache.reader import open_cache
from kdcache.commands.app import app
from kdcache.errors import DataError, PlanMismatchError
from kdcache.exchange import columns, distillkit, importing
from kdcache.exchange.exporting import export_cache
from kdcache.exchange.imported_plan import Given
from kdcache.exchange.importing import import_cache
from tests.exchange.test_strangers import axolotl_row, distillkit_row, edited, lines, plain_line, refused, table


@pytest.fixture
def given(models):
    return Given(tokenizer=str(models / "teacher"))


@pytest.fixture
def settings(tmp_path, shared_cache):
    """Settings of DistillKit beside the data."""
    made = distillkit.Settings(d=open_cache(shared_cache).vocab_size, k=4, exact_k=4)
    (tmp_path / distillkit.SETTINGS).write_bytes(made.as_yaml())
    return made


def nested(name, kind):
    """Puts something else into every entry of a column."""
    return lambda row: row.update({name: [[kind(v) for v in values] for values in row[name]]})


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (nested("target_token_ids", lambda v: v + 0.9), "target_token_ids to be a list of list of whole numbers, found .*double"),
        (nested("target_token_ids", str), "target_token_ids to be a list of list of whole numbers"),
        (nested("target_logprobs", lambda v: [v]), "target_logprobs to be a list of list of numbers"),
        (lambda r: r.update(target_logprobs=3.0), "target_logprobs to be .*, found double"),
        (lambda r: r.update(target_logprobs=[{"a": 1}] * 5), "target_logprobs to be .*, found .*struct"),
        (lambda r: r.update(target_logprobs=[[datetime.date(2020, 1, 1)]] * 5), "target_logprobs to be .*, found .*date"),
        (lambda r: r.update(input_ids=3), "input_ids to be a list of whole numbers, found int64"),
        (lambda r: r.update(input_ids="hello"), "input_ids to be .*, found string"),
        (lambda r: r.update(input_ids=b"hello"), "input_ids to be .*, found binary"),
        (lambda r: r.update(input_ids={"a": 1}), "input_ids to be .*, found struct"),
        (lambda r: r.update(input_ids=None), "input_ids to be .*, found null"),
        (lambda r: r["input_ids"].__setitem__(0, -5), "row 0: token id -5 in input_ids"),
        (lambda r: r["labels"].__setitem__(0, None), "row 0: labels holds a null"),
        (lambda r: r["target_token_ids"].__setitem__(2, None), "row 0: target_token_ids holds a null"),
        (lambda r: r["target_token_ids"][2].__setitem__(0, None), "row 0: target_token_ids holds a null"),
        (lambda r: r["target_token_ids"][2].__setitem__(0, -3), r"an id outside .*\(id -3"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("saved", [False, True])
def test_columns_of_other_types_and_nulls_are_named(tmp_path, given, change, match, saved):
    source = table(tmp_path, edited(change, axolotl_row))
    if saved:
        datasets.Dataset(parquet.read_table(source)).save_to_disk(tmp_path / "saved")
        source = tmp_path / "saved"
    refused(source, tmp_path, "axolotl", given, match)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda r: r.update(compressed_logprobs=[bytes(v) for v in r["compressed_logprobs"]]), "compressed_logprobs to be .*, found list<.*binary"),
        (nested("bytepacked_indices", lambda v: v + 0.9), "bytepacked_indices to be .*, found .*double"),
        (lambda r: r["bytepacked_indices"].__setitem__(2, None), "bytepacked_indices holds a null"),
        (lambda r: r["bytepacked_indices"][2].__setitem__(0, None), "bytepacked_indices holds a null"),
        (lambda r: r["input_ids"].__setitem__(0, -5), "token id -5 in input_ids"),
        (lambda r: r.update(bytepacked_indices=3), "bytepacked_indices to be .*, found int64"),
    ],
)  # fmt: skip
def test_columns_of_distillkit_as_well(tmp_path, given, settings, change, match):
    refused(table(tmp_path, edited(change, lambda: distillkit_row(settings))), tmp_path, "distillkit", given, match)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("d: 8\nk: 4\nexact_k: 4\ndelta_encoding: false\nexact_dtype: [1]\n", "unknown terms or dtypes"),
        ("d: 8\nk: 4\nexact_k: 4\ndelta_encoding: false\nterm_dtype: {a: 1}\n", "unknown terms or dtypes"),
        ("[" * 5000, "is not YAML"),
        ("d: 2020-99-99", "is not YAML"),
        ("# " + "x" * (1 << 17), "expected a few lines"),
    ],
)
def test_settings_of_any_kind_are_one_error(tmp_path, given, settings, text, match):
    source = table(tmp_path, distillkit_row(settings))
    (tmp_path / distillkit.SETTINGS).write_text(text)
    refused(source, tmp_path, "distillkit", given, match)


def test_more_values_than_a_row_can_hold_are_not_unpacked(tmp_path, given, monkeypatch):
    """The figures in the file are looked at first; a row that hides among others is found before it becomes Python."""
    monkeypatch.setattr(columns, "_VALUES", 1000)
    monkeypatch.setattr(columns, "_MEAN", 10)
    row = edited(lambda r: r.update(input_ids=[0] * 2000), axolotl_row)
    source = table(tmp_path, axolotl_row(), row)
    with monkeypatch.context() as patch:
        patch.setattr(parquet.ParquetFile, "iter_batches", lambda *a, **k: pytest.fail("the file is unpacked"))
        refused(source, tmp_path, "axolotl", given, r"says that it holds 2,005 values of input_ids in 2 rows")
    monkeypatch.setattr(columns, "_MEAN", 10_000)
    refused(source, tmp_path, "axolotl", given, r"train\.parquet row 1: input_ids holds 2,000 values, more than 1,000")


def test_a_row_of_more_entries_than_16_bits_count_is_named(tmp_path, given):
    wide = edited(lambda v: v["rows"][1].update(ids=[1] * 65_536, logprobs=[-20] * 65_536))
    refused(lines(tmp_path, wide), tmp_path, "jsonl", given, "line 1: the row for token 4 has 65,536 entries")


def test_lines_have_a_bound_of_values_and_may_hold_text(tmp_path, given, monkeypatch):
    source = lines(tmp_path, '{"text": "caf\u00e9 \U0001f600", ' + json.dumps(plain_line())[1:])
    import_cache(source, tmp_path / "cache", "jsonl", given)
    shutil.rmtree(tmp_path / "cache")
    monkeypatch.setattr("kdcache.exchange.tables._LINE_VALUES", 20)
    refused(source, tmp_path, "jsonl", given, "line 1 holds more than 20 values")


@pytest.mark.parametrize("name", ["../ds/eval", "", "a b", "Train"])
def test_split_names_that_no_cache_can_have_are_told(tmp_path, given, monkeypatch, name):
    part = datasets.Dataset.from_list([axolotl_row()])
    part.save_to_disk(tmp_path / "ds")
    monkeypatch.setattr(datasets, "load_from_disk", lambda path: datasets.DatasetDict({"train": part, name: part}))
    refused(tmp_path / "ds", tmp_path, "axolotl", given, f"has a split '{name}'; expected")


def test_names_of_files_say_their_split_and_are_told(tmp_path, given):
    (tmp_path / "in").mkdir()
    for name in ("val", "data_0", "Dev-001", "test"):
        source = lines(tmp_path, *[plain_line()] * 2)
        source.rename(tmp_path / "in" / f"{name}.jsonl")
    made = import_cache(tmp_path / "in", tmp_path / "cache", "jsonl", given)
    assert {s.name: s.sequences for s in made.cache.manifest.splits} == {"train": 2, "validation": 4, "test": 2}
    assert made.notes[:3] == ["split train: data_0.jsonl", "split validation: Dev-001.jsonl, val.jsonl", "split test: test.jsonl"]  # fmt: skip


def other(line):
    line["rows"][0]["logprobs"] = [-3.0, -0.1]


def test_other_numbers_under_the_same_tokens_are_another_cache(tmp_path, given, monkeypatch):
    source = lines(tmp_path, *[plain_line()] * 4)
    given = Given(given.tokenizer, positions_per_shard=2)

    def stop(destination, plan, vocabulary, content_of, progress):
        def some(index):
            if index == 2:
                raise KeyboardInterrupt
            return content_of(index)

        return write_derived(destination, plan, vocabulary, some, progress)

    with monkeypatch.context() as patch:
        patch.setattr(importing, "write_derived", stop)
        with pytest.raises(KeyboardInterrupt):
            import_cache(source, tmp_path / "cache", "jsonl", given)
    lines(tmp_path, *[edited(other)] * 4)
    refused(source, tmp_path, "jsonl", given, "rows sha256", PlanMismatchError)
    lines(tmp_path, *[plain_line()] * 4)
    assert import_cache(source, tmp_path / "cache", "jsonl", given).cache.shards_made == 2
    lines(tmp_path, *[edited(lambda v: v["rows"][0].update(label=-0.7))] * 4)
    with pytest.raises(PlanMismatchError, match="rows sha256"):
        import_cache(source, tmp_path / "cache", "jsonl", given)


def test_data_that_change_between_the_two_readings_are_told(tmp_path, given, monkeypatch):
    source = lines(tmp_path, *[plain_line()] * 2)

    def meanwhile(*arguments):
        lines(tmp_path, plain_line(), edited(other))
        return write_derived(*arguments)

    monkeypatch.setattr(importing, "write_derived", meanwhile)
    refused(source, tmp_path, "jsonl", given, "line 2 is not what it was")


def changed_line(folder):
    path = folder / "train.jsonl"
    first, *others = path.read_text().splitlines()
    value = json.loads(first)
    value["rows"][0]["label"] -= 1.0
    path.write_text("\n".join([json.dumps(value), *others]) + "\n")


def test_only_the_exported_cache_is_called_so(shared_cache, tmp_path):
    export_cache(open_cache(shared_cache), tmp_path / "out", "jsonl")
    run = ["import-cache", str(tmp_path / "out"), "--from", "jsonl"]
    done = CliRunner().invoke(app, [*run, str(tmp_path / "same")])
    assert "note: the same cache as the one that was exported" in done.output
    changed_line(tmp_path / "out")
    done = CliRunner().invoke(app, [*run, str(tmp_path / "changed")])
    made, kept = open_cache(tmp_path / "changed").id, open_cache(shared_cache).id
    assert f"not the exported cache (id {made[:12]} against {kept[:12]})" in " ".join(done.output.split())
    assert "same cache" not in done.output
    assert "not the exported cache" in (tmp_path / "changed" / "README.md").read_text()
    (tmp_path / "out" / "cache.json").unlink()
    done = CliRunner().invoke(app, [*run, str(tmp_path / "unknown")])
    assert "cannot be seen" in done.output


def test_options_without_a_say_and_a_destination_that_is_the_source_are_refused(shared_cache, tmp_path, given):
    export_cache(open_cache(shared_cache), tmp_path / "out", "jsonl")
    for own in (Given(teacher="me"), Given(temperature=2.0), Given(holdout=3), Given(positions_per_shard=7)):
        refused(tmp_path / "out", tmp_path, "jsonl", own, "leave --teacher, --temperature, --holdout")
    before = {p.name for p in (tmp_path / "out").iterdir()}
    with pytest.raises(DataError, match="is what is to be imported"):
        import_cache(tmp_path / "out", tmp_path / "out" / ".." / "out", "jsonl", Given())
    assert {p.name for p in (tmp_path / "out").iterdir()} == before


def test_an_export_touches_nothing_beside_its_folder(shared_cache, tmp_path, monkeypatch):
    """Not even what has the name that a folder in the making might have."""
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.tex").write_text("years")
    cache = open_cache(shared_cache)
    export_cache(cache, tmp_path / "out", "jsonl")
    assert (tmp_path / "out.partial" / "thesis.tex").read_text() == "years"
    assert {p.name for p in tmp_path.iterdir()} == {"out", "out.partial"}
    (tmp_path / "here").mkdir(mode=0o755)
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "here").stat().st_mode
    monkeypatch.chdir(tmp_path / "here")
    export_cache(cache, type(tmp_path)("."), "jsonl")
    assert (tmp_path / "here" / "plan.json").exists()


def test_no_type_of_arrow_passes_by_accident():
    shape = columns.Shape(1, whole=True)
    for kind in (pa.large_list(pa.int8()), pa.list_(pa.uint64(), 3), pa.list_(pa.bool_())):
        assert columns.known_columns("x", pa.schema([("a", kind), ("b", pa.string())]), {"a": shape}) == ["a"]
    for kind in (pa.list_(pa.float16()), pa.list_(pa.list_(pa.int8())), pa.list_(pa.decimal128(5)), pa.map_(pa.int8(), pa.int8())):  # fmt: skip
        with pytest.raises(DataError, match="column a to be a list of whole numbers"):
            columns.known_columns("x", pa.schema([("a", kind)]), {"a": shape})
    with pytest.raises(DataError, match="column a twice"):
        columns.known_columns("x", pa.schema([("a", pa.list_(pa.int8()))] * 2), {"a": shape})
