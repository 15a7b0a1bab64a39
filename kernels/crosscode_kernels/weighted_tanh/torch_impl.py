"""weighted_tanh in stock ops.

Axes: B tokens · L latents · N stored entries · R rows of a block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from crosscode_kernels.blocks import row_blocks
from crosscode_kernels.checks import acc_dtype
from crosscode_kernels.registry import register_kernel
from crosscode_kernels.segments.torch_impl import latent_sum


def _coefficients(value: Tensor, n_L: Tensor, lambda_L: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
    dtype = acc_dtype(value.dtype)
    return n_L.to(dtype), lambda_L.to(dtype) / batch_size


@register_kernel("dense_tanh", "torch")
def dense_tanh(a_BL: Tensor, n_L: Tensor, lambda_L: Tensor, c: float) -> Tensor:
    n_L, lambda_L = _coefficients(a_BL, n_L, lambda_L, a_BL.shape[0])
    tanh_L, slope_L = torch.zeros_like(n_L), c * n_L
    for rows in row_blocks(a_BL):
        tanh_L += (a_BL[rows] * slope_L).tanh_().sum(0)
    return torch.dot(tanh_L, lambda_L)


@register_kernel("dense_tanh_backward", "torch")
def dense_tanh_backward(g: Tensor, a_BL: Tensor, n_L: Tensor, lambda_L: Tensor, c: float) -> tuple[Tensor, Tensor]:
    n_acc_L, lambda_L = _coefficients(a_BL, n_L, lambda_L, a_BL.shape[0])
    coef_L = g * c * lambda_L
    da_BL, slope_sum_L = torch.empty_like(a_BL), torch.zeros_like(n_acc_L)
    for rows in row_blocks(a_BL):
        slope_RL = (a_BL[rows] * (c * n_acc_L)).tanh_().square_().neg_().add_(1)
        slope_sum_L += (slope_RL * a_BL[rows]).sum(0)
        da_BL[rows] = slope_RL.mul_(coef_L * n_acc_L)
    return da_BL, (coef_L * slope_sum_L).to(n_L.dtype)


@register_kernel("sparse_tanh", "torch")
def sparse_tanh(
    latent_idx_N: Tensor, value_N: Tensor, n_L: Tensor, lambda_L: Tensor, batch_size: int, c: float
) -> Tensor:
    n_L, lambda_L = _coefficients(value_N, n_L, lambda_L, batch_size)
    tanh_N = (value_N * (c * n_L).index_select(0, latent_idx_N)).tanh_()
    return tanh_N @ lambda_L.index_select(0, latent_idx_N)


@register_kernel("sparse_tanh_backward", "torch")
def sparse_tanh_backward(
    g: Tensor,
    order_N: Tensor,
    latent_ptr_L1: Tensor,
    latent_idx_N: Tensor,
    value_N: Tensor,
    n_L: Tensor,
    lambda_L: Tensor,
    batch_size: int,
    c: float,
) -> tuple[Tensor, Tensor]:
    n_acc_L, lambda_L = _coefficients(value_N, n_L, lambda_L, batch_size)
    n_N = n_acc_L.index_select(0, latent_idx_N)
    slope_N = (value_N * (c * n_N)).tanh_().square_().neg_().add_(1)
    slope_N *= (g * c * lambda_L).index_select(0, latent_idx_N)
    dn_L = latent_sum(order_N, latent_ptr_L1, slope_N * value_N)
    return (slope_N * n_N).to(value_N.dtype), dn_L.to(n_L.dtype)
