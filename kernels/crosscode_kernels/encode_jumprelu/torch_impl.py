"""encode_jumprelu from pre-activations in stock ops, worked through in row blocks.

Axes: B tokens · L latents · R rows of a block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from crosscode_kernels import host_buffers
from crosscode_kernels.blocks import row_blocks
from crosscode_kernels.jumprelu.torch_impl import deficit_backward, threshold
from crosscode_kernels.penalties.deferred import PenaltyTerm


def encode_jumprelu(h_BL: Tensor, t_L: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`a_BL, deficit_L`, and how often each latent is active, int64."""
    theta_L = threshold(t_L, h_BL.dtype)
    a_BL, deficit_L = host_buffers.empty_like(h_BL), torch.zeros_like(theta_L)
    fired_L = torch.zeros_like(theta_L, dtype=torch.int64)
    for rows in row_blocks(h_BL):
        above_RL = h_BL[rows] - theta_L
        deficit_L -= above_RL.clamp(max=0).sum(0)
        fired_L += (above_RL > 0).sum(0)
        a_BL[rows] = above_RL.sign_().relu_().mul_(h_BL[rows].relu())
    return a_BL, deficit_L, fired_L


def encode_jumprelu_backward(
    da_BL: Tensor, d_deficit_L: Tensor | None, h_BL: Tensor, t_L: Tensor, eps: float, gdm: bool, term: PenaltyTerm
) -> tuple[Tensor, Tensor, Tensor]:
    """`dh_BL, dt_L`, the sum of `dh` over the tokens. Gradients of penalties that are not computed come to Triton alone."""
    assert term.g is None
    return deficit_backward(da_BL, d_deficit_L, h_BL, t_L, eps, gdm)
