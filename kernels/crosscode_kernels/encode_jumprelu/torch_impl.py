"""encode_jumprelu from pre-activations in stock ops, worked through in row blocks.

Axes: B tokens · L latents · R rows of a block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from crosscode_kernels.blocks import row_blocks
from crosscode_kernels.jumprelu.torch_impl import deficit_backward, threshold


def encode_jumprelu(h_BL: Tensor, t_L: Tensor) -> tuple[Tensor, Tensor]:
    """`a_BL, deficit_L`."""
    theta_L = threshold(t_L, h_BL.dtype)
    a_BL, deficit_L = torch.empty_like(h_BL), torch.zeros_like(theta_L)
    for rows in row_blocks(h_BL):
        above_RL = h_BL[rows] - theta_L
        deficit_L -= above_RL.clamp(max=0).sum(0)
        a_BL[rows] = above_RL.sign_().relu_().mul_(h_BL[rows].relu())
    return a_BL, deficit_L


def encode_jumprelu_backward(
    da_BL: Tensor, d_deficit_L: Tensor | None, h_BL: Tensor, t_L: Tensor, eps: float, gdm: bool
) -> tuple[Tensor, Tensor]:
    return deficit_backward(da_BL, d_deficit_L, h_BL, t_L, eps, gdm)
