"""Weights as matrices, through which gradients that are sparse over rows pass.

Axes: L latents (rows) · F a row, flattened · Q touched rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from crosscode_kernels.row_sparse_adam import coalesced


class _RowView(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, W_L: Tensor) -> Tensor:
        ctx.shape = W_L.shape
        return W_L.flatten(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (grad_LF,) = grads
        if not grad_LF.is_sparse:
            if torch.is_grad_enabled():  # a gradient of this gradient is wanted
                return grad_LF.reshape(ctx.shape)
            # The same memory, but no view, which would hold its base: what comes next is then added in place.
            grad_LF = grad_LF.contiguous()
            return grad_LF.data.resize_(ctx.shape)
        grad_LF = coalesced(grad_LF)
        values_Q = grad_LF.values().reshape(-1, *ctx.shape[1:])
        return torch.sparse_coo_tensor(
            grad_LF.indices(), values_Q, ctx.shape, is_coalesced=True, check_invariants=False
        )


def row_view(W_L: Tensor) -> Tensor:
    """`W_LF`. Gradients may be sparse COO tensors over rows, which PyTorch's own views refuse."""
    if torch.compiler.is_compiling():
        return W_L.flatten(1)
    return _RowView.apply(W_L)
