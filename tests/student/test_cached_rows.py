"""Rows of every method through the collator into the loss, against dense float64 arithmetic on the teacher's own logits."""

import dataclasses

import numpy as np
import pytest
import torch

from kdcache.errors import CacheError
from kdcache.student.collate import sparse_teacher
from kdcache.student.divergence import _shares
from kdcache.student.loss import SparseTeacher, distillation_loss
from kdcache.teacher.select import Selection, select
from tests.reference import log_softmax, loss_from_logits, relative_error

V, D, N = 80, 12, 14
T12 = (1.0, 2.0)
SELECTIONS = {
    "top_k": Selection("top_k", T12, k=7),
    "threshold": Selection("threshold", T12, k=9, floors=(0.02, 0.03)),
    "threshold_sampling": Selection("threshold_sampling", T12, floors=(0.06, 0.04)),
    "random_sampling": Selection("random_sampling", (1.0,), draws=11),
    "ids_alone": Selection("threshold_sampling", (2.0,), floors=(0.05,), tail_logits=False),
}
WEIGHTS = {"ce_weight": 0.3, "kd_weight": 0.7}
CASES = [(m, t) for m, s in SELECTIONS.items() for t in (1.0, 1.5, 2.0) if s.temperatures[0] <= t <= s.temperatures[-1]]


def student(rows=N, seed=0):
    g = torch.Generator().manual_seed(seed)
    states, head = torch.randn(rows, D, generator=g), torch.randn(V, D, generator=g) * 0.6
    return states, head, torch.randint(V, (rows,), generator=g)


def teacher_logits(rows=N, seed=1):
    return torch.randn(rows, V, generator=torch.Generator().manual_seed(seed)) * 2.5


def chosen_rows(method, logits, *, empty=True, seed=0):
    """Selected rows, every fourth left empty."""
    selection = SELECTIONS[method]
    uniforms = np.random.default_rng(seed).random((len(logits), selection.uniforms))
    rows = select(logits, torch.zeros(len(logits), dtype=torch.int64), selection, uniforms).rows
    if not empty:
        return rows
    rows = rows.emptied(np.arange(len(rows)) % 4 != 2)
    return dataclasses.replace(rows, design=dataclasses.replace(rows.design, some_empty=True))


def dense_target(rows, logits, temperature, tail="auto"):
    """Weights, kept mask, mass outside and log p of every row, from the dense logits and the ids that were chosen alone."""
    log_p = log_softmax(logits.numpy(), temperature)
    if temperature not in rows.design.temperatures:
        # The partition is interpolated there, which is held elsewhere; all else is exact.
        relative = logits.double().numpy() - logits.double().numpy().max(axis=1, keepdims=True)
        log_p = np.where(
            rows.kept[:, None], relative / temperature - rows.log_partition_at(temperature)[:, None], log_p
        )
    weight, kept, rho = np.zeros((len(rows), V)), np.zeros((len(rows), V), dtype=bool), np.zeros(len(rows))
    sampled = tail == "auto" and rows.design.sampled
    reach = np.max(
        [np.exp(log_softmax(logits.numpy(), t)) / f for t, f in zip(rows.design.temperatures, rows.design.floors, strict=False)]
        or [np.ones((len(rows), V))],
        axis=0,
    )  # fmt: skip
    for row in range(len(rows)):
        own = rows.slice(row, row + 1)
        head, drawn = own.head_ids.astype(int), own.tail_ids.astype(int)
        weight[row, head], kept[row, head] = np.exp(log_p[row, head]), True
        if sampled:
            kept[row, drawn] = True
            weight[row, drawn] = np.exp(log_p[row, drawn]) / reach[row, drawn]
        elif rows.kept[row]:
            rho[row] = 1.0 - weight[row, head].sum()
        if sampled and rows.design.draws:
            times = np.zeros(V)
            times[head], times[drawn] = own.head_counts, own.tail_counts
            weight[row] = times / rows.design.draws * np.exp(log_p[row] - log_softmax(logits.numpy())[row])
    if not rows.design.tail_logits and sampled:
        # Entries without logits share their mean, on the scale of logits.
        for row in range(len(rows)):
            drawn = rows.slice(row, row + 1).tail_ids.astype(int)
            log_p[row, drawn] = log_p[row, drawn].mean() if len(drawn) else 0.0
    return [torch.from_numpy(x) for x in (weight, kept, rho, log_p)]


