"""Checks at a model's door.

Axes: B tokens · L latents.
"""

from __future__ import annotations

from crosscode_kernels.sparse import DenseLatents, Latents
from torch import Tensor

from crosscode.errors import InputError


def check_sizes(**sizes: int | tuple[int, ...]) -> None:
    """Raise `InputError` where a size is below 1."""
    for name, size in sizes.items():
        if isinstance(size, int) and size < 1:
            raise InputError(f"{name} = {size}: must be at least 1")
        if not isinstance(size, int) and any(one < 1 for one in size):
            raise InputError(f"{name} = {tuple(size)}: every size must be at least 1")


def check_shape(name: str, tensor: Tensor, dims: tuple[int, ...], width: int) -> None:
    """Raise `InputError` where a batch is not `(B, *dims, width)`."""
    if tuple(tensor.shape[1:]) != (*dims, width):
        expected = ", ".join(map(str, (*dims, width)))
        raise InputError(f"{name}: expected shape (B, {expected}), got {tuple(tensor.shape)}")


def checked_latents(latents: Latents | Tensor, n_latents: int) -> Latents:
    """Either form of latents, or a dense `latents_BL`, as latents of the right number."""
    if isinstance(latents, Tensor):
        latents = DenseLatents(latents)
    if latents.n_latents != n_latents:
        raise InputError(f"latents: expected {n_latents} latents, got {latents.n_latents}")
    return latents
