"""A straight-through gradient of JumpReLU to its input, beside the one to its threshold.

Axes: B tokens · L latents.

By the product rule `d(h H(h - theta)) / dh = H(h - theta) + h delta(h - theta)`, and the kernel of the threshold's gradient for
the delta: `da/dh := 1[h > theta] + (theta / eps) 1[|h - theta| < eps / 2]`. The first term is the op's own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from crosscode_kernels.blocks import row_blocks
from crosscode_kernels.jumprelu.torch_impl import threshold, window


def with_input_gradient(a_BL: Tensor, h_BL: Tensor, t_L: Tensor, eps: float) -> Tensor:
    """`a_BL` as it is; in backward `h_BL` gets the second term as well. On every backend, dense."""
    return _ThroughWindow.apply(a_BL, h_BL, threshold(t_L.detach(), h_BL.dtype), eps)  # type: ignore[no-any-return]


class _ThroughWindow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a_BL: Tensor, h_BL: Tensor, theta_L: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(h_BL, theta_L)
        ctx.eps = eps
        return a_BL.view_as(a_BL)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (da_BL,) = grads
        h_BL, theta_L = ctx.saved_tensors
        dh_BL = torch.empty_like(h_BL)
        for rows in row_blocks(h_BL):
            dh_BL[rows] = window(h_BL[rows] - theta_L, ctx.eps).mul_(theta_L / ctx.eps).mul_(da_BL[rows])
        return da_BL, dh_BL, None, None
