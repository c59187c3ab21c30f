"""The loss on CUDA, through the Triton kernels, against the float64 oracle and against the torch passes."""

import pytest
import torch

from kdcache.student import chunked_loss, row_passes
from kdcache.student.loss import SparseTeacher, distillation_loss
from tests.gpu.device import DEVICE, cuda_alone, on_gpu
from tests.reference import dense_loss, relative_error
from tests.student.test_loss import COMBINATIONS, TEMPERATURES, make_case, sampled

pytestmark = on_gpu

WEIGHTS = {"ce_weight": 0.3, "kd_weight": 0.7}
# More than one block of the kernels, and the last one not full.
VOCABULARY = 9001
# Gradients of half-precision tensors are rounded to half precision; values are not.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def on_device(teacher):
    """The teacher's tensors on the device."""
    weights = teacher.log_weights_NK
    return SparseTeacher(
        teacher.ids_NK.to(DEVICE),
        teacher.log_probs_NK.to(DEVICE),
        teacher.log_tail_N.to(DEVICE),
        None if weights is None else weights.to(DEVICE),
    )


@cuda_alone
def test_cuda_takes_the_triton_passes():
    pytest.importorskip("triton", reason="Triton is not installed; the torch passes are taken")
    from kdcache.student import row_passes_triton

    assert chunked_loss._passes(torch.zeros(1, device=DEVICE)) is row_passes_triton
    assert chunked_loss._passes(torch.zeros(1, device=DEVICE, dtype=torch.float64)) is row_passes


@pytest.mark.parametrize("dtype", TOLERANCES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize(("divergence", "tail"), COMBINATIONS)
def test_value_and_gradient_match_the_dense_oracle(divergence, tail, temperature, dtype):
    states, head, labels, teacher = make_case(11, VOCABULARY, 8, ragged=True, temperature=temperature)
    if tail == "renormalised":
        teacher = teacher.renormalised()
    if tail == "sampled":
        teacher = sampled(11, VOCABULARY, 4, 6, temperature=temperature)
    options = {**WEIGHTS, "temperature": temperature, "divergence": divergence}
    # What is rounded before the loss sees it is no error of the loss.
    states, head = states.to(dtype), head.to(dtype)
    total, ce, kd, truth = dense_loss(states, head, None, labels, teacher, **options)
    leaves = [t.to(DEVICE).requires_grad_(True) for t in (states, head)]
    sums = distillation_loss(*leaves, labels.to(DEVICE), on_device(teacher), chunk_rows=4, **options)
    for found, exact in ((sums.total, total), (sums.ce, ce), (sums.divergence, kd)):
        assert float(found.detach()) == pytest.approx(float(exact), rel=1e-5, abs=1e-5)
    # As a training step scales it, down from a sum.
    for found, exact in zip(torch.autograd.grad(sums.total, leaves), truth, strict=True):
        assert found.dtype == dtype
        assert relative_error(found.cpu(), exact) < TOLERANCES[dtype]


@cuda_alone
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("width", [7, 4096, 151_936])
def test_the_kernels_against_float64(width, temperature):
    kernels = pytest.importorskip("kdcache.student.row_passes_triton", reason="Triton is not installed")
    logits = torch.randn(32, width, generator=torch.Generator().manual_seed(0)) * 5
    # Gaps, a single entry, nothing at all, and far out.
    logits[1, ::3] = -torch.inf
    logits[2, 1:] = -torch.inf
    logits[3] = -torch.inf
    logits[4] += 1e4
    logits = logits.to(DEVICE)
    truth, work = logits.double(), logits.clone()
    sums = kernels.outside_sums(work, temperature)
    for found, exact in (
        (sums.log_sum_T_C, torch.logsumexp(truth / temperature, dim=1)),
        (sums.log_sum_1_C, torch.logsumexp(truth, dim=1)),
    ):
        assert torch.equal(torch.isneginf(found), torch.isneginf(exact))
        there = torch.isfinite(exact)
        assert torch.allclose(found[there].double(), exact[there], rtol=1e-6, atol=1e-5)
    factor_T, factor_1 = torch.linspace(-1, 1, 32, device=DEVICE), torch.linspace(0.5, 2, 32, device=DEVICE)
    gradient = kernels.outside_gradient_(work, sums, factor_T, factor_1, temperature)
    relative = truth - sums.top_C.double()[:, None]
    exact = factor_T.double()[:, None] * (relative / temperature).exp() + factor_1.double()[:, None] * relative.exp()
    assert gradient.data_ptr() == work.data_ptr()
    assert relative_error(gradient, exact) < 5e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_true_width_the_kernels_give_what_the_torch_passes_give(dtype, monkeypatch):
    """V = 151,936, a frozen head, the chunks a training step takes."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(48, 64, generator=generator).to(DEVICE, dtype)
    head = (torch.randn(151_936, 64, generator=generator) / 4).to(DEVICE, dtype)
    labels = torch.randint(151_936, (48,), generator=generator).to(DEVICE)
    ids = torch.stack([torch.randperm(151_936, generator=generator)[:32] for _ in range(48)])
    log_p = torch.log_softmax(torch.randn(48, 32, generator=generator) * 2, dim=1) + torch.tensor(0.9).log()
    teacher = on_device(SparseTeacher(ids, log_p, torch.full((48,), 0.1).log()))

    def outcome():
        leaf = hidden.clone().requires_grad_(True)
        sums = distillation_loss(leaf, head, labels, teacher, temperature=2.0, chunk_rows=20, **WEIGHTS)
        return sums, torch.autograd.grad(sums.total, leaf)[0]

    sums, gradient = outcome()
    monkeypatch.setattr(chunked_loss, "_passes", lambda hidden: row_passes)
    reference, truth = outcome()
    assert torch.allclose(sums.ce_N, reference.ce_N, rtol=1e-5)
    assert torch.allclose(sums.divergence_N, reference.divergence_N, rtol=1e-4, atol=1e-5)
    assert relative_error(gradient, truth) < (1e-5 if dtype == torch.float32 else 4e-3)
