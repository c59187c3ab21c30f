"""Data of strangers: every fault is one error that names the row, and no cache is left that could be trained from."""

import copy
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import yaml
from typer.testing import CliRunner

import kdcache.cli  # noqa: F401 - registers the commands
from kdcache.cache.reader import open_cache
from kdcache.cache.rows import RowDesign
from kdcache.commands.app import app
from kdcache.errors import DataError, IncompleteCacheError, KdcacheError, TokenizerError
from kdcache.exchange import distillkit
from kdcache.exchange.exporting import export_cache
from kdcache.exchange.imported_plan import Given
from kdcache.exchange.importing import import_cache
from kdcache.exchange.plain import PlainSequence
from kdcache.exchange.settle import Tally, settled

LOG = np.log


def plain_line():
    """A sequence of five tokens, of which the last two are learnt."""
    return {
        "input_ids": [5, 6, 7, 8, 9],
        "targets": [3, 4],
        "rows": [
            {"ids": [8, 3], "logprobs": [float(LOG(0.5)), float(LOG(0.25))]},
            {"ids": [4, 9, 2], "logprobs": [float(LOG(0.6)), float(LOG(0.3)), float(LOG(0.05))]},
        ],
    }


def axolotl_row():
    """The same in axolotl's columns."""
    row = {"input_ids": [5, 6, 7, 8, 9], "attention_mask": [1] * 5, "labels": [-100, -100, -100, 8, 9]}
    none, entries = ([-1e9], [0], [0]), plain_line()["rows"]
    rows = [none, none, *((r["logprobs"], r["ids"], [1] * len(r["ids"])) for r in entries), none]
    for name, column in zip(
        ("target_logprobs", "target_token_ids", "target_mask"), zip(*rows, strict=True), strict=True
    ):
        row[name] = [list(values) for values in column]
    return row


def distillkit_row(settings):
    """The same in DistillKit's."""
    ids = np.zeros((5, settings.k), dtype=np.int64)
    values = np.full((5, settings.k), -1e4, dtype="<f4")
    for place, row in zip((2, 3), plain_line()["rows"], strict=True):
        ids[place, : len(row["ids"])], values[place, : len(row["ids"])] = row["ids"], row["logprobs"]
    return {
        "input_ids": [5, 6, 7, 8, 9], "labels": [-100, -100, -100, 8, 9],
        "compressed_logprobs": values.view(np.uint8).tolist(), "bytepacked_indices": distillkit.packed_ids(ids, settings.id_bits).tolist(),
    }  # fmt: skip


@pytest.fixture
def given(models):
    return Given(tokenizer=str(models / "teacher"))


@pytest.fixture
def vocabulary(shared_cache):
    return open_cache(shared_cache).vocab_size


def lines(tmp_path, *values):
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(v if isinstance(v, str) else json.dumps(v) for v in values))
    return path


def table(tmp_path, *rows):
    path = tmp_path / "train.parquet"
    parquet.write_table(pa.Table.from_pylist(list(rows)), path)
    return path


def refused(source, tmp_path, kind, given, match, error=DataError):
    with pytest.raises(error, match=match):
        import_cache(source, tmp_path / "cache", kind, given)
    assert not (tmp_path / "cache" / "manifest.json").exists()


