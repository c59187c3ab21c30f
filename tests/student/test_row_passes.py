"""The passes over the vocabulary: the torch ones against float64, the Triton ones against them under the interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kdcache.student import row_passes

TEMPERATURES = [0.5, 1.0, 1.5, 2.0, 4.0]


def rows_with(vocabulary):
    """Ordinary rows, a row with gaps, one with a single entry left, one with nothing left, one far out."""
    logits = torch.randn(5, vocabulary, generator=torch.Generator().manual_seed(0)) * 5
    logits[1, ::3] = -torch.inf
    logits[2] = -torch.inf
    logits[2, vocabulary // 2] = 3.0
    logits[3] = -torch.inf
    logits[4] += 1e4
    return logits


def check_passes(passes, temperature, vocabulary):
    logits = rows_with(vocabulary)
    truth = logits.double()
    work = logits.clone()
    sums = passes.outside_sums(work, temperature)
    for found, exact in (
        (sums.log_sum_T_C, torch.logsumexp(truth / temperature, dim=1)),
        (sums.log_sum_1_C, torch.logsumexp(truth, dim=1)),
    ):
        assert torch.equal(torch.isneginf(found), torch.isneginf(exact))
        there = torch.isfinite(exact)
        assert torch.allclose(found[there].double(), exact[there], rtol=1e-6, atol=1e-5)
    factor_T, factor_1 = torch.linspace(-1, 1, 5), torch.linspace(0.5, 2, 5)
    gradient = passes.outside_gradient_(work, sums, factor_T, factor_1, temperature)
    relative = truth - sums.top_C.double()[:, None]
    exact = factor_T.double()[:, None] * (relative / temperature).exp() + factor_1.double()[:, None] * relative.exp()
    assert gradient.data_ptr() == work.data_ptr()
    assert float((gradient.double() - exact).norm() / exact.norm()) < 2e-6


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("vocabulary", [7, 5000])
def test_torch_passes_against_float64(temperature, vocabulary):
    check_passes(row_passes, temperature, vocabulary)


def test_triton_passes_under_the_interpreter():
    """In a process of its own: Triton reads the interpreter's switch when it is imported."""
    pytest.importorskip("triton", reason="Triton is not installed; its kernels are not tested")
    code = (
        "from tests.student.test_row_passes import *; from kdcache.student import row_passes_triton as kernels\n"
        "for t in TEMPERATURES:\n  for v in (7, 5000, 8192): check_passes(kernels, t, v)\n"
        "from tests.student import test_loss; import kdcache.student.chunked_loss as loss; loss._passes = lambda hidden: kernels\n"
        "for t in (0.5, 1.0, 2.0):\n  for d in test_loss.DIVERGENCES:\n"
        "    test_loss.test_value_and_gradient_match_the_dense_oracle(t, d, 'lumped')\n"
        "print('agree')"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parent.parent.parent
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == "agree"