def assert_like_the_oracle(states, head, labels, teacher, target, temperature, **options):
    leaves = [states.clone().requires_grad_(True), head.clone().requires_grad_(True)]
    sums = distillation_loss(*leaves, labels, teacher, temperature=temperature, chunk_rows=4, **WEIGHTS, **options)
    found = torch.autograd.grad(sums.total, leaves)
    exact = [leaf.detach().double().requires_grad_(True) for leaf in leaves]
    weight, kept, rho, log_p = target
    total, ce, kd = loss_from_logits(
        exact[0] @ exact[1].T, labels, weight, kept, rho, log_p=log_p, temperature=temperature, **WEIGHTS, **options
    )
    for ours, truth in ((sums.total, total), (sums.ce, ce), (sums.divergence, kd)):
        assert float(ours.detach()) == pytest.approx(float(truth.detach()), rel=2e-5)
    for ours, truth in zip(found, torch.autograd.grad(total, exact), strict=True):
        assert relative_error(ours, truth) < 2e-5
    return sums


@pytest.mark.parametrize("divergence", ["forward_kl", "soft_ce"])
@pytest.mark.parametrize(("method", "temperature"), CASES)
def test_value_and_gradient_match_the_dense_oracle(method, temperature, divergence):
    logits = teacher_logits()
    rows = chosen_rows(method, logits)
    teacher = sparse_teacher(rows, temperature)
    assert (teacher.log_weights_NK is not None) == rows.design.sampled
    target = dense_target(rows, logits, temperature)
    sums = assert_like_the_oracle(*student(), teacher, target, temperature, divergence=divergence)
    assert not sums.divergence_N[~torch.from_numpy(rows.kept)].any()


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("method", SELECTIONS)
def test_lumped_leaves_drawn_entries_out_and_matches_the_oracle(method, divergence):
    logits = teacher_logits()
    rows = chosen_rows(method, logits, empty=False)
    temperature = rows.design.temperatures[0]
    teacher = sparse_teacher(rows, temperature, "lumped")
    assert teacher.log_weights_NK is None
    assert teacher.ids_NK.shape[1] == rows.head.max()
    target = dense_target(rows, logits, temperature, "lumped")
    # The bins of these two need the mass outside as a logarithm of its own.
    assert_like_the_oracle(*student(), teacher, [*target[:3], None], temperature, divergence=divergence)


@pytest.mark.parametrize("method", SELECTIONS)
def test_renormalised_rows_add_up_to_one_and_empty_ones_stay_empty(method):
    rows = chosen_rows(method, teacher_logits())
    teacher = sparse_teacher(rows, 2.0, "renormalised")
    mass = teacher.log_probs_NK.exp().sum(dim=1)
    assert torch.allclose(mass, torch.from_numpy(rows.kept).float(), atol=1e-5)
    assert torch.isneginf(teacher.log_tail_N).all()


def test_drawn_ids_without_logits_serve_their_own_temperature_alone():
    rows = chosen_rows("ids_alone", teacher_logits())
    for temperature in (1.0, 1.5):
        with pytest.raises(CacheError, match="is below the cache's smallest declared temperature 2"):
            sparse_teacher(rows, temperature)
    assert sparse_teacher(rows, 2.0).log_weights_NK is not None
    assert sparse_teacher(rows, 2.5).log_weights_NK is None
    assert len(sparse_teacher(rows, 2.5, "lumped").log_tail_N) == N


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("method", ["threshold_sampling", "random_sampling", "ids_alone"])
def test_the_mean_gradient_over_all_draws_is_that_of_the_whole_distribution(method, temperature):
    selection = SELECTIONS[method]
    if temperature not in selection.temperatures:
        selection = dataclasses.replace(selection, temperatures=(temperature,))
    many = 2048
    logits = teacher_logits(1)
    points = (np.arange(many * selection.uniforms) + 0.5) / (many * selection.uniforms)
    uniforms = np.random.default_rng(0).permutation(points).reshape(many, -1)
    rows = select(logits.repeat(many, 1), torch.zeros(many, dtype=torch.int64), selection, uniforms).rows
    states, head, labels = student(1)
    leaf = states.repeat(many, 1).requires_grad_(True)
    options = {"temperature": temperature, "ce_weight": 0.0, "kd_weight": 1.0}
    distillation_loss(leaf, head, labels.repeat(many), sparse_teacher(rows, temperature), **options).total.backward()
    exact = states.double().requires_grad_(True)
    log_p = torch.from_numpy(log_softmax(logits.numpy(), temperature))
    log_q = torch.log_softmax(exact @ head.double().T / temperature, dim=1)
    (temperature**2 * (log_p.exp() * (log_p - log_q)).sum()).backward()
    assert relative_error(leaf.grad.double().mean(dim=0, keepdim=True), exact.grad) < 2e-3
    # And a single draw is not it already.
    assert relative_error(leaf.grad[:1], exact.grad) > 1e-2


