"""jumprelu_penalties in stock ops, worked through in row blocks.

Axes: B tokens · L latents · R rows of a block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from crosscode_kernels.blocks import row_blocks
from crosscode_kernels.checks import acc_dtype
from crosscode_kernels.jumprelu.torch_impl import straight_through, threshold, window


def jumprelu_penalties(
    h_BL: Tensor, t_L: Tensor, n_L: Tensor, lambda_tanh_L: Tensor, lambda_pre_L: Tensor, c: float
) -> tuple[Tensor, Tensor, Tensor]:
    dtype, n_tokens = acc_dtype(h_BL.dtype), h_BL.shape[0]
    n_L, theta_L = n_L.to(dtype), threshold(t_L, h_BL.dtype)
    a_BL, slope_L = torch.empty_like(h_BL), c * n_L
    tanh_L, deficit_L = torch.zeros_like(theta_L), torch.zeros_like(theta_L)
    for rows in row_blocks(h_BL):
        above_RL = h_BL[rows] - theta_L
        deficit_L -= above_RL.clamp(max=0).sum(0)
        a_RL = above_RL.sign_().relu_().mul_(h_BL[rows].relu())
        a_BL[rows] = a_RL
        tanh_L += a_RL.mul_(slope_L).tanh_().sum(0)
    tanh = torch.dot(tanh_L, lambda_tanh_L.to(dtype)) / n_tokens
    return a_BL, tanh, torch.dot(deficit_L, n_L * lambda_pre_L.to(dtype)) / n_tokens


def jumprelu_penalties_backward(
    da_BL: Tensor,
    g_tanh: Tensor,
    g_pre: Tensor,
    h_BL: Tensor,
    t_L: Tensor,
    n_L: Tensor,
    lambda_tanh_L: Tensor,
    lambda_pre_L: Tensor,
    eps: float,
    gdm: bool,
    c: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype, n_tokens = acc_dtype(h_BL.dtype), h_BL.shape[0]
    n_acc_L, theta_L = n_L.to(dtype), threshold(t_L, h_BL.dtype)
    tanh_coef_L = g_tanh * (c / n_tokens) * lambda_tanh_L.to(dtype)
    pre_coef_L = g_pre / n_tokens * lambda_pre_L.to(dtype)
    into_tanh_L, into_pre_L = tanh_coef_L * n_acc_L, pre_coef_L * n_acc_L
    dh_BL = torch.empty_like(h_BL)
    slope_sum_L, deficit_L, into_window_L, n_silent_L = (torch.zeros_like(theta_L) for _ in range(4))
    for rows in row_blocks(h_BL):
        above_RL = h_BL[rows] - theta_L
        deficit_L -= above_RL.clamp(max=0).sum(0)
        sign_RL = above_RL.sign()
        a_RL = sign_RL.relu().mul_(h_BL[rows].relu())
        slope_RL = (a_RL * (c * n_acc_L)).tanh_().square_().neg_().add_(1)
        slope_sum_L += a_RL.mul_(slope_RL).sum(0)
        da_RL = slope_RL.mul_(into_tanh_L).add_(da_BL[rows])
        silent_RL = (-sign_RL).relu_()
        n_silent_L += silent_RL.sum(0)
        dh_BL[rows] = sign_RL.relu_().mul_(da_RL).sub_(silent_RL.mul_(into_pre_L))
        into_window_L += window(above_RL, eps).mul_(da_RL).sum(0)
    dt_L = straight_through(into_window_L, theta_L, eps, gdm) + into_pre_L * theta_L * n_silent_L
    dn_L = tanh_coef_L * slope_sum_L + pre_coef_L * deficit_L
    return dh_BL, dt_L.to(t_L.dtype), dn_L.to(n_L.dtype)
