"""The tanh penalty of dense latents of which few are active: computed over these, its gradient dense. Eager only.

Axes: B tokens · L latents.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from crosscode_kernels.penalties.torch_impl import mixed_penalty_backward, sparse_penalty
from crosscode_kernels.sparse import Entries, SparseLatents


class _MixedPenalty(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        """value_BL, n_L, the active entries, lambda_L, c."""
        _, n_L, active, lambda_L, ctx.c = arguments
        entries = active.entries(active.transpose())
        ctx.save_for_backward(*entries, n_L, lambda_L)
        return sparse_penalty(entries, n_L, lambda_L, ctx.c)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *entries, n_L, lambda_L = ctx.saved_tensors
        return *mixed_penalty_backward(grads[0], Entries(*entries), n_L, lambda_L, ctx.c), None, None, None


def mixed_penalty(value_BL: Tensor, n_L: Tensor, active: SparseLatents, lambda_L: Tensor, c: float) -> Tensor:
    """`active` holds the entries of `value_BL` that are not 0, without gradient."""
    return _MixedPenalty.apply(value_BL, n_L, active, lambda_L, c)
