"""Row i of the teacher predicts token i + 1: held from the forward pass through the cache to the batch."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kdcache.data.tokens import TokenRow
from kdcache.models import load_model
from kdcache.student.collate import IGNORED, Collator, sparse_teacher
from kdcache.student.loss import distillation_loss
from kdcache.teacher.forward import TeacherForward
from kdcache.teacher.sample import shard_content
from kdcache.teacher.select import Selection, select
from tests.cache.samples import stored_rows


def selecting(*arguments, **options):
    """Selection without draws, as the forward pass takes it."""
    return lambda logits, labels, uniforms: select(logits, labels, Selection(*arguments, **options), uniforms)


def full_logits(model, ids):
    with torch.inference_mode():
        return model(input_ids=torch.from_numpy(ids.astype(np.int64))[None]).logits[0].double()


rows_strategy = st.lists(
    st.lists(st.booleans(), min_size=2, max_size=14).filter(lambda m: any(m[1:])), min_size=1, max_size=6
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(masks=rows_strategy, seed=st.integers(0, 100), batch_tokens=st.sampled_from([16, 40, 1000]))
def test_rows_labels_and_hidden_states_meet(models, masks, seed, batch_tokens):
    """Any masks, lengths and batching: each row is the teacher's own distribution for the next token."""
    teacher = load_teacher(models)
    vocabulary = teacher.config.vocab_size
    generator = np.random.default_rng(seed)
    token_rows = []
    for index, mask in enumerate(masks):
        targets = np.array(mask)
        targets[0] = False
        token_rows.append(TokenRow(index, generator.integers(3, vocabulary, len(mask)).astype(np.uint32), targets))
    forward = TeacherForward(teacher, vocab_size=vocabulary, pad_id=0)
    sparse = forward(token_rows, selecting("top_k", (1.0, 2.0), k=vocabulary), batch_tokens=batch_tokens)
    content = shard_content(token_rows, sparse)
    batch = Collator(pad_id=0, temperature=2.0)([(i, content[i]) for i in range(len(content))])

    flat = 0
    label_log_probs = sparse.label_log_prob
    for i, row in enumerate(token_rows):
        logits = full_logits(teacher, row.ids)
        for position in range(len(row.ids) - 1):
            label = int(batch["labels"][i, position + 1])
            assert (label != IGNORED) == bool(row.targets[position + 1])
            if label == IGNORED:
                continue
            assert label == row.ids[position + 1]
            truth = torch.log_softmax(logits[position] / 2, dim=0)
            found = torch.empty(vocabulary).scatter_(0, batch["teacher_ids"][flat], batch["teacher_log_probs"][flat])
            assert torch.allclose(found.double(), truth, atol=1e-4)
            exact = torch.log_softmax(logits[position], dim=0)[label]
            assert abs(float(label_log_probs[flat]) - float(exact)) < 1e-3
            flat += 1
        assert (batch["labels"][i, len(row.ids) :] == IGNORED).all()
        assert batch["attention_mask"][i].sum() == len(row.ids)
    assert flat == len(batch["teacher_ids"])


def load_teacher(models, cache={}):  # noqa: B006 (one load for all examples)
    if models not in cache:
        cache[models] = load_model(str(models / "teacher"), dtype="float32", device="cpu")
    return cache[models]


def test_short_rows_are_filled_with_nothing(models):
    teacher = load_teacher(models)
    vocabulary = teacher.config.vocab_size
    ids = np.arange(3, 15).astype(np.uint32)
    row = TokenRow(0, ids, np.r_[False, np.ones(11, dtype=bool)])
    forward = TeacherForward(teacher, vocab_size=vocabulary, pad_id=0)
    sparse = forward([row], selecting("threshold", (1.0,), k=200, floors=(float(1.2 / vocabulary),)), batch_tokens=64)
    assert len(set(sparse.head.tolist())) > 1
    content = shard_content([row], sparse)
    batch = Collator(pad_id=0, temperature=1.0)([(0, content[0])])
    kept = torch.exp(batch["teacher_log_probs"].double()).sum(dim=1)
    assert np.allclose(kept, sparse.kept_mass()[:, 0], atol=1e-6)
    assert torch.allclose(
        kept + torch.exp(batch["teacher_log_tail"].double()), torch.ones(11, dtype=torch.float64), atol=1e-6
    )
    assert (torch.isneginf(batch["teacher_log_probs"]).sum(dim=1).numpy() == sparse.head.max() - sparse.head).all()


@pytest.mark.parametrize("values", ["quantised", "half"])
def test_peaked_rows_never_have_a_rest_of_nothing(values):
    """Two competing tokens: rounded logits may add up to more than 1, and reverse KL would be infinite."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(400, 2000, generator=generator)
    logits[:, :2] += 16 + torch.rand(400, 2, generator=generator)
    selected = select(logits, torch.zeros(400, dtype=torch.int64), Selection("top_k", (1.0, 2.0), k=16)).rows
    teacher = sparse_teacher(stored_rows(selected, values=values), 1.0)
    assert torch.isfinite(teacher.log_tail_N).all()
    outside = torch.log_softmax(logits.double(), dim=1).exp().scatter(1, teacher.ids_NK, 0.0).sum(dim=1)
    # The rest is off by no more than 2^-11 of itself, however coarse the logits are.
    assert (teacher.log_tail_N.double() - outside.log()).abs().max() < 2.0**-11 + 1e-5
    states, head = torch.randn(400, 8, generator=generator), torch.randn(2000, 8, generator=generator)
    sums = distillation_loss(
        states, head, torch.zeros(400, dtype=torch.int64), teacher, temperature=1.0, ce_weight=0.0, kd_weight=1.0,
        divergence="reverse_kl",
    )  # fmt: skip
    assert torch.isfinite(sums.total)
