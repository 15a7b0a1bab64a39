"""A weight's gradient that is not computed yet: the sorted entries and the tokens' rows of which it is the sum.

Axes: L latents (rows) · F a row, flattened · B tokens · N stored entries.

`SegmentGrad` passes through autograd as a gradient does: it may be reshaped, cast and added without being computed.
Everything else computes it, in the dtype that it has by then, and goes on with the tensor. Views of it are views: what is
written to one is seen by the others.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from crosscode_kernels.sparse import Entries

MOST_SUMS = 2
"""Sums that stay uncomputed at a time (those of the main latents and of the dead ones); further ones are added up."""
_aten = torch.ops.aten
_SHAPES = (_aten.view.default, _aten._unsafe_view.default, _aten.alias.default, _aten.detach.default)


class _Pending:
    """What views share: sums over segments (`RowSums` of the Triton kernels), and a tensor that is added to them."""

    def __init__(self, sums: list[Any], dense_LF: Tensor | None = None) -> None:
        self.sums, self.dense_LF = sums, dense_LF


class SegmentGrad(Tensor):
    """`grad_LF` (or of more axes behind L) of a contiguous weight; see the module."""

    pending: _Pending

    @staticmethod
    def __new__(cls, pending: _Pending, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> SegmentGrad:
        grad = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        grad.pending = pending
        return grad

    @classmethod
    def of(cls, entries: Entries, rows_BF: Tensor) -> SegmentGrad:
        """`segment_rows(entries, rows)`."""
        sums = importlib.import_module("crosscode_kernels.segments.triton_impl").RowSums(entries, rows_BF)
        shape = torch.Size([entries.latent_ptr_L1.shape[0] - 1, rows_BF.shape[1]])
        return cls(_Pending([sums]), shape, rows_BF.dtype, rows_BF.device)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        return f"SegmentGrad({tuple(self.shape)}, {self.dtype}, {len(self.pending.sums)} sums not computed)"

    def dense(self) -> Tensor:
        """The gradient; computed once."""
        pending = self.pending
        for sums in pending.sums:
            total_LF = sums.total(self.dtype)
            pending.dense_LF = total_LF if pending.dense_LF is None else pending.dense_LF.add_(total_LF)
        pending.sums = []
        assert pending.dense_LF is not None
        return pending.dense_LF.view(self.shape)

    def _like(self, pending: _Pending, shape: torch.Size | None = None, dtype: torch.dtype | None = None) -> Tensor:
        return SegmentGrad(pending, shape or self.shape, dtype or self.dtype, self.device)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        grad = args[0] if args and isinstance(args[0], SegmentGrad) else None
        if grad is not None and func in _SHAPES and not kwargs:
            shape = torch.Size(args[1]) if len(args) > 1 else grad.shape
            shape = torch.empty(grad.shape, device="meta").view(shape).shape
            if shape and shape[0] == grad.shape[0]:
                return grad._like(grad.pending, shape)
        if grad is not None and grad.pending.sums:
            if func is _aten.clone.default:
                return grad._like(grad._copied())
            if func is _aten._to_copy.default and set(kwargs) <= {"dtype"} and kwargs["dtype"].is_floating_point:
                return grad._like(grad._copied(kwargs["dtype"]), dtype=kwargs["dtype"])
        if func in (_aten.add.Tensor, _aten.add_.Tensor) and not kwargs and _are_alike(*args[:2]):
            return _sum(*args, in_place=func is _aten.add_.Tensor)
        plain = tree_map_only(SegmentGrad, lambda one: one.dense(), (args, kwargs))
        result = func(*plain[0], **plain[1])
        written_in_place = grad is not None and func._schema.name.endswith("_") and isinstance(result, Tensor)
        return grad if written_in_place else result

    def _copied(self, dtype: torch.dtype | None = None) -> _Pending:
        dense_LF = self.pending.dense_LF
        return _Pending(
            list(self.pending.sums), None if dense_LF is None else dense_LF.to(dtype or self.dtype, copy=True)
        )


def _are_alike(one: Any, other: Any) -> bool:
    """Two tensors of one shape and dtype, of which the first is a `SegmentGrad`, or both are swapped."""
    both = isinstance(one, Tensor) and isinstance(other, Tensor)
    return both and one.shape == other.shape and one.dtype == other.dtype and one.dim() > 1


def _sum(one: Tensor, other: Tensor, in_place: bool) -> Tensor:
    if not isinstance(one, SegmentGrad):
        if in_place:
            return one.add_(other.dense() if isinstance(other, SegmentGrad) else other)
        one, other = other, one
    assert isinstance(one, SegmentGrad)
    pending = one.pending if in_place else one._copied()
    total = one if in_place else one._like(pending)
    assert isinstance(total, SegmentGrad)
    dense = other
    if isinstance(other, SegmentGrad):
        dense = other.pending.dense_LF
        pending.sums.extend(other.pending.sums)
        if len(pending.sums) > MOST_SUMS:
            total.dense()
    if dense is not None:
        dense_LF = dense.reshape(dense.shape[0], -1).to(one.dtype)
        pending.dense_LF = dense_LF.clone() if pending.dense_LF is None else pending.dense_LF.add_(dense_LF)
    return total


def computed(grad: Tensor) -> Tensor:
    """An ordinary tensor."""
    return grad.dense() if isinstance(grad, SegmentGrad) else grad
