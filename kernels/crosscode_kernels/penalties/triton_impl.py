"""The penalties on dense latents, on the streaming kernels; on sparse ones a sum over entries, and its gradients to the
entries and to the norms.

Axes: B tokens · L latents · N stored entries · T tiles.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from crosscode_kernels.sparse import Entries
from crosscode_kernels.triton_common.dense import dense_backward, dense_forward
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


def dense_penalty(a_BL: Tensor, n_L: Tensor, lambda_L: Tensor, c: float | None) -> tuple[Tensor, Tensor]:
    found = dense_forward(a_BL, n_L=n_L, lambda_L=lambda_L, slope=True, **part(c))
    return found.penalty, found.slope_L


def dense_penalty_backward(g: Tensor, a_BL: Tensor, n_L: Tensor, lambda_L: Tensor, c: float | None) -> Tensor:
    return dense_backward(a_BL, g=g, n_L=n_L, lambda_L=lambda_L, **part(c)).dh_BL


def part(c: float | None) -> dict[str, Any]:
    return {"l1": True} if c is None else {"tanh": True, "c": c}


def sparse_penalty(entries: Entries, n_L: Tensor, lambda_L: Tensor, c: float | None) -> Tensor:
    n_entries = entries.value_N.shape[0]
    config = elementwise_config(n_entries)
    grid = (triton.cdiv(n_entries, config.BLOCK),)
    partial_T = entries.value_N.new_empty(grid, dtype=torch.float32)
    launch(
        _sparse_penalty_fwd_kernel, grid, entries.latent_idx_N, entries.value_N, n_L, lambda_L, partial_T, n_entries,
        c or 1.0, TANH=c is not None, BLOCK=config.BLOCK, num_warps=config.num_warps,
    )  # fmt: skip
    return partial_T.sum() / entries.n_tokens


def sparse_penalty_backward(
    g: Tensor, entries: Entries, n_L: Tensor, lambda_L: Tensor, c: float | None
) -> tuple[Tensor, Tensor]:
    n_latents = n_L.shape[0]
    config = latent_sum_config(entries.value_N.shape[0], n_latents)
    dvalue_N, dn_L = torch.zeros_like(entries.value_N), torch.empty_like(n_L)  # padding is in no segment
    launch(
        _sparse_penalty_bwd_kernel, (triton.cdiv(n_latents, config.BLOCK_L),), g, entries.order_N,
        entries.latent_ptr_L1, entries.value_N, n_L, lambda_L, dvalue_N, dn_L, n_latents, entries.n_tokens, c or 1.0,
        TANH=c is not None, BLOCK_L=config.BLOCK_L, BLOCK_E=config.BLOCK_E, num_warps=config.num_warps,
    )  # fmt: skip
    return dvalue_N, dn_L
