"""Copies of weights in the dtype of products: one cast a weight and step, shared by all that multiply with it.

A copy holds for the weight's version (PyTorch counts the writes that it sees), so that whatever changes a weight in place
makes its copy stale. It lives from a forward pass to its backward, or for good where an optimizer keeps it and writes it
together with the weight (`keep`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


class _Copy:
    """`tensor` equals the weight as it was at `version` of the memory at `address`."""

    def __init__(self) -> None:
        self.tensor: Tensor | None = None
        self.version, self.address, self.is_kept = -1, 0, False

    def is_of(self, weight: Tensor) -> bool:
        return self.tensor is not None and (self.version, self.address) == (weight._version, weight.data_ptr())

    def set(self, weight: Tensor, tensor: Tensor) -> None:
        self.tensor, self.version, self.address = tensor, weight._version, weight.data_ptr()


_COPIES: Any = WeakTensorKeyDictionary()


class _InDtype(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, copy: Tensor, owner: Tensor) -> Tensor:
        ctx.dtype, ctx.owner = weight.dtype, owner
        return copy.view(weight.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        found = _COPIES.get(ctx.owner)
        if found is not None and not found.is_kept:  # whatever computes next does so with other weights
            del _COPIES[ctx.owner]
        return grads[0].to(ctx.dtype), None, None


def in_dtype(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """`weight.to(dtype)`, differentiable. Of a trained matrix, or a whole view of one, the copy is shared."""
    if weight.dtype == dtype or weight.dim() < 2 or torch.compiler.is_compiling() or weight.is_inference():
        return weight.to(dtype)
    owner = weight if weight._base is None else weight._base
    is_whole = weight.numel() == owner.numel() and weight.is_contiguous() and owner.is_contiguous()
    if not (owner.is_leaf and owner.requires_grad and is_whole and weight.dtype == owner.dtype):
        return weight.to(dtype)
    found = _COPIES.get(owner)
    if found is None or not found.is_of(owner) or found.tensor.dtype != dtype:
        if not torch.is_grad_enabled():
            return weight.to(dtype)
        found = found or _Copy()
        found.set(owner, owner.detach().to(dtype))
        _COPIES[owner] = found
    return _InDtype.apply(weight, found.tensor, owner)


def keep(weight: Tensor) -> None:
    """From the next cast on the copy of this parameter lives as long as it."""
    found = _COPIES.get(weight)
    if found is None:
        _COPIES[weight] = found = _Copy()
    found.is_kept = True


def forget(weight: Tensor) -> None:
    """What is there of this parameter is no copy of it."""
    if (found := _COPIES.get(weight)) is not None:
        found.tensor = None


def valid_copy(weight: Tensor) -> Tensor | None:
    """The copy, where there is one that equals the weight as it is."""
    found = _COPIES.get(weight)
    return found.tensor if found is not None and found.is_of(weight) else None


def written_with(weight: Tensor) -> None:
    """The valid copy was written together with the weight, in memory that PyTorch did not see written."""
    torch.autograd.graph.increment_version([weight, tensor := _COPIES[weight].tensor])
    _COPIES[weight].set(weight, tensor)
