"""pre_act in stock ops, worked through in row blocks.

Axes: B tokens · L latents · R rows of a block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from crosscode_kernels import host_buffers
from crosscode_kernels.blocks import row_blocks
from crosscode_kernels.checks import acc_dtype
from crosscode_kernels.penalties import PreActTerm


def _coefficients(h_BL: Tensor, term: PreActTerm) -> tuple[Tensor, Tensor, Tensor]:
    dtype = acc_dtype(h_BL.dtype)
    return term.t_L.to(dtype).exp(), term.n_L.to(dtype), term.lambda_L.to(dtype) / h_BL.shape[0]


def pre_act(h_BL: Tensor, term: PreActTerm) -> Tensor:
    theta_L, n_L, lambda_L = _coefficients(h_BL, term)
    deficit_L = torch.zeros_like(theta_L)
    for rows in row_blocks(h_BL):
        deficit_L += (theta_L - h_BL[rows]).relu_().sum(0)
    return torch.dot(deficit_L, n_L * lambda_L)


def pre_act_backward(g: Tensor, h_BL: Tensor, term: PreActTerm) -> tuple[Tensor, Tensor, Tensor]:
    theta_L, n_acc_L, lambda_L = _coefficients(h_BL, term)
    coef_L = g * lambda_L * n_acc_L
    dh_BL = host_buffers.empty_like(h_BL)
    deficit_L, n_silent_L = torch.zeros_like(theta_L), torch.zeros_like(theta_L)
    for rows in row_blocks(h_BL):
        deficit_RL = (theta_L - h_BL[rows]).relu_()
        deficit_L += deficit_RL.sum(0)
        silent_RL = deficit_RL.sign_()
        n_silent_L += silent_RL.sum(0)
        dh_BL[rows] = silent_RL.mul_(-coef_L)
    dt_L = coef_L * theta_L * n_silent_L
    return dh_BL, dt_L.to(term.t_L.dtype), (g * lambda_L * deficit_L).to(term.n_L.dtype)
