"""A 4-bit teacher on CUDA: its pass, its cache, and the selection on the device against the one on the CPU."""

import numpy as np
import pytest
import torch

from kdcache.cache.reader import open_cache, shard_path
from kdcache.cache.verify import verify
from kdcache.data.tokens import TokenRow
from kdcache.errors import ModelError
from kdcache.models import head_of, load_model
from kdcache.recipe import parse_recipe
from kdcache.teacher.capture import capture
from kdcache.teacher.forward import TeacherForward
from kdcache.teacher.select import select
from tests.cache.samples import SELECTIONS, VOCAB
from tests.gpu.device import DEVICE, cuda_alone, on_gpu
from tests.reference import relative_error

pytestmark = on_gpu


@pytest.fixture
def teacher_values(values):
    """Recipe values with an NF4 teacher in bfloat16 on the device."""
    values["teacher"] |= {"quantization": "nf4", "dtype": "bfloat16", "device": DEVICE}
    return values


def test_a_cache_of_a_four_bit_teacher_says_what_the_teacher_says(teacher_values, models):
    recipe = parse_recipe(teacher_values)
    result = capture(recipe)
    assert verify(result.directory) == []
    cache = open_cache(result.directory)
    assert cache.plan.teacher.quantization == "nf4"
    teacher = load_model(str(models / "teacher"), quantization="nf4", dtype="bfloat16", device=DEVICE)
    weight, _ = head_of(teacher)
    errors, most_likely, positions = [], 0, 0
    for sequence in cache["train"][:12]:
        ids = torch.from_numpy(sequence.token_ids.astype(np.int64)).to(DEVICE)
        with torch.inference_mode():
            hidden = teacher.get_decoder()(input_ids=ids[None], use_cache=False).last_hidden_state[0]
        logits = hidden.double() @ weight[: cache.vocab_size].detach().double().T
        rows = np.flatnonzero(sequence.targets) - 1
        log_p = torch.log_softmax(logits, dim=1).cpu().numpy()[rows]
        labels = sequence.token_ids[sequence.targets].astype(np.int64)
        errors.append(np.abs(log_p[np.arange(len(rows)), labels] - sequence.rows.label_log_prob))
        # The largest entry is always kept, and its stored logit is 0.
        largest = entry_keys(sequence.rows, cache.vocab_size)[: len(sequence.rows.head_ids)][
            sequence.rows.head_logits == 0
        ]
        most_likely += int(np.isin(np.arange(len(rows)) * cache.vocab_size + log_p.argmax(axis=1), largest).sum())
        positions += len(rows)
    # Alone and in a batch, hidden states are rounded to bfloat16 in other places; labels are kept in half precision.
    assert np.concatenate(errors).mean() < 0.02
    assert most_likely > 0.9 * positions


def test_a_shard_made_again_has_the_same_bytes(teacher_values):
    recipe = parse_recipe(teacher_values)
    directory = capture(recipe).directory
    whole = {p: p.read_bytes() for p in directory.rglob("*") if p.is_file()}
    shard_path(directory, 1).unlink()
    (directory / "manifest.json").unlink()
    assert capture(recipe).shards_made == 1
    assert {p: p.read_bytes() for p in directory.rglob("*") if p.is_file()} == whole


def test_logits_are_float32_products_of_half_precision_factors(models):
    teacher = load_model(str(models / "teacher"), quantization="nf4", dtype="bfloat16", device=DEVICE)
    head = TeacherForward(teacher, vocab_size=100, pad_id=0).head
    assert head.native == (DEVICE == "cuda")
    weight, _ = head_of(teacher)
    assert weight.dtype == torch.bfloat16
    hidden = torch.randn(64, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(DEVICE, torch.bfloat16)
    logits = head.logits(hidden)
    assert logits.dtype == torch.float32
    assert relative_error(logits, hidden.double() @ weight[:100].detach().double().T) < 1e-6


@cuda_alone
def test_a_batch_too_large_for_the_memory_is_named(models):
    teacher = load_model(str(models / "teacher"), quantization="nf4", dtype="bfloat16", device=DEVICE)
    forward = TeacherForward(teacher, vocab_size=100, pad_id=0)
    ids = np.full(1024, 5, dtype=np.uint32)
    rows = [TokenRow(i, ids, np.arange(1024) > 0) for i in range(64)]
    torch.cuda.empty_cache()
    # Nothing beyond what is held already.
    torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / torch.cuda.mem_get_info()[1])
    try:
        with pytest.raises(ModelError, match=r"ran out of memory on a batch of 64 sequences of at most 1024 tokens"):
            forward.hidden(rows)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize("method", SELECTIONS)
def test_the_device_selects_what_the_cpu_selects(method):
    selection = SELECTIONS[method]
    logits = torch.randn(600, VOCAB, generator=torch.Generator().manual_seed(0)) * 3
    labels = torch.randint(VOCAB, (600,), generator=torch.Generator().manual_seed(1))
    uniforms = np.random.default_rng(0).random((600, selection.uniforms))
    here = select(logits, labels, selection, uniforms).rows
    there = select(logits.to(DEVICE), labels.to(DEVICE), selection, uniforms).rows
    # A probability that rounding puts on the other side of a floor, or a draw's number on another entry: rare.
    assert abs(there.entries - here.entries) <= 0.002 * here.entries
    common = np.intersect1d(entry_keys(here), entry_keys(there))
    assert len(common) >= 0.995 * here.entries
    assert np.allclose(here.label_log_prob, there.label_log_prob, atol=1e-4)
    assert np.allclose(here.kept_mass(), there.kept_mass(), atol=2e-2)


def entry_keys(rows, vocabulary=VOCAB):
    """One number per entry: its row and its id; first the exactly kept ones, then the drawn ones."""
    head = np.repeat(np.arange(len(rows)), rows.head) * vocabulary + rows.head_ids
    tail = np.repeat(np.arange(len(rows)), rows.tail) * vocabulary + rows.tail_ids
    return np.concatenate([head, tail])
