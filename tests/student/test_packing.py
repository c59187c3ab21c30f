"""Packed rows: the same loss and gradient as padded ones, and no sequence that sees another."""

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import find_packed_sequence_indices, flash_attention_mask

from kdcache.cache.codec import CachedSequence
from kdcache.cache.reader import open_cache
from kdcache.errors import ModelError
from kdcache.models import attach_lora
from kdcache.student.collate import IGNORED, Collator, pack
from kdcache.student.forward import loss_sums
from kdcache.student.packing import refuse_leaks

OPTIONS = {"temperature": 2.0, "ce_weight": 0.5, "kd_weight": 0.5}
SMALL = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip
KINDS = [(family, attention) for family in ("qwen2", "llama") for attention in ("sdpa", "eager")]


def tiny(family, width, attention="sdpa", **changes):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, vocab_size=width, **{**SMALL, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    for parameter in model.parameters():
        # At the usual start everything is nearly uniform, and attention hardly matters.
        parameter.data.mul_(4.0) if parameter.ndim > 1 else None
    return model


def recompute(model):
    # Renamed in newer releases; both take the same first argument.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


@pytest.fixture(scope="module")
def cache(shared_cache):
    return open_cache(shared_cache)


@pytest.fixture(scope="module")
def pairs(cache):
    """Of many lengths; some of the short ones have no target left."""
    split = cache.split("train")
    return [(i, split[i] if i % 2 else split[i].cut(20 + 3 * i)) for i in range(9)]


def collator(cache, **options):
    return Collator(cache.plan.tokenizer.pad_id, 2.0, **options)


def gradients(model, batch, cache):
    model.zero_grad()
    sums = loss_sums(model, model, batch, vocab_size=cache.vocab_size, **OPTIONS)
    sums.total.backward()
    return sums, {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


@given(st.lists(st.integers(1, 40), min_size=1, max_size=40), st.integers(20, 60))
def test_rows_hold_every_sequence_once_and_could_hardly_be_fewer(lengths, capacity):
    rows = pack(lengths, capacity)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    filled = [sum(lengths[i] for i in row) for row in rows]
    assert max(filled) <= max(capacity, *lengths)
    # First fit leaves no two rows that would fit into one: more than half of all rows is full, if short ones count as long.
    if len(rows) > 1:
        assert sum(min(n, capacity) for n in lengths) * 2 > len(rows) * capacity


def test_rows_are_as_few_as_can_be_and_no_longer_than_need_be():
    assert pack([3, 7, 5, 5, 8, 2], 10) == [[4, 5], [1, 0], [2, 3]]
    assert pack([4, 4, 4], 100) == [[0, 1, 2]]
    assert pack([60, 50, 20, 10], 100) == [[0, 3], [1, 2]]  # 70 and 70, not 90 and 50
    assert pack([50, 9, 9], 20) == [[0], [1, 2]]


@pytest.mark.parametrize("max_length", [None, 40, 200])
def test_a_packed_batch_holds_the_same_in_fewer_rows(cache, pairs, max_length):
    padded = collator(cache, max_length=max_length)(pairs)
    packed = collator(cache, max_length=max_length, packed=True)(pairs)
    assert "attention_mask" not in packed
    longest = max_length or max(len(s.token_ids) for _, s in pairs)
    assert packed["input_ids"].shape[1] <= longest
    rows, total = len(packed["input_ids"]), sum(min(len(s.token_ids), longest) for _, s in pairs)
    assert total / longest <= rows <= len(pairs)
    assert max_length == 40 or rows < len(pairs)
    # Sequence after sequence, in the order in which the labels meet the rows.
    following = packed["labels"][:, 1:]
    met = torch.split(following[following != IGNORED], packed["sequence_targets"].tolist())
    assert sorted(packed["sequence_index"].tolist()) == [i for i, _ in pairs]
    by_index = dict(pairs)
    ends = packed["sequence_targets"].cumsum(0)
    padded_ends = padded["sequence_targets"].cumsum(0)
    for place, (index, labels) in enumerate(zip(packed["sequence_index"].tolist(), met, strict=True)):
        cut = by_index[index].cut(max_length)
        assert labels.tolist() == cut.token_ids[cut.targets].tolist()
        own = slice(int(ends[place]) - len(labels), int(ends[place]))
        there = slice(int(padded_ends[index]) - len(labels), int(padded_ends[index]))
        for key in ("teacher_ids", "teacher_log_probs", "teacher_log_tail", "teacher_log_weights"):
            assert torch.equal(packed[key][own], padded[key][there]), key


def test_every_sequence_and_every_filler_is_a_document_to_transformers(cache, pairs):
    batch = collator(cache, packed=True)(pairs)
    documents = find_packed_sequence_indices(batch["position_ids"])
    lengths = {i: len(s.token_ids) for i, s in pairs}
    order, found = batch["sequence_index"].tolist(), []
    for row in documents:
        _, sizes = torch.unique_consecutive(row, return_counts=True)
        own = []
        while order[len(found) + len(own) :] and len(own) < len(sizes):
            expected = lengths[order[len(found) + len(own)]]
            if int(sizes[len(own)]) != expected:
                break
            own.append(expected)
        # What is left of a row is one document more, and nothing else.
        assert len(sizes) - len(own) <= 1
        assert sum(own) + (int(sizes[-1]) if len(sizes) > len(own) else 0) == len(row)
        found += own
    assert len(found) == len(pairs)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("family", "attention"), KINDS)
def test_loss_and_gradient_are_those_of_padded_rows(cache, pairs, family, attention, checkpointing):
    model = tiny(family, cache.vocab_size, attention)
    model = attach_lora(model, r=4, alpha=8, dropout=0.0, targets="all-linear", quantized=False).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    if checkpointing:
        recompute(model)
    padded, expected = gradients(model, collator(cache)(pairs), cache)
    packed, found = gradients(model, collator(cache, packed=True)(pairs), cache)
    assert packed.total.item() == pytest.approx(padded.total.item(), rel=1e-5)
    scale = max(float(g.abs().max()) for g in expected.values())
    assert scale > 0
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, rtol=0, atol=1e-5 * scale), name


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("family", "attention"), KINDS)
def test_no_token_of_a_sequence_reaches_the_next(cache, pairs, family, attention, checkpointing):
    """Bit for bit: logits and loss rows of the second sequence, and the gradient that it alone gives."""
    # The longer one is laid in front.
    first, second = sorted((s for _, s in pairs[1:4:2]), key=lambda s: len(s.token_ids), reverse=True)
    unlearnt = CachedSequence(first.token_ids, np.zeros_like(first.targets), first.rows.slice(0, 0))
    batch = collator(cache, max_length=1000, packed=True)([(0, unlearnt), (1, second)])
    start = len(first.token_ids)
    assert batch["input_ids"].tolist() == [[*first.token_ids, *second.token_ids]]
    model = tiny(family, cache.vocab_size, attention).train()
    if checkpointing:
        recompute(model)

    def everything(ids):
        changed = {**batch, "input_ids": ids}
        sums, grads = gradients(model, changed, cache)
        with torch.no_grad():
            logits = model(input_ids=ids, position_ids=batch["position_ids"], use_cache=False).logits[0, start:]
        return logits, sums, grads

    ids = batch["input_ids"]
    logits, sums, grads = everything(ids)
    ahead, own = set(ids[0, :start].tolist()), set(ids[0, start:].tolist())
    nothing = grads["model.embed_tokens.weight"][sorted(ahead - own)]
    assert len(nothing)
    assert not nothing.any()
    for place in range(start):
        other = ids.clone()
        other[0, place] = (ids[0, place] + 7) % cache.vocab_size
        other_logits, other_sums, other_grads = everything(other)
        assert torch.equal(logits, other_logits)
        assert torch.equal(sums.ce_N, other_sums.ce_N)
        assert torch.equal(sums.divergence_N, other_sums.divergence_N)
        for name, gradient in grads.items():
            assert torch.equal(gradient, other_grads[name]), name
    seen = ids.clone()
    seen[0, start] = (ids[0, start] + 7) % cache.vocab_size
    assert not torch.equal(logits[-1], everything(seen)[0][-1])