@pytest.mark.parametrize("kind", ["jsonl", "axolotl", "distillkit"])
def test_the_three_formats_of_one_sequence_make_one_cache(tmp_path, given, vocabulary, kind):
    settings = distillkit.Settings(d=vocabulary, k=4, exact_k=4)
    (tmp_path / distillkit.SETTINGS).write_bytes(settings.as_yaml())
    source = {
        "jsonl": lambda: lines(tmp_path, plain_line()),
        "axolotl": lambda: table(tmp_path, axolotl_row()),
        "distillkit": lambda: table(tmp_path, distillkit_row(settings)),
    }[kind]()
    made = import_cache(source, tmp_path / "cache", kind, given)
    [sequence] = open_cache(tmp_path / "cache")["train"]
    rows = sequence.rows
    assert sequence.token_ids.tolist() == [5, 6, 7, 8, 9]
    assert sequence.targets.tolist() == [False, False, False, True, True]
    assert rows.head_ids.tolist() == [3, 8, 2, 4, 9]
    assert rows.head_logits == pytest.approx([LOG(0.5), 0, LOG(0.05 / 0.6), 0, LOG(0.5)], abs=2e-3)
    assert rows.rest[:, 0] == pytest.approx([LOG(0.25 / 0.75), LOG(0.05 / 0.95)], abs=2e-3)
    # Token 8 with 0.5, token 9 with 0.3: both among the entries.
    assert rows.label_log_prob == pytest.approx([LOG(0.5), LOG(0.3)], abs=1e-3)
    assert not any("guess" in note for note in made.notes)


def edited(change, of=plain_line):
    value = copy.deepcopy(of())
    change(value)
    return value


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda v: v["rows"][1]["ids"].__setitem__(0, 10**6), "row for token 4 has an id outside the tokenizer's"),
        (lambda v: v["rows"][1]["ids"].__setitem__(0, -1), "outside the tokenizer's"),
        (lambda v: v["rows"][0]["ids"].__setitem__(0, 3), "id 3 is twice in a row"),
        (lambda v: v["rows"][0]["logprobs"].__setitem__(0, 0.7), "a log-probability above 0"),
        (lambda v: v["rows"][0]["logprobs"].__setitem__(1, -0.1), r"row for token 3 add up to 1\.4"),
        (lambda v: v["rows"][0]["logprobs"].pop(), "row 0 has 2 ids and 1 logprobs"),
        (lambda v: v["rows"][0].pop("logprobs"), "row 0 has no logprobs"),
        (lambda v: v["rows"][0].update(ids=["8", "3"]), "ids should be a list of whole numbers"),
        (lambda v: v["rows"][0].update(ids=[8.0, 3.0]), "ids should be a list of whole numbers"),
        (lambda v: v["rows"][0].update(ids=[True, False]), "ids should be a list of whole numbers"),
        (lambda v: v["rows"][0].update(ids=[8, 10**12]), "beyond 32 bits"),
        (lambda v: v["rows"][0].update(logprobs=[-1, -1e40]), "beyond single precision"),
        (lambda v: v["rows"][0].update(label=5.0), "label of token 3 is 5, a log-probability above 0"),
        (lambda v: v["rows"][0].update(label=-9.0), r"label of token 3 is -9, and the entry of the same token -0\.69"),
        (lambda v: v["rows"][1].update(label=-1.5), r"label of token 4 is -1\.5, and the entry of the same token -1\.2"),
        (lambda v: v["rows"].pop(), "2 targets and 1 rows"),
        (lambda v: v.update(rows=[1, 2]), "expected rows, a list of one object per target"),
        (lambda v: v.update(targets=[4, 3]), "targets should rise"),
        (lambda v: v.update(targets=[0, 3]), "targets should rise, from 1"),
        (lambda v: v.update(targets=[3, 5]), "targets should rise"),
        (lambda v: v.update(input_ids=[5]), "two token ids at least"),
        (lambda v: v.update(input_ids=[5, 6, 7, 8, -1]), "none below 0"),
        (lambda v: v.update(input_ids=[5, 6, 7, 8, 10**6]), "token id 1000000, and the tokenizer has"),
        (lambda v: v.pop("input_ids"), "input_ids should be"),
    ],
)  # fmt: skip
def test_bad_lines_are_named(tmp_path, given, change, match):
    refused(lines(tmp_path, plain_line(), edited(change)), tmp_path, "jsonl", given, rf"train\.jsonl line 2: .*{match}")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ('{"input_ids": [1, 2', "line 1 is not acceptable JSON"),
        ("[1, 2]", "line 1: expected one JSON object"),
        ('{"rows": [{"logprobs": [NaN]}]}', "NaN is not a number"),
        ('{"rows": [{"logprobs": [-Infinity]}]}', "-Infinity is not a number"),
        ("[" * 100_000, "line 1 is not acceptable JSON"),
        ("\xff", "line 1 is not acceptable JSON: it is no UTF-8"),
        ('{"input_ids": [1' + "0" * 30 + "]}", "line 1 is not acceptable JSON: an integer is too large"),
        ('{"input_ids": [1], "input_ids": [2]}', "an object has a key twice"),
    ],
)
def test_what_is_no_json_is_named(tmp_path, given, text, match):
    path = tmp_path / "train.jsonl"
    path.write_bytes(text.encode("latin-1"))
    refused(path, tmp_path, "jsonl", given, match)


