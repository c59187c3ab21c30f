"""The loss against the dense float64 oracle: value and gradient."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcache.student.loss import DistillationLoss, SparseTeacher, distillation_loss
from tests.reference import dense_loss, dense_teacher, loss_from_logits, relative_error

TEMPERATURES = [0.5, 1.0, 2.0, 4.0]


def make_case(rows, vocabulary, kept, *, hidden=16, seed=0, ragged=False, scale=2.0, temperature=1.0):
    """Hidden states, head, labels and a teacher whose rows come from its own dense logits."""
    g = torch.Generator().manual_seed(seed)
    states = torch.randn(rows, hidden, generator=g)
    head = torch.randn(vocabulary, hidden, generator=g) * scale / hidden**0.5
    labels = torch.randint(vocabulary, (rows,), generator=g)
    log_p = torch.log_softmax(torch.randn(rows, vocabulary, generator=g).double() * 3 / temperature, dim=1)
    values, ids = log_p.topk(kept, dim=1)
    if ragged:
        for row in range(rows):
            count = 1 + (row * 7 + seed) % kept
            values[row, count:] = -torch.inf
            ids[row, count:] = ids[row, 0]
    rest = (1 - values.exp().sum(dim=1)).clamp(min=0.0)
    # A row that keeps everything has nothing outside, not the rounding of 1 - sum p.
    rest[(~torch.isneginf(values)).sum(dim=1) == vocabulary] = 0.0
    return states, head, labels, SparseTeacher(ids, values.float(), rest.log().float())


def check(states, head, labels, teacher, *, tolerance=1e-5, floor=0.0, bias=None, **weights):
    leaves = [states.clone().requires_grad_(True), head.clone().requires_grad_(True)]
    if bias is not None:
        leaves.append(bias.clone().requires_grad_(True))
    sums = distillation_loss(
        leaves[0], leaves[1], labels, teacher, bias_V=leaves[2] if bias is not None else None, chunk_rows=3, **weights
    )
    grads = torch.autograd.grad(sums.total, leaves)
    total, ce, kl, truth = dense_loss(states, head, bias, labels, teacher, **weights)
    for found, expected in ((sums.total, total), (sums.ce, ce), (sums.divergence, kl)):
        assert float(found.detach()) == pytest.approx(float(expected), rel=max(1e-5, tolerance / 10), abs=1e-5)
    for found, expected in zip(grads, truth, strict=True):
        assert relative_error(found, expected) < tolerance or float((found - expected).abs().max()) < floor


DIVERGENCES = ["forward_kl", "soft_ce", "reverse_kl", "jsd"]

# The two that are symmetric in spirit are defined with the rest as a bin.
COMBINATIONS = [
    (d, t) for d in DIVERGENCES for t in ("lumped", "renormalised", "sampled") if t == "lumped" or d in DIVERGENCES[:2]
]
EVERY = [pytest.param(d, t, id=f"{d}-{t:g}") for d in DIVERGENCES for t in TEMPERATURES]


def sampled(rows, vocabulary, head, draws, *, temperature, seed=0):
    """A teacher with an exact head and weighted draws from the tail, ragged; no lumped rest."""
    g = torch.Generator().manual_seed(seed)
    log_p = torch.log_softmax(torch.randn(rows, vocabulary, generator=g).double() * 3 / temperature, dim=1)
    ids, log_probs, weights, counts = [], [], [], []
    for row in log_p:
        order = row.argsort(descending=True)
        tail = order[head:][
            torch.randperm(vocabulary - head, generator=g)[: int(torch.randint(draws + 1, (), generator=g))]
        ]
        kept = torch.cat([order[:head], tail])
        ids.append(kept)
        log_probs.append(row[kept])
        share = (1 - row[order[:head]].exp().sum()).log() - torch.log(torch.tensor(max(1.0, float(len(tail)))))
        weights.append(torch.cat([row[order[:head]], share.expand(len(tail))]))
        counts.append(len(kept))
    return SparseTeacher.from_ragged(
        torch.cat(ids), torch.cat(log_probs).float(), torch.tensor(counts), log_weights_E=torch.cat(weights).float()
    )


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize(("divergence", "tail"), COMBINATIONS)
def test_value_and_gradient_match_the_dense_oracle(temperature, divergence, tail):
    states, head, labels, teacher = make_case(11, 97, 8, ragged=True, temperature=temperature)
    if tail == "renormalised":
        teacher = teacher.renormalised()
    if tail == "sampled":
        teacher = sampled(11, 97, 4, 6, temperature=temperature)
    check(states, head, labels, teacher, temperature=temperature, ce_weight=0.3, kd_weight=0.7, divergence=divergence)


@pytest.mark.parametrize("beta", [0.1, 0.9])
def test_generalised_jsd_at_other_mixtures(beta):
    states, head, labels, teacher = make_case(6, 40, 5)
    check(states, head, labels, teacher, temperature=2.0, ce_weight=0.0, kd_weight=1.0, divergence="jsd", beta=beta)


def test_soft_cross_entropy_is_forward_kl_plus_the_teachers_entropy():
    states, head, labels, teacher = make_case(6, 40, 5)
    options = {"temperature": 2.0, "ce_weight": 0.0, "kd_weight": 1.0}
    kl = distillation_loss(states, head, labels, teacher, divergence="forward_kl", **options).divergence
    soft = distillation_loss(states, head, labels, teacher, divergence="soft_ce", **options).divergence
    log_bins = torch.cat([teacher.log_probs_NK, teacher.log_tail_N[:, None]], dim=1)
    assert float(soft - kl) == pytest.approx(float(-(log_bins.exp() * log_bins).sum()), rel=1e-5)


def test_sampling_the_tail_is_unbiased():
    """The mean gradient over many draws is that of the full distribution."""
    states, head, labels, _ = make_case(1, 40, 5)
    log_p = torch.log_softmax(torch.randn(1, 40, generator=torch.Generator().manual_seed(3)).double() * 2, dim=1)
    options = {"temperature": 1.0, "ce_weight": 0.0, "kd_weight": 1.0}

    def gradient(teacher):
        leaf = states.clone().requires_grad_(True)
        distillation_loss(leaf, head, labels, teacher, **options).total.backward()
        return leaf.grad.double()

    full = SparseTeacher(torch.arange(40)[None], log_p.float(), torch.tensor([-torch.inf]))
    order = log_p[0].argsort(descending=True)
    kept, tail = order[:4], order[4:]
    tail_p = log_p[0, tail].exp()
    rest = float(tail_p.sum())
    generator = torch.Generator().manual_seed(0)
    mean = torch.zeros_like(states, dtype=torch.float64)
    draws = 4000
    for pick in torch.multinomial(tail_p, draws, replacement=True, generator=generator):
        ids = torch.cat([kept, tail[pick : pick + 1]])[None]
        weights = torch.cat([log_p[0, kept], torch.tensor([rest]).log()])[None].float()
        drawn = SparseTeacher(ids, log_p[0, ids[0]][None].float(), torch.tensor([-torch.inf]), weights)
        mean += gradient(drawn) / draws
    truth = gradient(full)
    assert float((mean - truth).norm()) < 0.05 * float(truth.norm())


def test_rows_without_entries_have_only_a_rest():
    states, head, labels, _ = make_case(3, 20, 4)
    teacher = SparseTeacher.from_ragged(
        torch.tensor([5, 7, 9]),
        torch.tensor([0.5, 0.2, 0.1]).log(),
        torch.tensor([2, 0, 1]),
        torch.tensor([0.3, 1.0, 0.9]).log(),
    )
    sums = distillation_loss(states, head, labels, teacher, temperature=1.0, ce_weight=0.5, kd_weight=0.5)
    assert float(sums.divergence_N[1]) == pytest.approx(0.0, abs=1e-6)
    for divergence in DIVERGENCES:
        check(states, head, labels, teacher, temperature=1.0, ce_weight=0.5, kd_weight=0.5, divergence=divergence)
    nothing = SparseTeacher.from_ragged(
        torch.zeros(0, dtype=torch.int64), torch.zeros(0), torch.zeros(3, dtype=torch.int64), torch.zeros(3)
    )
    check(states, head, labels, nothing, temperature=2.0, ce_weight=0.5, kd_weight=0.5)


def test_ragged_and_padded_rows_are_the_same():
    _, _, _, padded = make_case(9, 50, 7, ragged=True)
    inside = ~torch.isneginf(padded.log_probs_NK)
    ragged = SparseTeacher.from_ragged(
        padded.ids_NK[inside], padded.log_probs_NK[inside], inside.sum(dim=1), padded.log_tail_N
    )
    width = ragged.ids_NK.shape[1]
    assert torch.equal(ragged.ids_NK, padded.ids_NK[:, :width])
    assert torch.equal(ragged.log_probs_NK, padded.log_probs_NK[:, :width])


def test_the_module_is_the_function_with_its_settings():
    states, head, labels, teacher = make_case(4, 30, 3)
    module = DistillationLoss(temperature=2.0, ce_weight=0.3, kd_weight=0.7, divergence="jsd", beta=0.3)
    options = {"temperature": 2.0, "ce_weight": 0.3, "kd_weight": 0.7, "divergence": "jsd", "beta": 0.3}
    assert torch.equal(
        module(states, head, labels, teacher).total, distillation_loss(states, head, labels, teacher, **options).total
    )
    assert "beta=0.3" in repr(module)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature should be above 0"),
        ({"divergence": "total_variation"}, "divergence should be one of forward_kl"),
        ({"divergence": "jsd", "beta": 1.0}, "beta of the generalised JSD"),
        ({"vocab_size": 31}, "vocab_size should lie between 1 and the head's 30 rows"),
        ({"chunk_rows": -1}, "chunk_rows"),
    ],
)
def test_impossible_settings_are_refused(change, message):
    states, head, labels, teacher = make_case(4, 30, 3)
    options = {"temperature": 2.0, "ce_weight": 0.3, "kd_weight": 0.7, **change}
    with pytest.raises(ValueError, match=message):
        distillation_loss(states, head, labels, teacher, **options)
    for divergence in ("reverse_kl", "jsd"):
        with pytest.raises(ValueError, match="sampled entries go with forward_kl"):
            distillation_loss(
                states, head, labels, sampled(4, 30, 2, 2, temperature=2.0), **WEIGHTS, divergence=divergence
            )
    with pytest.raises(ValueError, match="one row per position"):
        distillation_loss(states, head, labels[:-1], teacher, temperature=2.0, ce_weight=1, kd_weight=1)


def test_a_row_that_is_not_a_number_is_told_apart():
    states, head, labels, teacher = make_case(4, 30, 3)
    states[2] = torch.nan
    sums = distillation_loss(states, head, labels, teacher, temperature=2.0, ce_weight=0.3, kd_weight=0.7)
    assert torch.isfinite(sums.ce_N + sums.divergence_N).tolist() == [True, True, False, True]
    assert not torch.isfinite(sums.total)


@pytest.mark.parametrize(("ce_weight", "kd_weight"), [(1.0, 0.0), (0.0, 1.0)])
def test_each_term_alone(ce_weight, kd_weight):
    states, head, labels, teacher = make_case(7, 50, 5)
    check(states, head, labels, teacher, temperature=2.0, ce_weight=ce_weight, kd_weight=kd_weight)


@pytest.mark.parametrize(("divergence", "temperature"), EVERY)
@pytest.mark.parametrize(("rows", "vocabulary", "kept"), [(1, 40, 4), (5, 40, 1), (5, 6, 6), (4, 2, 1)])
@pytest.mark.parametrize("offset", [0.0, 200.0, -200.0])
def test_awkward_shapes(rows, vocabulary, kept, divergence, temperature, offset):
    """Few rows, one entry, everything kept; and logits far from 0, where an exponential overflows if nothing is outside."""
    states, head, labels, teacher = make_case(rows, vocabulary, kept, temperature=temperature)
    bias = torch.full((vocabulary,), offset)
    weights = {"temperature": temperature, "ce_weight": 0.5, "kd_weight": 0.5, "divergence": divergence}
    # Logits of 200 in float32 have lost two digits before the loss sees them.
    check(states, head, labels, teacher, bias=bias, tolerance=1e-5 if offset == 0 else 1e-3, **weights)


def test_label_outside_and_inside_the_kept_set():
    states, head, _, teacher = make_case(2, 30, 4)
    inside = int(teacher.ids_NK[0, 1])
    outside = next(v for v in range(30) if v not in teacher.ids_NK[1].tolist())
    labels = torch.tensor([inside, outside])
    check(states, head, labels, teacher, temperature=2.0, ce_weight=0.5, kd_weight=0.5)


def test_head_bias_gets_its_gradient():
    states, head, labels, teacher = make_case(6, 33, 5)
    check(states, head, labels, teacher, bias=torch.linspace(-1, 1, 33), temperature=2.0, ce_weight=0.5, kd_weight=0.5)


@pytest.mark.parametrize(("divergence", "temperature"), EVERY)
def test_equal_logits(divergence, temperature):
    states, head, labels, teacher = make_case(3, 20, 4, temperature=temperature)
    weights = {"temperature": temperature, "ce_weight": 0.5, "kd_weight": 0.5, "divergence": divergence}
    check(torch.zeros_like(states), head, labels, teacher, **weights)


def test_padded_vocabulary_is_as_if_it_were_not_there():
    states, head, labels, teacher = make_case(5, 24, 4)
    padded = torch.cat([head, torch.full((8, head.shape[1]), 9.0)])
    options = {"temperature": 2.0, "ce_weight": 0.5, "kd_weight": 0.5}
    a, b = states.clone().requires_grad_(True), states.clone().requires_grad_(True)
    wide = padded.clone().requires_grad_(True)
    plain = distillation_loss(a, head, labels, teacher, **options)
    cut = distillation_loss(b, wide, labels, teacher, vocab_size=24, **options)
    plain.total.backward()
    cut.total.backward()
    assert torch.equal(plain.total, cut.total)
    assert torch.equal(a.grad, b.grad)
    assert not wide.grad[24:].any()


def test_student_far_from_the_teacher_is_never_clamped():
    # The student puts e**-200 outside its favourite: exponentials underflow, the loss must not.
    states, head = torch.ones(1, 1), torch.tensor([[200.0], [0.0], [0.0], [0.0]])
    teacher = SparseTeacher(torch.tensor([[1]]), torch.tensor([[0.5]]).log(), torch.tensor([0.5]).log())
    weights = {"temperature": 1.0, "ce_weight": 0.0, "kd_weight": 1.0}
    check(states, head, torch.tensor([1]), teacher, **weights)
    outside = SparseTeacher(torch.tensor([[0]]), torch.tensor([[0.5]]).log(), torch.tensor([0.5]).log())
    check(states, head, torch.tensor([1]), outside, **weights)


def test_impossible_student_entries_give_no_nan():
    states, head, labels, teacher = make_case(2, 12, 3)
    bias = torch.zeros(12)
    free = next(v for v in range(12) if v not in teacher.ids_NK and v not in labels)
    bias[free] = -torch.inf
    leaf = states.clone().requires_grad_(True)
    sums = distillation_loss(leaf, head, labels, teacher, bias_V=bias, temperature=2.0, ce_weight=0.5, kd_weight=0.5)
    sums.total.backward()
    assert torch.isfinite(sums.total)
    assert torch.isfinite(leaf.grad).all()


def test_student_equal_to_teacher_has_no_kl_and_no_kd_gradient():
    states, head, labels, _ = make_case(6, 40, 5)
    log_p = torch.log_softmax((states.double() @ head.double().T) / 2, dim=1)
    values, ids = log_p.topk(5, dim=1)
    teacher = SparseTeacher(ids, values.float(), (1 - values.exp().sum(1)).log().float())
    leaf = states.clone().requires_grad_(True)
    sums = distillation_loss(leaf, head, labels, teacher, temperature=2.0, ce_weight=0.0, kd_weight=1.0)
    sums.total.backward()
    assert abs(float(sums.divergence)) < 1e-5
    assert leaf.grad.norm() < 1e-5


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradcheck_in_float64(divergence):
    states, head, labels, teacher = make_case(4, 9, 3, hidden=5, ragged=True)
    exact = teacher.rows(slice(None), torch.float64)
    leaves = (states.double().requires_grad_(True), head.double().requires_grad_(True))

    def total(hidden, weight):
        return distillation_loss(
            hidden,
            weight,
            labels,
            exact,
            temperature=2.0,
            ce_weight=0.4,
            kd_weight=0.6,
            divergence=divergence,
            chunk_rows=2,
        ).total

    assert torch.autograd.gradcheck(total, leaves)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 9),
    vocabulary=st.integers(2, 60),
    seed=st.integers(0, 1000),
    chunk=st.integers(1, 10),
    temperature=st.sampled_from(TEMPERATURES),
    divergence=st.sampled_from(DIVERGENCES),
    data=st.data(),
)
def test_sums_do_not_depend_on_chunks_or_on_how_rows_are_split(
    rows, vocabulary, seed, chunk, temperature, divergence, data
):
    kept = data.draw(st.integers(1, vocabulary))
    states, head, labels, teacher = make_case(rows, vocabulary, kept, seed=seed, ragged=True, temperature=temperature)
    options = {"temperature": temperature, "ce_weight": 0.5, "kd_weight": 0.5, "divergence": divergence}
    whole = distillation_loss(states, head, labels, teacher, chunk_rows=chunk, **options)
    cut = data.draw(st.integers(0, rows))
    parts = []
    for span in (slice(0, cut), slice(cut, rows)):
        part = SparseTeacher(teacher.ids_NK[span], teacher.log_probs_NK[span], teacher.log_tail_N[span])
        parts.append(distillation_loss(states[span], head, labels[span], part, **options))
    assert float(whole.total) == pytest.approx(float(parts[0].total + parts[1].total), rel=1e-5, abs=1e-4)
    # Where student and teacher are both nearly certain, 1 - q is left of the gradient, and float32 knows q to 6e-8.
    check(states, head, labels, teacher, tolerance=2e-5, floor=1e-6, **options)


def test_bfloat16_hidden_states_are_no_worse_than_the_naive_way():
    states, head, labels, teacher = make_case(32, 200, 8, hidden=32, temperature=2.0)
    half = states.bfloat16()
    weights = {"temperature": 2.0, "ce_weight": 0.5, "kd_weight": 0.5}
    narrow = head.bfloat16()
    truth = dense_loss(half, narrow, None, labels, teacher, **weights)[3][0]
    naive = half.clone().requires_grad_(True)
    p, kept, rho = dense_teacher(teacher.ids_NK, teacher.log_probs_NK, teacher.log_tail_N, len(head))
    loss_from_logits((naive @ narrow.T).float(), labels, p.float(), kept, rho.float(), **weights)[0].backward()
    ours = relative_error(gradient_of(half, narrow, labels, teacher, **weights), truth)
    assert ours <= relative_error(naive.grad, truth)
    assert ours < 4e-3  # one rounding to bfloat16


@pytest.mark.parametrize(("divergence", "temperature"), EVERY)
def test_a_real_vocabulary_matches_the_oracle(divergence, temperature):
    """V = 151,936: sums over so many terms in float32 must not drift."""
    states, head, labels, teacher = make_case(2, 151_936, 32, hidden=8, temperature=temperature)
    weights = {"temperature": temperature, "ce_weight": 0.5, "kd_weight": 0.5, "divergence": divergence}
    check(states, head, labels, teacher, **weights)


def gradient_of(states, head, labels, teacher, scale=1.0, **weights):
    leaf = states.clone().requires_grad_(True)
    (distillation_loss(leaf, head, labels, teacher, **weights).total * scale).backward()
    return leaf.grad


WEIGHTS = {"temperature": 2.0, "ce_weight": 0.5, "kd_weight": 0.5}


def test_autocast_outside_changes_nothing_inside():
    states, head, labels, teacher = make_case(8, 60, 6)
    with torch.autocast("cpu", torch.bfloat16):
        inside = gradient_of(states, head, labels, teacher, **WEIGHTS)
    assert torch.equal(inside, gradient_of(states, head, labels, teacher, **WEIGHTS))


@pytest.mark.parametrize("scale", [1 / 307, 1 / 322, 65536.0])
def test_the_scale_from_above_is_not_rounded_to_half_precision(scale):
    states, head, labels, teacher = make_case(64, 60, 6, hidden=32)
    exact = gradient_of(states.bfloat16().float(), head, labels, teacher, scale, **WEIGHTS)
    found = gradient_of(states.bfloat16(), head, labels, teacher, scale, **WEIGHTS)
    ratio = float((found.double() * exact.double()).sum() / (exact.double() ** 2).sum())
    assert abs(ratio - 1) < 5e-4


def test_no_gradient_is_computed_where_none_is_wanted(monkeypatch):
    from kdcache.student import row_passes

    states, head, labels, teacher = make_case(4, 30, 3)
    head.requires_grad_(True)

    def unwanted(*args):
        raise AssertionError("the second pass ran")

    monkeypatch.setattr(row_passes, "outside_gradient_", unwanted)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert torch.isfinite(distillation_loss(states, head, labels, teacher, **WEIGHTS).total)


def test_any_id_may_fill_a_short_row():
    states, head, labels, teacher = make_case(6, 40, 5, ragged=True)
    fills = torch.isneginf(teacher.log_probs_NK)
    zeros = SparseTeacher(teacher.ids_NK.masked_fill(fills, 0), teacher.log_probs_NK, teacher.log_tail_N)
    a = distillation_loss(states, head, labels, teacher, **WEIGHTS)
    b = distillation_loss(states, head, labels, zeros, **WEIGHTS)
    assert torch.equal(a.ce_N, b.ce_N)
    assert torch.equal(a.divergence_N, b.divergence_N)


def test_empty_rows_under_every_tail_and_weight():
    states, head, labels, _ = make_case(2, 20, 4)
    teacher = SparseTeacher.from_ragged(
        torch.tensor([5, 7]), torch.tensor([0.5, 0.2]).log(), torch.tensor([2, 0]), torch.tensor([0.3, 1.0]).log()
    )
    assert torch.isfinite(gradient_of(states, head, labels, teacher.renormalised(), **WEIGHTS)).all()
    no_rest = teacher.renormalised()
    ce_alone = gradient_of(
        states, head, labels, no_rest, temperature=2.0, ce_weight=1.0, kd_weight=0.0, divergence="reverse_kl"
    )
    plain = torch.autograd.grad(
        torch.nn.functional.cross_entropy((x := states.clone().requires_grad_(True)) @ head.T, labels, reduction="sum"),
        x,
    )[0]
    assert torch.allclose(ce_alone, plain, atol=1e-5)


def test_a_teacher_that_is_not_a_number_is_no_loss():
    states, head, labels, teacher = make_case(4, 30, 3)
    teacher.log_probs_NK[1, 2] = torch.nan
    sums = distillation_loss(states, head, labels, teacher, **WEIGHTS)
    assert torch.isnan(sums.divergence_N).tolist() == [False, True, False, False]
