"""PTX types as numpy dtypes, and the float formats that numpy lacks."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
N_LANES = 32
LANES = np.arange(N_LANES)
BITS = {1: np.dtype(np.uint8), 2: np.dtype(np.uint16), 4: np.dtype(np.uint32), 8: np.dtype(np.uint64)}
"""Unsigned integers by their bytes: how registers hold everything but predicates."""
DTYPES: dict[str, np.dtype[Any]] = {
    "pred": np.dtype(np.bool_), "f16": np.dtype(np.float16), "bf16": np.dtype(np.uint16),
    "f32": np.dtype(np.float32), "f64": np.dtype(np.float64),
    **{f"{kind}{8 * size}": BITS[size] for kind in "bu" for size in BITS},
    **{f"s{8 * size}": np.dtype(f"i{size}") for size in BITS},
}  # fmt: skip
"""bf16 as its bits: see `to_float32`."""


def bfloat16_to_float32(bits: Array) -> Array:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def float32_to_bfloat16(values: Array) -> Array:
    """Bits of the nearest bfloat16, ties to even; the one NaN that a GPU makes."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FFF, rounded).astype(np.uint16)


def to_float32(values: Array, kind: str) -> Array:
    """Values of a float type ("f16", "bf16", "f32") as float32."""
    return bfloat16_to_float32(values) if kind == "bf16" else values.astype(np.float32)


def from_float32(values: Array, kind: str) -> Array:
    return float32_to_bfloat16(values) if kind == "bf16" else values.astype(DTYPES[kind])


def halves(packed: Array, kind: str) -> tuple[Array, Array]:
    """Both values of a 32-bit register that packs two of 16 bits, low one first."""
    dtype = DTYPES[kind]
    return (packed & 0xFFFF).astype(np.uint16).view(dtype), (packed >> 16).astype(np.uint16).view(dtype)


def packed(low: Array, high: Array) -> Array:
    low, high = (half.view(np.uint16).astype(np.uint32) for half in (low, high))
    return (high << 16) | low
