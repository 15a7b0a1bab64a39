"""The penalties in stock ops: tanh of `c a n`, or `a n` (l1) where `c` is None, which is linear in each latent's sum.

Axes: B tokens · L latents · N stored entries · R rows of a block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from crosscode_kernels import host_buffers
from crosscode_kernels.blocks import row_blocks
from crosscode_kernels.checks import acc_dtype
from crosscode_kernels.segments.torch_impl import entry_places, latent_sum
from crosscode_kernels.sparse import Entries


def _coefficients(value: Tensor, n_L: Tensor, lambda_L: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
    dtype = acc_dtype(value.dtype)
    return n_L.to(dtype), lambda_L.to(dtype) / batch_size


def dense_penalty(a_BL: Tensor, n_L: Tensor, lambda_L: Tensor, c: float | None) -> tuple[Tensor, Tensor]:
    """The penalty, and its slope in n. tanh only: `weighted_l1` of dense latents is stock ops with a gradient of their own."""
    assert c is not None
    n_L, lambda_L = _coefficients(a_BL, n_L, lambda_L, a_BL.shape[0])
    tanh_L, slope_L = torch.zeros_like(n_L), torch.zeros_like(n_L)
    for rows in row_blocks(a_BL):
        tanh_RL = (a_BL[rows] * (c * n_L)).tanh_()
        tanh_L += tanh_RL.sum(0)
        slope_L += tanh_RL.square_().neg_().add_(1).mul_(a_BL[rows]).sum(0)
    return torch.dot(tanh_L, lambda_L), slope_L * c * lambda_L


def dense_penalty_backward(g: Tensor, a_BL: Tensor, n_L: Tensor, lambda_L: Tensor, c: float | None) -> Tensor:
    """`da_BL`."""
    assert c is not None
    n_acc_L, lambda_L = _coefficients(a_BL, n_L, lambda_L, a_BL.shape[0])
    coef_L = g * c * lambda_L
    da_BL = host_buffers.empty_like(a_BL)
    for rows in row_blocks(a_BL):
        slope_RL = (a_BL[rows] * (c * n_acc_L)).tanh_().square_().neg_().add_(1)
        da_BL[rows] = slope_RL.mul_(coef_L * n_acc_L)
    return da_BL


def sparse_penalty(entries: Entries, n_L: Tensor, lambda_L: Tensor, c: float | None) -> Tensor:
    value_N, latent_idx_N = entries.value_N, entries.latent_idx_N
    n_L, lambda_L = _coefficients(value_N, n_L, lambda_L, entries.n_tokens)
    if c is None:
        return value_N.to(n_L.dtype) @ (n_L * lambda_L).index_select(0, latent_idx_N)
    tanh_N = (value_N * (c * n_L).index_select(0, latent_idx_N)).tanh_()
    return tanh_N @ lambda_L.index_select(0, latent_idx_N)


def sparse_penalty_backward(
    g: Tensor, entries: Entries, n_L: Tensor, lambda_L: Tensor, c: float | None
) -> tuple[Tensor, Tensor]:
    """`dvalue_N, dn_L`."""
    _, latent_idx_N, value_N, order_N, latent_ptr_L1 = entries
    n_acc_L, lambda_L = _coefficients(value_N, n_L, lambda_L, entries.n_tokens)
    if c is None:
        dvalue_N = (g * n_acc_L * lambda_L).index_select(0, latent_idx_N)
        dn_L = g * lambda_L * latent_sum(order_N, latent_ptr_L1, value_N.to(n_acc_L.dtype))
    else:
        n_N = n_acc_L.index_select(0, latent_idx_N)
        slope_N = (value_N * (c * n_N)).tanh_().square_().neg_().add_(1)
        slope_N *= (g * c * lambda_L).index_select(0, latent_idx_N)
        dvalue_N, dn_L = slope_N * n_N, latent_sum(order_N, latent_ptr_L1, slope_N * value_N)
    return dvalue_N.to(value_N.dtype), dn_L.to(n_L.dtype)


def mixed_penalty_backward(
    g: Tensor, entries: Entries, n_L: Tensor, lambda_L: Tensor, c: float
) -> tuple[Tensor, Tensor]:
    """`da_BL, dn_L` of dense latents of which only the entries are not 0: everywhere else the slope is that of tanh at 0."""
    dvalue_N, dn_L = sparse_penalty_backward(g, entries, n_L, lambda_L, c)
    n_acc_L, lambda_acc_L = _coefficients(entries.value_N, n_L, lambda_L, entries.n_tokens)
    da_BL = host_buffers.empty((entries.n_tokens, n_L.shape[0]), entries.value_N)
    da_BL.copy_((g * c * lambda_acc_L * n_acc_L).expand_as(da_BL))
    da_BL.view(-1).index_copy_(0, entry_places(entries, n_L.shape[0]), dvalue_N)
    return da_BL, dn_L