@pytest.mark.parametrize(
    ("temperature", "learnt", "most"),
    [(1.0, 1.0, 0.6), (1.5, 1.0, 0.6), (2.0, 1.0, 0.6), (1.0, 0.0, 1.02), (2.0, 0.0, 1.02)],
)
def test_a_control_variate_takes_noise_away_and_nothing_else(temperature, learnt, most):
    """Over evenly spread draws the mean gradient stays that of the whole distribution, and each is nearer to it; or no
    farther, where the student is no guide to its teacher."""
    many, selection = 8192, Selection("threshold_sampling", (temperature,), floors=(0.05,))
    logits = teacher_logits(1)
    uniforms = (np.random.default_rng(0).permutation(many) + 0.5)[:, None] / many
    rows = select(logits.repeat(many, 1), torch.zeros(many, dtype=torch.int64), selection, uniforms).rows
    states, head, labels = student(1)
    # A student on its way: a head that gives the teacher's logits, and some of its own.
    own = learnt * torch.linalg.lstsq(states, logits).solution.T + (0.3 if learnt else 2.0) * head
    found = {}
    for control in (False, True):
        leaf = states.repeat(many, 1).requires_grad_(True)
        sums = distillation_loss(
            leaf, own, labels.repeat(many), sparse_teacher(rows, temperature), temperature=temperature, ce_weight=0.2,
            kd_weight=0.8, control_variate=control,
        )  # fmt: skip
        sums.total.backward()
        found[control] = leaf.grad.double(), sums.divergence_N
    exact = states.double().requires_grad_(True)
    log_p = torch.from_numpy(log_softmax(logits.numpy(), temperature))
    x = exact @ own.double().T
    kl = (log_p.exp() * (log_p - torch.log_softmax(x / temperature, dim=1))).sum()
    (0.2 * torch.nn.functional.cross_entropy(x, labels) + 0.8 * temperature**2 * kl).backward()
    plain, controlled = (found[c][0] for c in (False, True))
    for gradient in (plain, controlled):
        assert relative_error(gradient.mean(dim=0, keepdim=True), exact.grad) < 2e-3
    noise = [float((g - exact.grad).square().sum(dim=1).mean()) for g in (plain, controlled)]
    assert noise[1] < most * noise[0]
    assert torch.equal(found[False][1], found[True][1])


def test_a_control_variate_changes_nothing_where_there_is_nothing_to_guess():
    logits, weights = teacher_logits(), {"ce_weight": 0.5, "kd_weight": 0.5}
    states, head, labels = student()
    for method, temperature, tail in (
        ("top_k", 2.0, "auto"), ("threshold_sampling", 2.0, "lumped"),
    ):  # fmt: skip
        teacher = sparse_teacher(chosen_rows(method, logits), temperature, tail)
        found = []
        for control in (False, True):
            leaf = states.clone().requires_grad_(True)
            distillation_loss(
                leaf, head, labels, teacher, temperature=temperature, control_variate=control, **weights
            ).total.backward()
            found.append(leaf.grad)
        assert torch.equal(*found)
    # Rows that are empty, whose head is everything, or from which nothing was drawn, stay finite and the first without gradient.
    teacher = sparse_teacher(chosen_rows("threshold_sampling", logits), 2.0)
    leaf = states.clone().requires_grad_(True)
    distillation_loss(
        leaf, head, labels, teacher, temperature=2.0, control_variate=True, ce_weight=0.0, kd_weight=1.0
    ).total.backward()
    assert leaf.grad.isfinite().all()
    assert not leaf.grad[2::4].any()
    whole = SparseTeacher(torch.arange(V)[None], torch.log_softmax(logits[:1] / 2, dim=1), torch.tensor([-torch.inf]),
                          torch.log_softmax(logits[:1] / 2, dim=1))  # fmt: skip
    plain, other = (
        torch.autograd.grad(
            distillation_loss(
                leaf := states[:1].clone().requires_grad_(True), head, labels[:1], whole, temperature=2.0,
                control_variate=control, **weights,
            ).total,
            leaf,
        )[0]
        for control in (False, True)
    )  # fmt: skip
    assert torch.allclose(plain, other, rtol=1e-4, atol=1e-6)


