"""Decode of dense latents of which few are active: sparse forward and weight gradient, dense gradient of the latents.

Axes: B tokens · O flattened output dims · L latents · N active entries.

For an activation that wants the gradient of many latents that are not active (JumpReLU's window). Eager only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from crosscode_kernels import host_buffers
from crosscode_kernels.backend import Backend
from crosscode_kernels.segments.autograd import weight_grad
from crosscode_kernels.sparse import Entries, SparseLatents
from crosscode_kernels.sparse_decode.autograd import entries_decode


class _MixedDecode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, value_BL: Tensor, active: SparseLatents, W_LO: Tensor, b_O: Tensor | None, backend: Backend
    ) -> Tensor:
        entries = active.entries(active.transpose())
        ctx.save_for_backward(*entries, W_LO)
        ctx.backend = backend
        return entries_decode(entries, W_LO, b_O, backend=backend)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dy_BO = grads[0].contiguous()
        *entries, W_LO = ctx.saved_tensors
        needs_value, _, needs_W, needs_b, _ = ctx.needs_input_grad
        dvalue_BL = None
        if needs_value:
            dvalue_BL = torch.mm(dy_BO, W_LO.T, out=host_buffers.empty((dy_BO.shape[0], W_LO.shape[0]), dy_BO))
        dW_LO = weight_grad(Entries(*entries), dy_BO, ctx.backend)[0] if needs_W else None
        return dvalue_BL, None, dW_LO, dy_BO.sum(0) if needs_b else None, None


def mixed_decode(value_BL: Tensor, active: SparseLatents, W_LO: Tensor, b_O: Tensor | None, backend: Backend) -> Tensor:
    """`y_BO`. `active` holds the entries of `value_BL` that are not 0, without gradient."""
    return _MixedDecode.apply(value_BL, active, W_LO, b_O, backend)
