"""The penalties on sparse latents: a sum over entries, and its gradients to the entries and to the norms.

Axes: L latents · N stored entries · T tiles.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from crosscode_kernels.triton_common.heuristics import elementwise_config, latent_sum_config
from crosscode_kernels.triton_common.launch import launch
from crosscode_kernels.triton_common.primitives import tanh, tanh_slope


@triton.jit
def _sparse_penalty_fwd_kernel(
    idx_ptr, value_ptr, n_ptr, lambda_ptr, partial_ptr, N, c, TANH: tl.constexpr, BLOCK: tl.constexpr
):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < N
    latent = tl.load(idx_ptr + offs, mask=mask, other=0)
    a = tl.load(value_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    n = tl.load(n_ptr + latent, mask=mask, other=0.0).to(tl.float32)
    coefficient = tl.load(lambda_ptr + latent, mask=mask, other=0.0).to(tl.float32)
    term = tanh(c * a * n) if TANH else a * n
    tl.store(partial_ptr + tl.program_id(0), tl.sum(tl.where(mask, coefficient * term, 0.0), 0))


@triton.jit
def _sparse_penalty_bwd_kernel(
    g_ptr, order_ptr, latent_ptr, value_ptr, n_ptr, lambda_ptr, dvalue_ptr, dn_ptr, L, batch_size, c,
    TANH: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """A program owns a few latents: their entries' gradients, and the sum for their norms in order of the entries."""
    offs_l = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)
    mask_l = offs_l < L
    start = tl.load(latent_ptr + offs_l, mask=mask_l, other=0)
    end = tl.load(latent_ptr + offs_l + 1, mask=mask_l, other=0)
    n = tl.load(n_ptr + offs_l, mask=mask_l, other=0.0).to(tl.float32)
    weight = tl.load(lambda_ptr + offs_l, mask=mask_l, other=0.0).to(tl.float32) * tl.load(g_ptr) / batch_size
    dn = tl.zeros([BLOCK_L, BLOCK_E], dtype=tl.float32)
    for first in range(0, tl.max(end - start, 0), BLOCK_E):
        offs_e = start[:, None] + first + tl.arange(0, BLOCK_E)[None, :]
        mask = offs_e < end[:, None]
        entry = tl.load(order_ptr + offs_e, mask=mask, other=0)  # [BLOCK_L, BLOCK_E]
        a = tl.load(value_ptr + entry, mask=mask, other=0.0).to(tl.float32)
        if TANH:
            slope = c * tanh_slope(c * a * n[:, None])
            dn += tl.where(mask, a * slope, 0.0)
            dvalue = weight[:, None] * n[:, None] * slope
        else:
            dn += a
            dvalue = weight[:, None] * n[:, None] + tl.zeros([BLOCK_L, BLOCK_E], dtype=tl.float32)
        tl.store(dvalue_ptr + entry, dvalue, mask=mask)
    tl.store(dn_ptr + offs_l, weight * tl.sum(dn, 1), mask=mask_l)


def sparse_penalty(
    latent_idx_N: Tensor, value_N: Tensor, n_L: Tensor, lambda_L: Tensor, batch_size: int, c: float | None
) -> Tensor:
    """`(1 / B) sum_n lambda f(a_n)`, `f` = tanh(c a n), or a n where `c` is None; fp32."""
    n_entries = value_N.shape[0]
    config = elementwise_config(n_entries)
    grid = (triton.cdiv(n_entries, config.BLOCK),)
    partial_T = value_N.new_empty(grid, dtype=torch.float32)
    launch(
        _sparse_penalty_fwd_kernel, grid, latent_idx_N, value_N, n_L, lambda_L, partial_T, n_entries, c or 1.0,
        TANH=c is not None, BLOCK=config.BLOCK, num_warps=config.num_warps,
    )  # fmt: skip
    return partial_T.sum() / batch_size


def sparse_penalty_backward(
    g: Tensor, order_N: Tensor, latent_ptr_L1: Tensor, value_N: Tensor, n_L: Tensor, lambda_L: Tensor, batch_size: int,
    c: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`(dvalue_N, dn_L)` of `sparse_penalty`."""
    n_latents = n_L.shape[0]
    config = latent_sum_config(value_N.shape[0], n_latents)
    dvalue_N, dn_L = torch.empty_like(value_N), torch.empty_like(n_L)
    launch(
        _sparse_penalty_bwd_kernel, (triton.cdiv(n_latents, config.BLOCK_L),), g, order_N, latent_ptr_L1, value_N, n_L,
        lambda_L, dvalue_N, dn_L, n_latents, batch_size, c or 1.0, TANH=c is not None, BLOCK_L=config.BLOCK_L,
        BLOCK_E=config.BLOCK_E, num_warps=config.num_warps,
    )  # fmt: skip
    return dvalue_N, dn_L
