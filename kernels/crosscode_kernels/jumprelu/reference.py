"""jumprelu, dense.

Axes: B tokens · L latents.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from crosscode_kernels.checks import acc_dtype


class _JumpReLU(torch.autograd.Function):
    """The forward is not differentiable in t: its gradient is the straight-through one of the door."""

    @staticmethod
    def forward(ctx: Any, h_BL: Tensor, t_L: Tensor, eps: float, gdm: bool) -> Tensor:
        theta_L = t_L.to(acc_dtype(h_BL.dtype)).exp()
        ctx.save_for_backward(h_BL, theta_L)
        ctx.eps, ctx.gdm, ctx.t_dtype = eps, gdm, t_L.dtype
        return torch.where(h_BL <= theta_L, 0, h_BL)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (da_BL,) = grads
        h_BL, theta_L = ctx.saved_tensors
        dh_BL = torch.where(h_BL <= theta_L, 0, da_BL)
        inside_BL = (h_BL - theta_L).abs() < ctx.eps / 2
        dtheta_L = -torch.where(inside_BL, da_BL.to(theta_L.dtype), 0).sum(0) / ctx.eps
        dt_L = dtheta_L * theta_L * (theta_L if ctx.gdm else 1)
        return dh_BL, dt_L.to(ctx.t_dtype), None, None


def jumprelu(h_BL: Tensor, t_L: Tensor, eps: float, gdm: bool) -> Tensor:
    return _JumpReLU.apply(h_BL, t_L, eps, gdm)  # type: ignore[no-any-return]