@pytest.mark.parametrize(
    ("family", "attention"), [*KINDS, ("gpt_neox", "eager"), ("mistral", "sdpa"), ("qwen2_moe", "eager")]
)
def test_families_that_keep_sequences_apart_pass(family, attention):
    changes = {"mistral": {"sliding_window": 6}, "qwen2_moe": {"num_experts": 4, "num_experts_per_tok": 2}}
    model = tiny(family, 300, attention, **changes.get(family, {})).train()
    refuse_leaks(model)
    assert model.training
    refuse_leaks(attach_lora(model.eval(), r=4, alpha=8, dropout=0.1, targets="all-linear", quantized=False).eval())


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mamba", {"state_size": 8}),
        ("jamba", {"num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False}),
        ("lfm2", {"full_attn_idxs": [1]}),
        ("bloom", {"n_layer": 2, "n_head": 4}),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_families_that_do_not_are_refused_by_name(family, changes):
    model = tiny(family, 300, "eager", **changes).train()
    with pytest.raises(ModelError, match=rf"of type {family} .*use training\.packing=false"):
        refuse_leaks(model)
    assert model.training


def one_row_attention(module, query, key, value, attention_mask, position_ids=None, scaling=None, **kwargs):
    """As FlashAttention is called: borders are looked for in batches of one row, and a longer one is causal throughout."""
    seen = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool).tril()
    if len(query) == 1:
        document = (position_ids[0] == 0).cumsum(0)
        seen &= document[:, None] == document
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scaling)
    return out.transpose(1, 2), None


