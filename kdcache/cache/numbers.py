"""Numbers <-> the bytes they are stored in; each inverse beside its forward, every loss with its bound.

Numbers of several bytes lie in planes (all lowest bytes, then all next ones), where zstd finds what they have in common.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from kdcache.cache.layout import HALF_LIMIT, LEVEL_LIMIT, REST_LIMIT, REST_STEP

Bytes = NDArray[np.uint8]
Values = Literal["quantised", "half"]


def to_planes(numbers: NDArray[np.integer], width: int) -> Bytes:
    """uint8 ``[width, n]`` of numbers below ``256 ** width``, lowest bytes first."""
    as_bytes = numbers.astype("<u4").view(np.uint8).reshape(-1, 4)
    planes: Bytes = np.ascontiguousarray(as_bytes[:, :width].T)
    return planes


def from_planes(planes: NDArray[np.generic]) -> NDArray[np.uint32]:
    """uint32 ``[n]``; inverse of `to_planes`."""
    numbers: NDArray[np.uint32] = planes[0].astype(np.uint32)
    for place, plane in enumerate(planes[1:], start=1):
        numbers |= plane.astype(np.uint32) << np.uint32(8 * place)
    return numbers


def id_steps(ids: NDArray[np.uint32], offsets: NDArray[np.int64]) -> NDArray[np.uint32]:
    """Ids that rise within each row -> the first of each row and the steps to the others."""
    steps = ids.astype(np.uint32)
    if len(ids):
        steps[1:] -= ids[:-1]
        first = offsets[:-1][np.diff(offsets) > 0]
        steps[first] = ids[first]
    return steps


def ids_of_steps(steps: NDArray[np.uint32], counts: NDArray[np.int64]) -> NDArray[np.uint32]:
    """Inverse of `id_steps`. Damaged steps may wrap around; on their way they pass beyond any vocabulary."""
    if not len(steps):
        return steps
    filled = counts[counts > 0]
    first = np.cumsum(filled) - filled
    reached = np.cumsum(steps, dtype=np.uint32)
    reached -= np.repeat(reached[first] - steps[first], filled)
    return reached


def encode_values(logits: NDArray[np.float32], step: float, values: Values) -> Bytes:
    """uint8 ``[2, n]`` of logits at most 0. Off by at most ``step / 2``, or half precision's rounding (``half``).

    Logits below ``-65535 step`` (or -65504) become that: their probability is nothing at any temperature up to 100.
    """
    if values == "half":
        return encode_half(logits)
    within = np.maximum(logits, np.float32(-LEVEL_LIMIT * step))
    return to_planes(np.rint(within * np.float32(-1.0 / step)).astype(np.uint32), 2)


def decode_values(planes: NDArray[np.generic], step: float, values: Values) -> NDArray[np.float32]:
    """float32 ``[n]``; inverse of `encode_values`."""
    if values == "half":
        return decode_half(planes)
    return from_planes(planes).astype(np.float32) * np.float32(-step)


def encode_half(numbers: NDArray[np.float32]) -> Bytes:
    """uint8 ``[2, n]``: half precision, off by at most 2^-11 of the number's size (2^-25 below 2^-14)."""
    return to_planes(np.maximum(numbers, -HALF_LIMIT).astype("<f2").view("<u2"), 2)


def decode_half(planes: NDArray[np.generic]) -> NDArray[np.float32]:
    """float32 ``[n]``; inverse of `encode_half`."""
    return from_planes(planes).astype("<u2").view("<f2").astype(np.float32)


def encode_rest(rest: NDArray[np.float32]) -> Bytes:
    """uint8 ``[2, B, P]`` of log-odds ``[P, B]``: off by at most 2^-11, so that neither the head's mass nor the rest is
    off by more than that share of itself. Beyond 32 (a mass of 1e-14) they become 32."""
    steps = np.rint(np.clip(rest.T, -REST_LIMIT, REST_LIMIT - REST_STEP) / REST_STEP).astype(np.int64)
    return to_planes((steps + (1 << 15)).ravel(), 2).reshape(2, *rest.T.shape)


def decode_rest(planes: NDArray[np.generic]) -> NDArray[np.float32]:
    """float32 ``[P, B]``; inverse of `encode_rest`."""
    steps = from_planes(planes.reshape(2, -1)).astype(np.float32) - np.float32(1 << 15)
    return np.ascontiguousarray((steps * np.float32(REST_STEP)).reshape(planes.shape[1:]).T)