def shifted(row):
    row["labels"] = [*row["labels"][1:], -100]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda r: r.pop("target_mask"), "lacks target_mask"),
        (shifted, r"labels\[2\] is 8 and input_ids\[2\] 7; labels are the tokens themselves"),
        (lambda r: r.update(attention_mask=[0, 1, 1, 1, 1]), "attention_mask of ones, then of zeros"),
        (lambda r: r.update(attention_mask=[1] * 4), "expected 5 whole numbers in attention_mask"),
        (lambda r: r.update(labels=[-100] * 6), "expected 5 whole numbers in labels"),
        (lambda r: r["target_mask"].pop(), "expected 5 rows in"),
        (lambda r: r["target_token_ids"][2].pop(), "row 2 has log-probabilities, ids and mask of different lengths"),
        (lambda r: r["target_mask"][2].__setitem__(0, 2), "mask of row 2 should be of 0 and 1"),
        (lambda r: r["target_logprobs"][2].__setitem__(0, float("-inf")), "not finite"),
        (lambda r: r["target_logprobs"][2].__setitem__(0, float("nan")), "not finite"),
        (lambda r: r["target_logprobs"][2].__setitem__(1, -0.01), "add up to"),
        (lambda r: r["target_token_ids"][3].__setitem__(2, 9), "id 9 is twice in a row"),
        (lambda r: r["input_ids"].__setitem__(0, 2**40), "beyond 32 bits"),
    ],
)  # fmt: skip
def test_bad_rows_of_axolotl_are_named(tmp_path, given, change, match):
    bad = edited(change, axolotl_row)
    refused(table(tmp_path, axolotl_row(), bad), tmp_path, "axolotl", given, rf"train\.parquet row 1.*{match}")


