"""Caches to other formats and back: what is promised is equal, what is lost is bounded and told."""

import json
import shutil

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch
import yaml
from typer.testing import CliRunner

import kdcache.cli  # noqa: F401 - registers the commands
from kdcache.cache.derive import write_derived
from kdcache.cache.reader import open_cache
from kdcache.cache.verify import verify
from kdcache.commands.app import app
from kdcache.errors import CacheError, DataError, PlanMismatchError, StorageError
from kdcache.exchange import distillkit, importing
from kdcache.exchange.axolotl import COLUMNS, IGNORED
from kdcache.exchange.exporting import Options, export_cache
from kdcache.exchange.imported_plan import Given
from kdcache.exchange.importing import import_cache
from kdcache.recipe import parse_recipe
from kdcache.student.collate import sparse_teacher
from kdcache.student.distill import distill
from kdcache.student.loss import distillation_loss
from tests.cache.samples import SELECTIONS, method_caches
from tests.told import Told

D = 16


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    return method_caches(tmp_path_factory.mktemp("caches"))


@pytest.fixture
def tokenizer(models):
    return str(models / "teacher")


@pytest.mark.parametrize("method", [*SELECTIONS, "thinned"])
def test_json_lines_hold_all_of_a_cache(caches, tmp_path, method):
    made = export_cache(caches[method], tmp_path / "out", "jsonl")
    assert made.notes == []
    again = import_cache(tmp_path / "out", tmp_path / "cache", "jsonl", Given())
    # The cache id is the hash of a manifest that names the hash of every shard.
    assert again.cache.manifest.cache_id == caches[method].id
    assert again.notes == []
    assert verify(tmp_path / "cache") == []
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "README.md", "plan.json", "cache.json", "vocabulary.json", "train.jsonl", "validation.jsonl",
    }  # fmt: skip


def test_json_lines_are_what_the_document_says(caches, tmp_path):
    cache = caches["threshold_sampling"]
    export_cache(cache, tmp_path / "out", "jsonl")
    lines = [json.loads(line) for line in (tmp_path / "out" / "train.jsonl").read_text().splitlines()]
    assert len(lines) == len(cache.split("train"))
    for line, sequence in zip(lines, cache.split("train"), strict=True):
        assert line["input_ids"] == sequence.token_ids.tolist()
        assert line["targets"] == np.flatnonzero(sequence.targets).tolist()
        teacher = sparse_teacher(sequence.rows, 2.0, "lumped")
        for number, row in enumerate(line["rows"]):
            logits = np.array(row["logits"]) / 2.0
            # log p(v) = logits / T - log sum_head exp(logits / T) - log(1 + exp(rest))
            log_z = np.log(np.exp(logits).sum()) + np.log1p(np.exp(row["rest"][cache.temperatures.index(2.0)]))
            expected = teacher.log_probs_NK[number, : len(logits)].numpy()
            assert logits - log_z == pytest.approx(expected, abs=1e-5)
            assert row["label"] == pytest.approx(float(sequence.rows.label_log_prob[number]))


def student(length, vocab, seed):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(length, D, generator=g), torch.randn(vocab, D, generator=g)


def collated(rows):
    """Batches as axolotl's collator pads them (commit 0399aefc): to the widest row, with -1e9, id 0 and mask 0."""
    width = max(len(r) for row in rows for r in row["target_logprobs"])
    length = max(len(row["input_ids"]) for row in rows)
    shape = (len(rows), length, width)
    log_probs, ids, mask = (
        torch.full(shape, -1e9),
        torch.zeros(shape, dtype=torch.long),
        torch.zeros(shape, dtype=torch.int),
    )
    for n, row in enumerate(rows):
        assert (
            len(row["target_logprobs"])
            == len(row["target_token_ids"])
            == len(row["target_mask"])
            == len(row["input_ids"])
        )
        for i, (a, b, c) in enumerate(
            zip(row["target_logprobs"], row["target_token_ids"], row["target_mask"], strict=True)
        ):
            assert len(a) == len(b) == len(c) > 0
            log_probs[n, i, : len(a)], ids[n, i, : len(a)], mask[n, i, : len(a)] = map(torch.tensor, (a, b, c))
    return log_probs, ids, mask


