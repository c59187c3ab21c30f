"""Which device a process computes on, and what can be had there."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
from typing import TYPE_CHECKING

from kdcache.errors import DeviceError, ModelError

if TYPE_CHECKING:
    import torch


def give_back_memory() -> None:
    """Hand pages that are free again to the system, where the C library can: loading leaves gigabytes of them to the process."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def resolve_device(device: str) -> str:
    """``auto`` becomes cuda where there is one, else cpu.

    Raises:
        DeviceError: CUDA is asked for and absent.
    """
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise DeviceError("device cuda is asked for, but torch sees no CUDA device; use device auto or cpu")
    return device


def own_gpu(place: str) -> str:
    """``cuda`` becomes this process's GPU where a launcher (torchrun, accelerate) started several; some launchers show each only its own."""
    import torch

    rank = os.environ.get("LOCAL_RANK", "")
    return f"cuda:{int(rank) % torch.cuda.device_count()}" if place == "cuda" and rank.isdecimal() else place


def refuse_absent_attention(attention: str, place: str, compute: torch.dtype) -> None:
    """FlashAttention is a package of its own, for CUDA and for 16 bits; the others come with torch.

    Args:
        attention: transformers' ``attn_implementation``.
        place: the device.
        compute: the arithmetic.

    Raises:
        ModelError: naming what is lacking.
    """
    import torch

    if "flash" not in attention:
        return
    lacking = None
    if not place.startswith("cuda"):
        lacking = f"a CUDA device, found {place}"
    # transformers would take a kernel from the Hub instead: code that nobody asked for.
    elif importlib.util.find_spec("flash_attn") is None:
        lacking = "the package flash-attn, which is not installed"
    elif compute not in (torch.bfloat16, torch.float16):
        lacking = f"bfloat16 or float16, found {str(compute).removeprefix('torch.')}"
    if lacking is not None:
        raise ModelError(f"attention {attention} needs {lacking}; use sdpa or eager")