def test_padding_of_axolotl_is_taken_off_and_unmasked_tokens_are_no_targets(tmp_path, given):
    row = axolotl_row()
    for name, value in (("input_ids", 0), ("attention_mask", 0), ("labels", -100)):
        row[name] = row[name] + [value] * 2
    for name, value in (("target_logprobs", [-1e9]), ("target_token_ids", [0]), ("target_mask", [0])):
        row[name] = row[name] + [value] * 2
    row["target_mask"][2] = [0, 0]
    untaught = edited(lambda r: r.update(target_mask=[[0] * len(m) for m in r["target_mask"]]), axolotl_row)
    made = import_cache(table(tmp_path, row, untaught), tmp_path / "cache", "axolotl", given)
    [sequence] = open_cache(tmp_path / "cache")["train"]
    assert sequence.token_ids.tolist() == [5, 6, 7, 8, 9]
    assert np.flatnonzero(sequence.targets).tolist() == [4]
    assert any("3 learnt tokens have no row" in note for note in made.notes)
    assert any("1 of 2 sequences have no target left" in note for note in made.notes)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda s: s.pop("delta_encoding"), "which is on where it is left out"),
        (lambda s: s.update(delta_encoding=True), "delta_encoding"),
        (lambda s: s.update(residual_bins=[{"scale_dtype": "float16", "element_bits": 4, "num_elements": 2}]), "residual_bins"),
        (lambda s: s.update(k="four"), "no whole numbers"),
        (lambda s: s.update(k=0), "expected 2 <= d"),
        (lambda s: s.update(exact_k=2), "polynomial_terms where exact_k < k"),
        (lambda s: s.update(exact_dtype="int8"), "unknown terms or dtypes"),
        (lambda s: s.update(polynomial_terms=["log"]), "unknown terms or dtypes"),
        (lambda s: s.update(k=5, exact_k=5), "makes rows of 20 bytes in compressed_logprobs, found 16"),
        (lambda s: s.update(d=1 << 18), "makes rows of 9 bytes in bytepacked_indices, found 5"),
        (lambda s: s.update(exact_dtype="float16", exact_k=4), "makes rows of 8 bytes"),
    ],
)  # fmt: skip
def test_settings_that_are_not_the_datas_are_told(tmp_path, given, vocabulary, change, match):
    settings = distillkit.Settings(d=vocabulary, k=4, exact_k=4)
    values = yaml.safe_load(settings.as_yaml())
    change(values)
    (tmp_path / distillkit.SETTINGS).write_text(yaml.safe_dump(values))
    refused(table(tmp_path, distillkit_row(settings)), tmp_path, "distillkit", given, match)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda r: r["compressed_logprobs"].__setitem__(2, np.array([-3, -1, -4, -5], dtype="<f4").view(np.uint8).tolist()), "numbers that fall"),
        (lambda r: r["compressed_logprobs"].__setitem__(2, np.array([np.nan] * 4, dtype="<f4").view(np.uint8).tolist()), "numbers that fall"),
        (lambda r: r["compressed_logprobs"].__setitem__(2, np.array([0, 0, -1e4, -1e4], dtype="<f4").view(np.uint8).tolist()), "add up to 2.0"),
        (lambda r: r["bytepacked_indices"].__setitem__(2, [255] * 5), "an id outside|twice in a row"),
        (lambda r: r.update(compressed_logprobs=r["compressed_logprobs"][:3]), "expected 5 rows in compressed_logprobs"),
        (lambda r: r["compressed_logprobs"][2].__setitem__(0, 256), "should hold bytes"),
        (lambda r: r.update(labels=[8, 9, -100, -100, -100]), "labels are the tokens themselves"),
    ],
)  # fmt: skip
def test_bad_rows_of_distillkit_are_named(tmp_path, given, vocabulary, change, match):
    settings = distillkit.Settings(d=vocabulary, k=4, exact_k=4)
    (tmp_path / distillkit.SETTINGS).write_bytes(settings.as_yaml())
    bad = edited(change, lambda: distillkit_row(settings))
    refused(
        table(tmp_path, distillkit_row(settings), bad),
        tmp_path,
        "distillkit",
        given,
        rf"train\.parquet row 1.*({match})",
    )


def test_data_of_distillkits_sampler_have_no_labels_and_a_row_less(tmp_path, given, vocabulary):
    settings = distillkit.Settings(d=vocabulary, k=4, exact_k=4)
    (tmp_path / distillkit.SETTINGS).write_bytes(settings.as_yaml())
    row = distillkit_row(settings)
    del row["labels"]
    # A row for every token but the last, which is none to be predicted from.
    row["compressed_logprobs"] = [row["compressed_logprobs"][2]] * 4
    row["bytepacked_indices"] = [row["bytepacked_indices"][2]] * 4
    parquet.write_table(pa.Table.from_pylist([row]), tmp_path / "data_0.parquet")
    import_cache(tmp_path, tmp_path / "cache", "distillkit", given)
    [sequence] = open_cache(tmp_path / "cache")["train"]
    assert sequence.targets.tolist() == [False, True, True, True, True]
    assert sequence.rows.head.tolist() == [2] * 4


