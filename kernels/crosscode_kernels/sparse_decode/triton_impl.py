"""Sparse decode and gather-dot: programs walk the entries of a token and gather rows of the decoder.

Axes: B tokens · O width of a decoder row · L latents · N stored entries.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from crosscode_kernels.segments.triton_impl import reduce_by_latent
from crosscode_kernels.sparse import Entries
from crosscode_kernels.triton_common.heuristics import decode_config
from crosscode_kernels.triton_common.launch import launch


@triton.jit
def gather_sum(
    row_ptr, idx_ptr, value_ptr, W_ptr, pid_b, offs_o, mask_o, n_out, BLOCK_K: tl.constexpr, BLOCK_O: tl.constexpr
):
    """`sum_n value_n W[idx_n, offs_o]` over the entries of token `pid_b`, fp32; entries of value 0 load nothing."""
    start = tl.load(row_ptr + pid_b)
    end = tl.load(row_ptr + pid_b + 1)
    offs_k = tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_K, BLOCK_O], dtype=tl.float32)
    for first in range(start, end, BLOCK_K):
        offs_n = first + offs_k
        value = tl.load(value_ptr + offs_n, mask=offs_n < end, other=0.0).to(tl.float32)  # [BLOCK_K]
        active = (offs_n < end) & (value != 0.0)
        row = tl.load(idx_ptr + offs_n, mask=active, other=0).to(tl.int64)
        w = tl.load(
            W_ptr + row[:, None] * n_out + offs_o[None, :], mask=active[:, None] & mask_o[None, :], other=0.0
        )  # [BLOCK_K, BLOCK_O]
        acc += value[:, None] * w.to(tl.float32)
    return tl.sum(acc, 0)


@triton.jit
def _sparse_decode_kernel(
    row_ptr, idx_ptr, value_ptr, W_ptr, b_ptr, y_ptr, n_out, HAS_BIAS: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_O: tl.constexpr,
):  # fmt: skip
    pid_b = tl.program_id(0).to(tl.int64)
    offs_o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    mask_o = offs_o < n_out
    y = gather_sum(row_ptr, idx_ptr, value_ptr, W_ptr, pid_b, offs_o, mask_o, n_out, BLOCK_K, BLOCK_O)  # [BLOCK_O]
    if HAS_BIAS:
        y += tl.load(b_ptr + offs_o, mask=mask_o, other=0.0).to(tl.float32)
    tl.store(y_ptr + pid_b * n_out + offs_o, y, mask=mask_o)


@triton.jit
def _gather_dot_kernel(row_ptr, idx_ptr, dy_ptr, W_ptr, dot_ptr, n_out, BLOCK_K: tl.constexpr, BLOCK_O: tl.constexpr):
    pid_b = tl.program_id(0).to(tl.int64)
    start = tl.load(row_ptr + pid_b)
    end = tl.load(row_ptr + pid_b + 1)
    offs_k = tl.arange(0, BLOCK_K)
    for first in range(start, end, BLOCK_K):
        mask_k = first + offs_k < end
        row = tl.load(idx_ptr + first + offs_k, mask=mask_k, other=0).to(tl.int64)
        acc = tl.zeros([BLOCK_K, BLOCK_O], dtype=tl.float32)
        for first_o in range(0, n_out, BLOCK_O):
            offs_o = first_o + tl.arange(0, BLOCK_O)
            mask_o = offs_o < n_out
            dy = tl.load(dy_ptr + pid_b * n_out + offs_o, mask=mask_o, other=0.0).to(tl.float32)  # [BLOCK_O]
            w = tl.load(
                W_ptr + row[:, None] * n_out + offs_o[None, :], mask=mask_k[:, None] & mask_o[None, :], other=0.0
            )  # [BLOCK_K, BLOCK_O]
            acc += dy[None, :] * w.to(tl.float32)
        tl.store(dot_ptr + first + offs_k, tl.sum(acc, 1), mask=mask_k)


def sparse_decode(entries: Entries, W_LO: Tensor, b_O: Tensor | None) -> Tensor:
    n_tokens, (n_latents, width) = entries.n_tokens, W_LO.shape
    y_BO = entries.value_N.new_empty(n_tokens, width)
    config = decode_config(n_latents, width, W_LO.element_size())
    launch(
        _sparse_decode_kernel, (n_tokens, triton.cdiv(width, config.BLOCK_O)), *entries[:3], W_LO,
        W_LO if b_O is None else b_O, y_BO, width, HAS_BIAS=b_O is not None, BLOCK_K=config.BLOCK_K,
        BLOCK_O=config.BLOCK_O, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return y_BO


def gather_dot(entries: Entries, dy_BO: Tensor, W_LO: Tensor) -> Tensor:
    """By latent where entries are sorted so: a row of W is read once, and what is read many times is dy, which L2 holds."""
    if entries.order_N.shape[0]:
        return reduce_by_latent(entries, dy_BO, W_LO, want_out=False)[2]
    n_tokens, width = dy_BO.shape
    dot_N = W_LO.new_empty(entries.latent_idx_N.shape[0])
    config = decode_config(1, width, W_LO.element_size())
    launch(
        _gather_dot_kernel, (n_tokens,), *entries[:2], dy_BO, W_LO, dot_N, width, BLOCK_K=config.BLOCK_K,
        BLOCK_O=config.BLOCK_O, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return dot_N


def sparse_decode_backward(entries: Entries, dy_BO: Tensor, W_LO: Tensor) -> tuple[Tensor, Tensor]:
    """Each row of W is read once and each gathered row of dy serves both."""
    dW_LO, _, dvalue_N = reduce_by_latent(entries, dy_BO, W_LO)
    return dvalue_N, dW_LO