@pytest.mark.parametrize(
    ("method", "temperature"), [("top_k", 1.0), ("top_k", 2.0), ("threshold_sampling", 2.0), ("thinned", 1.5)]
)
def test_axolotls_loss_on_the_exported_columns_is_our_renormalised_one(caches, tmp_path, method, temperature):
    cache = caches[method]
    export_cache(cache, tmp_path / "out", "axolotl", Options(temperature=temperature))
    table = parquet.read_table(tmp_path / "out" / "train.parquet")
    assert tuple(table.column_names) == COLUMNS
    rows = table.to_pylist()
    log_probs, ids, mask = collated(rows)
    for n, (row, sequence) in enumerate(zip(rows, cache.split("train"), strict=True)):
        length, tokens = len(row["input_ids"]), sequence.token_ids.astype(int)
        assert row["input_ids"] == tokens.tolist()
        assert row["attention_mask"] == [1] * length
        assert row["labels"] == np.where(sequence.targets, tokens, IGNORED).tolist()
        hidden, head = student(length, cache.vocab_size, n)
        # Row i against the logits at i, as axolotl's kernel has it (commit 00bfeb42), without normalising the student's.
        log_q = (hidden.double() @ head.double().T / temperature).log_softmax(-1)
        valid = mask[n, :length].bool()
        p = log_probs[n, :length].double()[valid]
        found = (p.exp() * (p - log_q.gather(1, ids[n, :length])[valid])).sum() * temperature**2
        places = np.flatnonzero(sequence.targets)
        truth = distillation_loss(
            hidden[places - 1], head, torch.from_numpy(tokens[places]), sparse_teacher(sequence.rows, temperature, "renormalised"),
            temperature=temperature, ce_weight=0.0, kd_weight=1.0,
        )  # fmt: skip
        assert float(found) == pytest.approx(float(truth.total), rel=2e-5, abs=1e-5)
        # A row is where a label is learnt, one position earlier, and nowhere else.
        kept = places[sequence.rows.kept] - 1
        assert np.flatnonzero(valid.any(dim=1).numpy()).tolist() == kept.tolist()


def test_the_largest_entries_alone_and_the_mass_as_it_is(caches, tmp_path):
    cache = caches["top_k"]
    cut = export_cache(cache, tmp_path / "cut", "axolotl", Options(k=2))
    assert any("beyond --k" in note for note in cut.notes)
    for row in parquet.read_table(tmp_path / "cut" / "train.parquet").to_pylist():
        for values, mask in zip(row["target_logprobs"], row["target_mask"], strict=True):
            if any(mask):
                assert len(values) == 2
                assert values == sorted(values, reverse=True)
                assert sum(np.exp(values)) == pytest.approx(1, abs=1e-6)
    export_cache(cache, tmp_path / "mass", "axolotl", Options(keep_mass=True))
    [*rows] = parquet.read_table(tmp_path / "mass" / "validation.parquet").to_pylist()
    for row, sequence in zip(rows, cache.split("validation"), strict=True):
        sums = [sum(np.exp(v)) for v, m in zip(row["target_logprobs"], row["target_mask"], strict=True) if any(m)]
        assert sums == pytest.approx(sequence.rows.kept_mass()[:, 0].tolist(), abs=1e-5)
    assert "kd_normalize_topk: false" in (tmp_path / "mass" / "README.md").read_text()


@pytest.fixture(scope="module")
def real(base_values, shared_cache):
    """The embedded cache, whose tokenizer is at hand."""
    return open_cache(shared_cache)


def pairs(a, b):
    for name in a:
        assert len(a[name]) == len(b[name])
        yield from zip(a[name], b[name], strict=True)