def dense(row, vocabulary):
    """A row as probabilities over the whole vocabulary, the rest shared evenly by what is not in it."""
    p = np.full(vocabulary, (1 - np.exp(row[1]).sum()) / (vocabulary - len(row[0])))
    p[row[0]] = np.exp(row[1])
    return p


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
def test_the_labels_guess_is_the_documented_one(temperature):
    vocabulary, tally = 50, Tally()
    ids, log_probs = np.array([7, 1, 30]), np.log([0.5, 0.2, 0.1])
    sequence = PlainSequence(
        np.array([3, 30, 31], dtype=np.uint32),
        np.array([False, True, True]),
        np.array([3, 3]),
        np.tile(ids, 2),
        np.tile(log_probs, 2),
    )
    design = RowDesign((temperature,), vocabulary)
    made = settled(sequence, "here", design=design, approximated=False, tally=tally)
    p = dense((ids, log_probs), vocabulary) ** temperature
    p /= p.sum()
    assert made.rows.label_log_prob == pytest.approx(np.log(p[[30, 31]]), abs=1e-5)
    # Only what is among the entries at T = 1 is known.
    assert tally.guessed == (1 if temperature == 1.0 else 2)
    # At T = 1 it is the entry's own number, of which rounding leaves so much.
    own = np.float32(np.log(0.1) - 0.01 if temperature == 1.0 else -1.5)
    given = PlainSequence(**{**vars(sequence), "label_log_probs": np.array([own, np.nan])})
    assert settled(given, "here", design=design, approximated=False, tally=Tally()).rows.label_log_prob[0] == own


def test_a_row_that_holds_next_to_nothing_overflows_nowhere():
    design = RowDesign((1.0,), 50)
    sequence = PlainSequence(
        np.array([3, 7], dtype=np.uint32), np.array([False, True]), np.array([1]), np.array([1]), np.array([-2000.0])
    )
    made = settled(sequence, "here", design=design, approximated=False, tally=Tally())
    # The label is any of the 49 other tokens, or, as guesses are never above an entry, as improbable as that.
    assert made.rows.label_log_prob.tolist() == [-2000.0]
    assert made.rows.rest.tolist() == [[32.0]]


def test_approximations_that_add_up_to_more_than_one_are_scaled_and_told():
    tally, design = Tally(), RowDesign((1.0,), 50)
    sequence = PlainSequence(
        np.array([3, 7], dtype=np.uint32), np.array([False, True]), np.array([2]), np.array([7, 1]), np.log([0.9, 0.2])
    )
    with pytest.raises(DataError, match=r"add up to 1\.1"):
        settled(sequence, "here", design=design, approximated=False, tally=Tally())
    made = settled(sequence, "here", design=design, approximated=True, tally=tally)
    assert tally.scaled == 1
    assert made.rows.kept_mass()[0, 0] == pytest.approx(1, abs=1e-9)
    assert any("scaled down" in line for line in tally.lines(1.0))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda d: (d / "plan.json").write_text("{"), "plan.json is not acceptable JSON"),
        (lambda d: (d / "vocabulary.json").write_text('["a"]'), "not the vocabulary that plan.json names"),
        (lambda d: (d / "vocabulary.json").unlink(), "vocabulary.json cannot be read"),
        (lambda d: (d / "validation.jsonl").unlink(), "has no validation.jsonl"),
        (lambda d: cut(d, lambda lines: lines[:-1]), "train holds 47 sequences"),
        (lambda d: cut(d, lambda lines: [*lines, lines[0]]), "longer than its plan"),
        (lambda d: cut(d, lambda lines: [lines[1], lines[0], *lines[2:]]), "missing, added or changed"),
        (lambda d: first_row(d, lambda r: r["logits"].__setitem__(0, 1.0)), "are at most 0"),
        (lambda d: first_row(d, lambda r: r["ids"].__setitem__(0, 10**7)), "outside the vocabulary"),
        (lambda d: first_row(d, lambda r: r["logits"].__setitem__(slice(None), [-1.0] * len(r["logits"]))), "largest of a row's logits is 0"),
        (lambda d: first_row(d, lambda r: r["ids"].__setitem__(0, r["tail_ids"][0])), "train.jsonl line 1 .*no cache may hold: invariant 7"),
        (lambda d: first_row(d, lambda r: [r.pop(n) for n in [*r] if n not in ("rest", "label")]), "train.jsonl line 1 .*invariant 5"),
        (lambda d: (d / "cache.json").write_text("[]"), "cache.json is not a JSON object"),
        (lambda d: first_row(d, lambda r: r["ids"].append(1)), "row 0 has .* ids and .* logits"),
        (lambda d: first_row(d, lambda r: r.update(rest=[0.0])), "should have 2 numbers in rest"),
        (lambda d: first_row(d, lambda r: r.update(rest=[99.0, 99.0])), ""),
        (lambda d: first_row(d, lambda r: r.update(label=None)), "label should be numbers"),
        (lambda d: first_row(d, lambda r: r.update(logprobs=[0.0])), "of the plain kind"),
    ],
)  # fmt: skip
def test_a_changed_export_of_our_own_is_refused(shared_cache, tmp_path, change, match):
    export_cache(open_cache(shared_cache), tmp_path / "out", "jsonl")
    change(tmp_path / "out")
    if not match:  # a mass that the format clips is not a fault
        import_cache(tmp_path / "out", tmp_path / "cache", "jsonl", Given())
        return
    with pytest.raises(KdcacheError, match=match):
        import_cache(tmp_path / "out", tmp_path / "cache", "jsonl", Given())
    with pytest.raises((IncompleteCacheError, KdcacheError)):
        open_cache(tmp_path / "cache")