def test_a_rows_guess_is_weighed_by_the_draws_of_the_others():
    """Against the sums written out; a row that is alone is left as it was."""
    logits = teacher_logits()
    teacher = sparse_teacher(chosen_rows("threshold_sampling", logits), 2.0)
    states, _, labels = student()
    near = torch.linalg.lstsq(states, logits).solution.T
    weights = {"temperature": 2.0, "ce_weight": 0.0, "kd_weight": 1.0}

    def gradient(head, rows, **options):
        leaf = states[rows].clone().requires_grad_(True)
        part = teacher.rows(rows, torch.float32)
        distillation_loss(leaf, head, labels[rows], part, **weights, **options).total.backward()
        return leaf.grad

    log_p, log_w = teacher.log_probs_NK.double(), teacher.log_weights_NK.double()
    drawn = (log_p > -torch.inf) & (log_w - log_p > 1e-4)
    p, times = torch.where(drawn, log_p.exp(), 0.0), torch.where(drawn, (log_w - log_p).exp(), 1.0)
    log_q = torch.log_softmax(states.double() @ near.double().T / 2.0, dim=1)
    expected, sums = [], []
    for i in range(len(states)):
        exact = teacher.ids_NK[i][(log_p[i] > -torch.inf) & ~drawn[i]]
        outside = torch.ones(V, dtype=torch.bool)
        outside[exact] = False
        rho = 1.0 - log_p[i][(log_p[i] > -torch.inf) & ~drawn[i]].exp().sum() if len(exact) else torch.tensor(0.0)
        guess = torch.where(outside, rho * log_q[i].exp() / log_q[i][outside].exp().sum(), 0.0)
        m = torch.where(drawn[i], guess[teacher.ids_NK[i]], 0.0)
        counted = times[i] * (times[i] - 1.0) * m
        sums.append((float((counted * p[i]).sum()), float((counted * m).sum())))
        expected.append((guess, m))
    for i in range(len(states)):
        others = [s for j, s in enumerate(sums) if j != i]
        best = min(1.0, sum(a for a, _ in others) / sum(b for _, b in others))
        draws = int(drawn.sum()) - int(drawn[i].sum())
        share = max(0.0, (best - 0.2) / 0.8) * draws / (draws + 200)
        guess, m = expected[i]
        target = torch.zeros(V, dtype=torch.float64)
        target.index_add_(0, teacher.ids_NK[i][log_p[i] > -torch.inf], log_w[i][log_p[i] > -torch.inf].exp())
        target += share * guess
        target.index_add_(0, teacher.ids_NK[i][drawn[i]], -share * (m * times[i])[drawn[i]])
        by_logits = 2.0 * (target.sum() * log_q[i].exp() - target)
        found = gradient(near, slice(None), control_variate=True)[i].double()
        assert torch.allclose(found, by_logits @ near.double(), rtol=1e-3, atol=1e-4), i
        assert share > 0.01
    alone = slice(0, 1)
    assert torch.equal(gradient(near, alone, control_variate=True), gradient(near, alone))


def test_shares_are_told_by_the_others_alone_however_large_a_row_is():
    times, p = torch.full((4, 50), 3.0), torch.full((4, 50), 0.01)
    right = torch.ones(4) * 150 / (150 + 200)
    assert torch.allclose(_shares(0.5 * p, p, times), right)
    # A guess of half is taken as a whole and no more; one of twice the teacher by half of it, less what is doubted.
    assert torch.allclose(_shares(2.0 * p, p, times), (0.5 - 0.2) / 0.8 * right)
    # One row of huge terms says that its guess is bad. It is told so by nobody, and tells everybody else.
    times[0], p[0] = 1e5, 1e-7
    guess = torch.full((4, 50), 0.01)
    shares = _shares(guess, p, times)
    assert torch.allclose(shares[0], right[0])
    assert not shares[1:].any()


def test_draws_serve_up_to_the_largest_declared_temperature_and_a_bucket_above():
    logits = torch.randn(6, 200, generator=torch.Generator().manual_seed(0)) * 3
    selection = Selection("threshold_sampling", (1.0, 2.0), floors=(0.05, 0.05))
    rows = select(logits, torch.zeros(6, dtype=torch.int64), selection, np.full((6, 1), 0.4)).rows
    assert (rows.tail > 0).any()
    for t in (1.0, 1.5, 2.0):
        assert sparse_teacher(rows, t).log_weights_NK is not None
    above = sparse_teacher(rows, 3.0)
    lumped = sparse_teacher(rows, 3.0, "lumped")
    assert above.log_weights_NK is None
    assert torch.equal(above.log_probs_NK, lumped.log_probs_NK)
    assert torch.equal(above.log_tail_N, lumped.log_tail_N)
    assert torch.isfinite(above.log_tail_N).all()