@pytest.mark.parametrize(("kind", "options"), [("axolotl", Options(keep_mass=True)), ("distillkit", Options())])
def test_a_round_trip_keeps_exact_entries_and_mass(real, tokenizer, tmp_path, kind, options):
    export_cache(real, tmp_path / "out", kind, options)
    made = import_cache(tmp_path / "out", tmp_path / "cache", kind, Given(tokenizer=tokenizer, teacher="somebody's"))
    back = open_cache(tmp_path / "cache")
    assert verify(tmp_path / "cache") == []
    assert back.temperatures == (1.0,)
    column = real.temperatures.index(1.0)
    for mine, theirs in pairs(real, back):
        assert mine.token_ids.tolist() == theirs.token_ids.tolist()
        assert mine.targets.tolist() == theirs.targets.tolist()
        rows, found = mine.rows, theirs.rows
        assert rows.head.tolist() == found.head.tolist()
        assert rows.head_ids.tolist() == found.head_ids.tolist()
        # Steps of 1/16 are exact in half precision up to 128 below the largest.
        near = rows.head_logits > -128
        assert found.head_logits[near] == pytest.approx(rows.head_logits[near], abs=1e-6)
        # Where next to nothing is left outside, single precision says none.
        some = rows.rest[:, column] > -12
        assert found.rest[some, 0] == pytest.approx(rows.rest[some, column], abs=0.02)
        labels = mine.token_ids[mine.targets]
        owner = np.repeat(np.arange(len(rows)), rows.head)
        among = np.unique(owner[rows.head_ids == labels[owner]])
        assert found.label_log_prob[among] == pytest.approx(rows.label_log_prob[among], abs=0.05)
    card = (tmp_path / "cache" / "README.md").read_text()
    assert "## Imported" in card
    assert all(note in card for note in made.notes)
    assert any("known by the name somebody's alone" in note for note in made.notes)
    # The same again changes nothing; another source is refused.
    assert (
        import_cache(
            tmp_path / "out", tmp_path / "cache", kind, Given(tokenizer=tokenizer, teacher="somebody's")
        ).cache.shards_made
        == 0
    )
    with pytest.raises(PlanMismatchError, match="teacher"):
        import_cache(tmp_path / "out", tmp_path / "cache", kind, Given(tokenizer=tokenizer, teacher="another"))


def test_rows_scaled_to_one_come_back_with_nothing_outside_and_it_is_told(real, tokenizer, tmp_path):
    export_cache(real, tmp_path / "out", "axolotl")
    made = import_cache(tmp_path / "out", tmp_path / "cache", "axolotl", Given(tokenizer=tokenizer))
    total = sum(s.positions for s in made.cache.manifest.splits)
    assert any(note.startswith(f"{total:,} rows add up to one") for note in made.notes)
    for mine, theirs in pairs(real, open_cache(tmp_path / "cache")):
        # What is left is the conditional distribution over the entries.
        expected = sparse_teacher(mine.rows, 1.0, "renormalised")
        found = sparse_teacher(theirs.rows, 1.0)
        for a, b, c in zip(expected.log_probs_NK, found.log_probs_NK, mine.rows.head, strict=True):
            assert a[:c].numpy() == pytest.approx(b[:c].numpy(), abs=2e-3)
        assert (found.log_tail_N.exp() < 1e-12).all()


def test_distillkits_bytes_are_the_top_entries_as_its_own_code_unpacks_them(real, tmp_path):
    made = export_cache(real, tmp_path / "out", "distillkit")
    settings = yaml.safe_load((tmp_path / "out" / "compression_config.yaml").read_text())
    # The fields of its settings (commit 897bd134); left out, delta_encoding would be on.
    assert settings == {
        "d": real.vocab_size, "k": settings["k"], "exact_k": settings["k"], "exact_dtype": "float32", "polynomial_terms": None,
        "term_dtype": "float32", "residual_bins": [], "delta_encoding": False, "error_diffusion": False, "normalize_t": False,
    }  # fmt: skip
    table = parquet.read_table(tmp_path / "out" / "validation.parquet")
    kinds = {f.name: str(f.type) for f in table.schema}
    assert "uint64" in kinds["input_ids"]
    assert "uint8" in kinds["compressed_logprobs"]
    bits = int(torch.log2(torch.tensor(settings["d"], dtype=torch.float32)).ceil())
    lengths = set()
    for row, sequence in zip(table.to_pylist(), real.split("validation"), strict=True):
        lengths.add(len(row["input_ids"]))
        assert (
            len(row["compressed_logprobs"])
            == len(row["bytepacked_indices"])
            == len(row["labels"])
            == len(row["input_ids"])
        )
        places = np.flatnonzero(sequence.targets)
        teacher = sparse_teacher(sequence.rows, 1.0, "lumped")
        for number, place in enumerate(places):
            values = np.frombuffer(bytes(row["compressed_logprobs"][place - 1]), dtype="<f4")
            text = "".join(f"{byte:08b}" for byte in row["bytepacked_indices"][place - 1])
            ids = [int(text[i * bits : (i + 1) * bits], 2) for i in range(settings["k"])]
            count = int(sequence.rows.head[number])
            wanted = dict(
                zip(teacher.ids_NK[number, :count].tolist(), teacher.log_probs_NK[number, :count].tolist(), strict=True)
            )
            assert {i: v for i, v in zip(ids, values, strict=True) if v > -100} == pytest.approx(wanted, abs=1e-5)
            assert (np.diff(values) <= 0).all()
        # A position without a row says what comes next, with certainty.
        first = np.frombuffer(bytes(row["compressed_logprobs"][0]), dtype="<f4")
        assert first[0] == 0
        assert (first[1:] < -1000).all()
    assert len(lengths) == 1
    assert any("labels[i + 1]" in note for note in made.notes)