def cut(folder, change):
    path = folder / "train.jsonl"
    path.write_text("\n".join(change(path.read_text().splitlines())) + "\n")


def first_row(folder, change):
    def edit(lines):
        value = json.loads(lines[0])
        change(value["rows"][0])
        return [json.dumps(value), *lines[1:]]

    cut(folder, edit)


def test_what_is_missing_is_told_in_one_line(tmp_path, given, models, shared_cache):
    refused(tmp_path / "absent", tmp_path, "axolotl", given, "is not there")
    refused(lines(tmp_path, plain_line()), tmp_path, "jsonl", Given(), "say with --tokenizer")
    refused(
        lines(tmp_path, plain_line()), tmp_path, "jsonl", Given(tokenizer=str(tmp_path)), "tokenizer", TokenizerError
    )
    refused(lines(tmp_path, plain_line()), tmp_path, "axolotl", Given(), "no Parquet file")
    refused(table(tmp_path, axolotl_row()), tmp_path, "distillkit", given, "compression_config.yaml cannot be read")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", tmp_path, "jsonl", given, r"no folder of them \(\*\.jsonl\)")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no more")
    refused(tmp_path / "broken.parquet", tmp_path, "axolotl", given, "cannot be read as Parquet")
    nothing = edited(lambda v: v.update(targets=[], rows=[]))
    refused(lines(tmp_path, nothing), tmp_path, "jsonl", given, "without a single row to learn from")
    refused(
        lines(tmp_path, plain_line()),
        tmp_path,
        "jsonl",
        Given(given.tokenizer, temperature=0.0),
        "--temperature 0 lies outside",
        KdcacheError,
    )
    export_cache(open_cache(shared_cache), tmp_path / "out", "jsonl")
    shutil.copytree(models / "teacher", tmp_path / "other")
    state = json.loads((tmp_path / "other" / "tokenizer.json").read_text())
    state["added_tokens"].append({**state["added_tokens"][0], "id": 5000, "content": "<more>"})
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(state))
    refused(tmp_path / "out", tmp_path, "jsonl", Given(tokenizer=str(tmp_path / "other")), "has other tokens than")
    done = CliRunner().invoke(app, ["import-cache", str(tmp_path), str(tmp_path / "cache"), "--from", "csv"])
    assert isinstance(done.exception, DataError)
    assert "expected --from axolotl, distillkit or jsonl, found csv" in str(done.exception)
