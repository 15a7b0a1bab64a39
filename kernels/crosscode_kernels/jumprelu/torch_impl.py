"""jumprelu in stock ops, worked through in row blocks.

Axes: B tokens · L latents · R rows of a block.

Indicators are computed as numbers, `relu(sign(h - theta))`: that runs several times as fast as masks do, and NaN stays
NaN in them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from crosscode_kernels import host_buffers
from crosscode_kernels.blocks import row_blocks
from crosscode_kernels.checks import acc_dtype


def threshold(t_L: Tensor, h_dtype: torch.dtype) -> Tensor:
    """theta, in the dtype that it is compared in."""
    return t_L.to(acc_dtype(h_dtype)).exp()


def jumprelu(h_BL: Tensor, t_L: Tensor) -> Tensor:
    theta_L = threshold(t_L, h_BL.dtype)
    a_BL = host_buffers.empty_like(h_BL)
    for rows in row_blocks(h_BL):
        # relu first, for -inf * 0 would be NaN.
        a_BL[rows] = (h_BL[rows] - theta_L).sign_().relu_().mul_(h_BL[rows].relu())
    return a_BL


def jumprelu_backward(da_BL: Tensor, h_BL: Tensor, t_L: Tensor, eps: float, gdm: bool) -> tuple[Tensor, Tensor]:
    return deficit_backward(da_BL, None, h_BL, t_L, eps, gdm)[:2]


def deficit_backward(
    da_BL: Tensor, d_deficit_L: Tensor | None, h_BL: Tensor, t_L: Tensor, eps: float, gdm: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`dh_BL, dt_L`, the sum of `dh` over the tokens; `d_deficit_L` is the gradient of `encode_jumprelu`'s deficit, where that is
    there."""
    theta_L = threshold(t_L, h_BL.dtype)
    dh_BL = host_buffers.empty_like(h_BL)
    into_window_L, n_silent_L, db_L = (torch.zeros_like(theta_L) for _ in range(3))
    for rows in row_blocks(h_BL):
        above_RL = h_BL[rows] - theta_L
        sign_RL = above_RL.sign()
        dh_RL = sign_RL.relu().mul_(da_BL[rows])
        if d_deficit_L is not None:
            silent_RL = sign_RL.neg_().relu_()
            n_silent_L += silent_RL.sum(0)
            dh_RL -= silent_RL.mul_(d_deficit_L)
        dh_BL[rows] = dh_RL
        db_L += dh_RL.sum(0)
        into_window_L += window(above_RL, eps).mul_(da_BL[rows]).sum(0)
    dt_L = straight_through(into_window_L, theta_L, eps, gdm)
    if d_deficit_L is not None:
        dt_L += d_deficit_L * theta_L * n_silent_L
    return dh_BL, dt_L.to(t_L.dtype), db_L.to(h_BL.dtype)


def window(above: Tensor, eps: float) -> Tensor:
    """1 where `|above| < eps / 2`, else 0, in place."""
    return above.abs_().neg_().add_(eps / 2).sign_().relu_()


def straight_through(into_window_L: Tensor, theta_L: Tensor, eps: float, gdm: bool) -> Tensor:
    """Gradient of t from the sum of the gradients that reach latents within the window."""
    return into_window_L * (theta_L / -eps) * (theta_L if gdm else 1)
