"""Argument checks shared by the doors: one line that names the op, the argument, its value and what would be right.

Axes: B tokens · I flattened input dims · O flattened output dims · L latents.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums and statistics are kept in: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocast_dtype(device: str) -> torch.dtype | None:
    """Of products on this type of device while autocast is on; on the meta device it never is."""
    on = device != "meta" and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if on else None


def check_float(op: str, **tensors: Tensor | None) -> None:
    """Every tensor is floating point, all of one dtype and device."""
    first_name, first = "", None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.dtype not in FLOATS:
            raise ValueError(f"{op}: {name} is {tensor.dtype}; must be float16, bfloat16, float32 or float64")
        if first is None:
            first_name, first = name, tensor
        elif tensor.dtype != first.dtype:
            raise ValueError(f"{op}: {name} is {tensor.dtype} and {first_name} is {first.dtype}; must be of one dtype")
        elif tensor.device != first.device:
            raise ValueError(f"{op}: {name} is on {tensor.device} and {first_name} on {first.device}; must be on one")


def check_dims(op: str, name: str, tensor: Tensor, n_dims: int) -> None:
    if tensor.dim() != n_dims:
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}; must have {n_dims} dimension(s)")


def check_per_latent(op: str, like: Tensor, n_latents: int, **vectors_L: Tensor | None) -> None:
    """Each vector is floating point (of any dtype), holds one number a latent, and lies on the device of `like`."""
    for name, vector_L in vectors_L.items():
        if vector_L is None:
            continue
        if tuple(vector_L.shape) != (n_latents,):
            raise ValueError(f"{op}: {name} has shape {tuple(vector_L.shape)}; must be ({n_latents},), one per latent")
        if vector_L.dtype not in FLOATS:
            raise ValueError(f"{op}: {name} is {vector_L.dtype}; must be floating point")
        if vector_L.device != like.device:
            raise ValueError(f"{op}: {name} is on {vector_L.device}; must be on {like.device} with the latents")


def check_k(op: str, k: int, n_latents: int) -> None:
    if isinstance(k, bool) or not isinstance(k, (int, torch.SymInt)):
        raise ValueError(f"{op}: k is {k!r}; must be an integer")
    if not 0 <= k <= n_latents:
        raise ValueError(f"{op}: k is {k}; must lie between 0 and the number of latents, {n_latents}")


def check_segments(op: str, name: str, width: int, segments: Sequence[int]) -> None:
    if not segments or any(segment <= 0 for segment in segments) or sum(segments) != width:
        raise ValueError(
            f"{op}: segments are {list(segments)}; must be positive and sum to the width of {name}, {width}"
        )


def check_positive(op: str, **numbers: float) -> None:
    for name, number in numbers.items():
        if not number > 0:
            raise ValueError(f"{op}: {name} is {number}; must be positive")


def check_choice(op: str, name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{op}: {name} is {value!r}; must be {' or '.join(map(repr, choices))}")