@pytest.fixture
def stand_ins():
    """An implementation that is known to want one row, and the same under a name that says nothing of that."""
    for name in ("flash_stand_in", "unknown_stand_in"):
        AttentionInterface.register(name, one_row_attention)
        AttentionMaskInterface.register(name, flash_attention_mask)


@pytest.mark.usefixtures("stand_ins")
def test_flash_attention_is_given_one_row(cache, pairs):
    model = tiny("qwen2", cache.vocab_size)
    batch = collator(cache, packed=True)(pairs)
    assert len(batch["input_ids"]) > 1
    expected, expected_grads = gradients(model, batch, cache)
    # Behind the setter's back, which would look for the package.
    model.config._attn_implementation_internal = "flash_stand_in"
    refuse_leaks(model)
    found, grads = gradients(model, batch, cache)
    assert torch.allclose(found.ce_N, expected.ce_N, atol=1e-4)
    assert torch.allclose(found.divergence_N, expected.divergence_N, atol=1e-4)
    for name, gradient in expected_grads.items():
        assert torch.allclose(grads[name], gradient, rtol=0, atol=1e-5 * float(gradient.abs().max()) + 1e-6), name
    model.set_attn_implementation("unknown_stand_in")
    with pytest.raises(ModelError, match="attention unknown_stand_in lets a sequence see the one packed before it"):
        refuse_leaks(model)


def test_a_model_that_counts_positions_by_itself_is_refused():
    """It leaks nothing, and yet trains on something else than the sequence alone."""
    model = tiny("qwen2", 300, "eager")
    rotary = model.model.rotary_emb
    inner = rotary.forward
    rotary.forward = lambda x, position_ids: inner(x, torch.arange(x.shape[1])[None] ** 2)
    with pytest.raises(ModelError, match="treats a packed sequence otherwise than the same sequence alone"):
        refuse_leaks(model)


def test_a_model_that_takes_no_positions_is_refused():
    model = tiny("qwen2", 300)
    forward = model.forward
    model.forward = lambda input_ids, attention_mask, use_cache: forward(input_ids, attention_mask, use_cache=use_cache)
    with pytest.raises(ModelError, match=r"does not run on packed rows \(TypeError: .*position_ids"):
        refuse_leaks(model)
