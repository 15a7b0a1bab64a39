"""Weights as matrices, through which gradients that are sparse over rows pass.

Axes: L latents (rows) · F a row, flattened · Q touched rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _RowView(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, W_L: Tensor) -> Tensor:
        ctx.shape = W_L.shape
        return W_L.flatten(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (grad_LF,) = grads
        if not grad_LF.is_sparse:
            return grad_LF.reshape(ctx.shape)
        grad_LF = grad_LF.coalesce()
        values_Q = grad_LF.values().reshape(-1, *ctx.shape[1:])
        return torch.sparse_coo_tensor(
            grad_LF.indices(), values_Q, ctx.shape, is_coalesced=True, check_invariants=False
        )


def row_view(W_L: Tensor, row_sparse: bool) -> Tensor:
    """`W_LF`. `row_sparse`: gradients may be sparse COO tensors over rows, which PyTorch's own views refuse."""
    if not row_sparse or torch.compiler.is_compiling():
        return W_L.flatten(1)
    return _RowView.apply(W_L)
