"""Where the GPU tests run, and what skips them where there is no GPU.

``KDCACHE_GPU_TESTS=cpu`` runs on the CPU what can run there: it tries the tests, not the GPU.
"""

import os
from contextlib import nullcontext

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

DEVICE = os.environ.get("KDCACHE_GPU_TESTS", "cuda")

on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA device, found none"),
]
cuda_alone = pytest.mark.skipif(DEVICE != "cuda", reason="has no meaning on the CPU")


def repeatable():
    """Attention whose backward pass adds up in one order: the fast ones on CUDA do not, and bits differ."""
    return sdpa_kernel(SDPBackend.MATH) if DEVICE == "cuda" else nullcontext()