@pytest.mark.parametrize("bits", [1, 7, 10, 17])
def test_ids_of_any_width_are_packed_and_unpacked(bits):
    ids = np.random.default_rng(bits).integers(0, 1 << bits, (5, 9))
    packed = distillkit.packed_ids(ids, bits)
    assert packed.shape == (5, -(-9 * bits // 8))
    text = "".join(f"{byte:08b}" for byte in packed[0])
    assert [int(text[i * bits : (i + 1) * bits], 2) for i in range(9)] == ids[0].tolist()
    assert (distillkit.unpacked_ids(packed, bits, 9) == ids).all()


def test_approximated_rows_of_distillkit_are_rebuilt():
    """As its README recommends: some exact values in bfloat16, the others a polynomial with a root in their rank."""
    settings = distillkit.parse_settings(
        yaml.safe_dump({
            "d": 1000, "k": 12, "exact_k": 4, "exact_dtype": "bfloat16", "polynomial_terms": [0, 1, "sqrt"], "term_dtype": "float32",
            "residual_bins": [], "delta_encoding": False, "error_diffusion": False,
        }).encode(), "file",
    )  # fmt: skip
    exact = torch.tensor([[-0.5, -1.25, -3.0, -4.0]], dtype=torch.bfloat16)
    terms = np.array([[-4.5, -0.25, -0.5]], dtype="<f4")
    packed = np.concatenate([exact.view(torch.uint8).numpy(), terms.view(np.uint8)], axis=1)
    assert packed.shape[1] == settings.value_bytes
    ranks = np.arange(8)
    expected = np.concatenate([[-0.5, -1.25, -3.0, -4.0], -4.5 - 0.25 * ranks - 0.5 * np.sqrt(ranks)])
    assert distillkit.unpacked_values(packed, settings)[0] == pytest.approx(expected, abs=1e-6)
    assert settings.id_bytes == 15


def test_a_student_trains_from_an_imported_cache(real, models, values, tokenizer, tmp_path):
    export_cache(real, tmp_path / "out", "distillkit")
    import_cache(tmp_path / "out", tmp_path / "cache", "distillkit", Given(tokenizer=tokenizer))
    own = {**values, "data": None, "teacher": None, "loss": {"temperature": 1.0}}
    del own["selection"]
    own["training"] = {**own["training"], "max_steps": 3, "learning_rate": 1e-2}
    record = distill(parse_recipe(own))
    assert record.scores["student after"]["kl_to_teacher"] < record.scores["student before"]["kl_to_teacher"]


def test_the_commands_say_what_is_lost(real, shared_cache, tokenizer, tmp_path):
    out, cache = tmp_path / "out", tmp_path / "cache"
    done = CliRunner().invoke(app, ["export-cache", str(shared_cache), str(out), "--to", "axolotl", "--k", "8"])
    assert done.exit_code == 0, done.output
    assert "lost: the temperature T = 1 is baked in" in done.output
    assert "drawn entries are left out" in done.output
    assert all(line.removeprefix("lost: ") in (out / "README.md").read_text() for line in done.output.splitlines() if line.startswith("lost: "))  # fmt: skip
    (out / "validation.parquet").unlink()
    done = CliRunner().invoke(app, ["import-cache", str(out), str(cache), "--from", "axolotl", "--tokenizer", tokenizer, "--holdout", "5"])  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "note: rows at T = 1 alone" in done.output
    train = len(real.split("train"))
    assert f"{train - 5:,} sequences of train, 5 sequences of validation" in done.output
    back = open_cache(cache)
    assert back["validation"][0].token_ids.tolist() == real["train"][train - 5].token_ids.tolist()
    assert len(back["train"]) == train - 5


@pytest.mark.parametrize(
    ("kind", "options", "match"),
    [
        ("jsonl", Options(k=3), "jsonl holds all of a cache"),
        ("axolotl", Options(temperature=0.5), "below the smallest"),
        ("axolotl", Options(temperature=float("inf")), "--temperature inf lies outside"),
        ("axolotl", Options(temperature=1e9), r"--temperature 1e\+09 lies outside 1e-05 to 100"),
        ("axolotl", Options(temperature=float("nan")), "--temperature nan lies outside"),
        ("distillkit", Options(temperature=2.0), "Leave --temperature out"),
        ("distillkit", Options(keep_mass=True), "leave --keep-mass out"),
    ],
)
def test_options_that_do_not_go_together_are_refused(caches, tmp_path, kind, options, match):
    with pytest.raises(CacheError, match=match):
        export_cache(caches["top_k"], tmp_path / "out", kind, options)
    assert not list(tmp_path.iterdir())


def test_a_cache_without_t_1_cannot_go_to_distillkit(caches, tmp_path):
    with pytest.raises(CacheError, match="declares T = 1 or below"):
        export_cache(caches["ids_alone"], tmp_path / "out", "distillkit")
    made = export_cache(caches["ids_alone"], tmp_path / "out", "axolotl")
    assert made.notes[0].startswith("the temperature T = 2 is baked in")


def test_an_occupied_or_failing_folder_is_one_error(caches, tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("keep")
    with pytest.raises(StorageError, match="is there already"):
        export_cache(caches["top_k"], tmp_path / "mine", "jsonl")
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        export_cache(caches["top_k"], tmp_path / "file" / "out", "jsonl")

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("kdcache.exchange.axolotl.write", full)
    with pytest.raises(StorageError, match="No space left on device"):
        export_cache(caches["top_k"], tmp_path / "out", "axolotl")
    assert {p.name for p in tmp_path.iterdir()} == {"mine", "file"}


def test_a_stopped_import_goes_on(real, tokenizer, tmp_path, monkeypatch):
    export_cache(real, tmp_path / "out", "axolotl", Options(keep_mass=True))
    given = Given(tokenizer=tokenizer, positions_per_shard=100)
    made = []

    def stop(destination, plan, vocabulary, content_of, progress):
        def some(index):
            if index == 3:
                raise KeyboardInterrupt
            made.append(index)
            return content_of(index)

        return write_derived(destination, plan, vocabulary, some, progress)

    monkeypatch.setattr(importing, "write_derived", stop)
    with pytest.raises(KeyboardInterrupt):
        import_cache(tmp_path / "out", tmp_path / "cache", "axolotl", given)
    monkeypatch.undo()
    # One in the middle is lost as well.
    next((tmp_path / "cache" / "shards").glob("00001*")).unlink()
    again = import_cache(tmp_path / "out", tmp_path / "cache", "axolotl", given)
    assert made == [0, 1, 2]
    assert again.cache.shards_made == len(again.cache.plan.shards) - 2
    whole = import_cache(tmp_path / "out", tmp_path / "other", "axolotl", given)
    assert whole.cache.manifest.cache_id == again.cache.manifest.cache_id


def test_without_a_validation_split_it_is_told(real, tokenizer, tmp_path):
    export_cache(real, tmp_path / "out", "axolotl")
    told = Told()
    import_cache(tmp_path / "out" / "train.parquet", tmp_path / "cache", "axolotl", Given(tokenizer=tokenizer), told)
    assert any("--holdout N" in text for text in told.warnings)
    for count, source in ((3, "out"), (10_000, "out/train.parquet")):
        with pytest.raises(DataError, match="holdout"):
            import_cache(tmp_path / source, tmp_path / "x", "axolotl", Given(tokenizer=tokenizer, holdout=count))


def test_a_data_set_saved_to_disk_is_read_as_well(real, tokenizer, tmp_path):
    import datasets

    export_cache(real, tmp_path / "out", "axolotl", Options(keep_mass=True))
    parts = {
        n: datasets.Dataset(parquet.read_table(tmp_path / "out" / f"{n}.parquet")) for n in ("train", "validation")
    }
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    given = Given(tokenizer=tokenizer)
    one, two = (import_cache(tmp_path / a, tmp_path / b, "axolotl", given) for a, b in (("out", "x"), ("saved", "y")))
    assert one.cache.manifest.cache_id == two.cache.manifest.cache_id
    shutil.rmtree(tmp_path / "saved" / "train")
    with pytest.raises(DataError, match="cannot be read as a saved data set"):
        import_cache(tmp_path / "saved", tmp_path / "z", "axolotl", given)
