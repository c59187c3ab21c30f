"""Views for other trainers: the batches of our own, and columns from which anybody can work out the loss."""

import dataclasses
import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from kdcache.cache.reader import Split, open_cache, shard_path
from kdcache.cache.writer import CacheWriter
from kdcache.errors import CacheError, CorruptCacheError, StorageError
from kdcache.models import load_model
from kdcache.student.collate import IGNORED, Collator, sparse_teacher
from kdcache.student.forward import loss_sums
from kdcache.student.loss import distillation_loss
from kdcache.views import to_datasets, to_torch
from tests.cache.samples import SELECTIONS, TOKENS, VOCAB, method_caches, sample_plan, sample_sequences

D = 16
CASES = [
    (m, t, tail)
    for m, s in SELECTIONS.items()
    for t in (1.0, 1.5, 2.0, 3.0)
    if t >= s.temperatures[0]
    for tail in ("auto", "lumped", "renormalised")
]


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    return method_caches(tmp_path_factory.mktemp("caches"))


def student(length, seed=0):
    """Hidden states of a sequence and a head."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(length, D, generator=g), torch.randn(VOCAB, D, generator=g)


def log_softmax(x):
    shifted = x - x.max()
    return shifted - np.log(np.exp(shifted).sum())


def kd_by_hand(item, logits, temperature):
    """The formula of the module, in float64, from the columns alone."""
    total = 0.0
    for row, position in enumerate(item["positions"]):
        log_q = log_softmax(logits[position] / temperature)
        ids = np.array(item["teacher_ids"][row], dtype=int)
        w, log_p = (np.array(item[f"teacher_{k}"][row]) for k in ("weights", "log_probs"))
        rho = item["rest_mass"][row]
        total += sum(x * (a - b) for x, a, b in zip(w, log_p, log_q[ids], strict=True) if x > 0)
        if rho > 0:
            outside = np.delete(log_q, ids)
            total += rho * (np.log(rho) - np.log(np.exp(outside).sum()))
    return total


@pytest.mark.parametrize(
    ("method", "temperature", "tail"), [*CASES, ("thinned", 2.0, "auto"), ("thinned", 1.0, "lumped")]
)
def test_anybody_can_work_out_the_loss_from_the_columns(caches, tmp_path, method, temperature, tail):
    split = caches[method].split("train")
    dataset = to_datasets(split, temperature=temperature, tail=tail, cache_dir=tmp_path)
    assert len(dataset) == len(split) == 8
    for number, sequence in enumerate(split):
        item = dataset[number]
        hidden, head = student(len(sequence.token_ids), seed=number)
        places = np.flatnonzero(sequence.targets)
        assert item["positions"] == (places - 1).tolist()
        labels = torch.tensor(item["labels"])[places]
        found = kd_by_hand(item, (hidden.double() @ head.double().T).numpy(), temperature)
        teacher = sparse_teacher(sequence.rows, temperature, tail)
        options = {"temperature": temperature, "ce_weight": 0.0, "kd_weight": 1.0}
        truth = distillation_loss(hidden[places - 1], head, labels, teacher, **options)
        assert found == pytest.approx(float(truth.divergence), rel=2e-5, abs=1e-5)


def test_columns_are_those_documented(caches, tmp_path):
    split = caches["thinned"].split("train")
    dataset = to_datasets(split, cache_dir=tmp_path)
    assert dataset.column_names == [
        "input_ids", "labels", "positions", "teacher_ids", "teacher_log_probs", "teacher_weights", "rest_mass",
    ]  # fmt: skip
    assert dataset.cache_files
    assert dataset.features["teacher_ids"].feature.feature.dtype == "int32"
    assert dataset.features["teacher_weights"].feature.feature.dtype == "float32"
    for item, sequence in zip(dataset, split, strict=True):
        assert item["input_ids"] == sequence.token_ids.tolist()
        assert item["labels"] == np.where(sequence.targets, sequence.token_ids.astype(int), IGNORED).tolist()
        counts = (sequence.rows.head + sequence.rows.tail).tolist()
        assert [len(x) for x in item["teacher_ids"]] == [len(x) for x in item["teacher_weights"]] == counts
        assert 0 in counts
    exact = to_datasets(caches["top_k"].split("train"), cache_dir=tmp_path)[0]
    for log_probs, weights, rest in zip(
        *(exact[k] for k in ("teacher_log_probs", "teacher_weights", "rest_mass")), strict=True
    ):
        assert np.exp(log_probs) == pytest.approx(weights, rel=1e-6)
        assert sum(weights) + rest == pytest.approx(1.0, abs=1e-5)


def test_the_file_is_written_once_for_each_view(caches, tmp_path, monkeypatch):
    split = caches["top_k"].split("train")
    first = to_datasets(split, temperature=2.0, cache_dir=tmp_path)
    other = to_datasets(split, temperature=1.0, cache_dir=tmp_path)
    assert first[0] != other[0]
    assert to_datasets(caches["top_k"].split("validation"), temperature=2.0, cache_dir=tmp_path)[0] != first[0]
    monkeypatch.setattr(Split, "__iter__", lambda self: pytest.fail("read again"))
    again = to_datasets(split, temperature=2.0, cache_dir=tmp_path)
    assert again.cache_files == first.cache_files
    assert again[0] == first[0]


def test_a_damaged_cache_and_an_unwritable_place_are_our_errors(tmp_path):
    contents = [sample_sequences(n, seed=n) for n in (3, 2)]
    writer = CacheWriter(tmp_path / "c", sample_plan(contents), TOKENS)
    for index, content in enumerate(contents):
        writer.commit(index, content)
    writer.finalise()
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write the view of split train"):
        to_datasets(open_cache(tmp_path / "c").split("train"), cache_dir=tmp_path / "file")
    path = shard_path(tmp_path / "c", 0)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptCacheError, match="00000"):
        to_datasets(open_cache(tmp_path / "c").split("train"), cache_dir=tmp_path / "d")


@pytest.mark.parametrize(("method", "temperature", "tail"), [*CASES, ("thinned", 2.0, "auto")])
def test_collated_items_are_the_batch_that_our_trainer_gets(caches, method, temperature, tail):
    split = caches[method].split("train")
    view = to_torch(split, temperature=temperature, tail=tail)
    assert len(view) == 8
    for numbers in ([4], [0, 7, 3], range(8)):
        found = view.collate([view[i] for i in numbers])
        truth = Collator(0, temperature, tail)([(i, split[i]) for i in numbers])
        assert found.keys() == truth.keys()
        for key, value in truth.items():
            assert found[key].dtype == value.dtype, key
            assert torch.equal(found[key], value), key


def test_items_are_tensors_of_one_sequence(caches):
    split = caches["threshold_sampling"].split("train")
    view = to_torch(split)
    item, sequence = view[-1], split[-1]
    assert item["sequence_index"].tolist() == 7
    assert item["input_ids"].tolist() == sequence.token_ids.tolist()
    assert item["labels"].tolist() == [
        i if t else -100 for i, t in zip(item["input_ids"].tolist(), sequence.targets, strict=True)
    ]
    assert item["teacher_ids"].shape == item["teacher_log_probs"].shape == item["teacher_log_weights"].shape
    assert len(item["teacher_ids"]) == len(item["teacher_log_tail"]) == len(sequence.rows)
    for index in (8, -9):
        with pytest.raises(IndexError):
            view[index]


def test_a_loader_with_shuffling_and_workers_sees_every_sequence_once(caches):
    view = to_torch(caches["top_k"].split("train"))
    generator = torch.Generator().manual_seed(0)
    loader = DataLoader(view, batch_size=3, shuffle=True, generator=generator, collate_fn=view.collate, num_workers=1)
    batches = list(loader)
    assert sorted(i for b in batches for i in b["sequence_index"].tolist()) == list(range(8))
    again = pickle.loads(pickle.dumps(view))
    assert torch.equal(again[3]["teacher_log_probs"], view[3]["teacher_log_probs"])


def test_a_collated_batch_trains_a_student(shared_cache, models):
    cache = open_cache(shared_cache)
    view = to_torch(cache.split("train"), temperature=2.0)
    model = load_model(str(models / "student"), dtype="float32", device="cpu")
    batch = view.collate([view[i] for i in range(4)])
    options = {"vocab_size": cache.vocab_size, "temperature": 2.0, "ce_weight": 0.5, "kd_weight": 0.5}
    sums = loss_sums(model, model, batch, **options)
    sums.total.backward()
    assert len(sums.ce_N) == int((batch["labels"][:, 1:] != IGNORED).sum())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_the_usual_temperature_is_one_where_it_is_declared(caches, tmp_path):
    assert to_torch(caches["top_k"].split("train")).collator.temperature == 1.0
    assert to_torch(caches["ids_alone"].split("train")).collator.temperature == 2.0
    for view in (to_torch, to_datasets):
        with pytest.raises(CacheError, match="below the cache's smallest declared temperature 2"):
            view(caches["ids_alone"].split("train"), temperature=1.0)


def test_a_sequence_without_targets_has_no_rows(tmp_path):
    content = sample_sequences(2, seed=1)
    rows = content.rows.slice(int(content.row_offsets[1]), len(content.rows))
    targets = content.targets.copy()
    targets[: content.token_offsets[1]] = False
    thin = dataclasses.replace(content, targets=targets, rows=rows)
    contents = [thin, sample_sequences(2, seed=2)]
    writer = CacheWriter(tmp_path / "c", sample_plan(contents), TOKENS)
    for index, part in enumerate(contents):
        writer.commit(index, part)
    writer.finalise()
    train = open_cache(tmp_path / "c").split("train")
    table = to_datasets(train, cache_dir=tmp_path / "arrow")
    assert table[0]["positions"] == table[0]["teacher_ids"] == table[0]["rest_mass"] == []
    assert len(table[1]["teacher_ids"]) == len(table[1]["positions"]) > 0
    assert to_torch(train)[0]["teacher_ids"].shape[0] == 0
