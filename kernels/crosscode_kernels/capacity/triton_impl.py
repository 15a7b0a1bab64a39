"""Entries of a dense matrix into buffers of fixed size, and products that are made only where those do not fit.

Axes: B tokens · L latents · N capacity · M, K, J rows, inner dimension and columns of a product.

Whether a batch fits is known on the device only, so both ways are launched: where it fits the programs of the products end at
once, where it does not rows of entries are empty.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from crosscode_kernels.aux_topk.triton_impl import precision_of
from crosscode_kernels.triton_common.heuristics import dead_gemm_config, elementwise_config, rows_are_aligned
from crosscode_kernels.triton_common.launch import INTERPRETED, launch


@triton.jit
def _support_kernel(
    h_ptr, a_ptr, least_ptr, row_ptr, count_ptr, idx_ptr, value_ptr, place_ptr, L, STORE: tl.constexpr,
    HAS_LEAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Row by row: how many h are not at most `least` (0 without); with STORE their columns, ascending, a, and places."""
    pid_b = tl.program_id(0).to(tl.int64)
    position = pid_b * 0
    if STORE:
        position = tl.load(row_ptr + pid_b).to(tl.int64)
        if position == tl.load(row_ptr + pid_b + 1):
            return
    kept = tl.zeros([BLOCK], dtype=tl.int32)
    for first in range(0, L, BLOCK):
        column = first + tl.arange(0, BLOCK)
        h = tl.load(h_ptr + pid_b * L + column, mask=column < L, other=0.0).to(tl.float32)
        least = tl.zeros([BLOCK], dtype=tl.float32)
        if HAS_LEAST:
            least = tl.load(least_ptr + column, mask=column < L, other=0.0)
        # Written as "not at most", so that NaN is kept.
        take = tl.where((h <= least) | (column >= L), 0, 1)
        if STORE:
            slot = position + tl.cumsum(take, 0) - take
            a = tl.load(a_ptr + pid_b * L + column, mask=take > 0, other=0.0)
            tl.store(idx_ptr + slot, column, mask=take > 0)
            tl.store(value_ptr + slot, a, mask=take > 0)
            tl.store(place_ptr + slot, pid_b * L + column, mask=take > 0)
            position += tl.sum(take, 0)
        else:
            kept += take
    if not STORE:
        tl.store(count_ptr + pid_b, tl.sum(kept, 0))


def support(
    h_BL: Tensor, a_BL: Tensor, least_L: Tensor | None, capacity: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`row_ptr_B1, latent_idx_N, value_N, place_N, overflows`: where h is above `least` (float32; None: 0), values from `a`.
    The rest of the buffers has value 0 and place `B * L`; all of them where there are more (`overflows` is 1 then), and rows
    are empty."""
    (n_tokens, n_latents), config = h_BL.shape, elementwise_config(h_BL.shape[1])
    count_B = h_BL.new_empty(n_tokens, dtype=torch.int32)
    latent_idx_N, value_N = count_B.new_zeros(capacity), a_BL.new_zeros(capacity)
    place_N = torch.full((capacity,), n_tokens * n_latents, dtype=torch.int64, device=h_BL.device)

    def run(row_ptr: Tensor, store: bool) -> None:
        launch(
            _support_kernel, (n_tokens,), h_BL, a_BL, h_BL if least_L is None else least_L, row_ptr, count_B,
            latent_idx_N, value_N, place_N, n_latents, STORE=store, HAS_LEAST=least_L is not None, BLOCK=config.BLOCK,
            num_warps=config.num_warps,
        )  # fmt: skip

    run(count_B, False)
    end_B = torch.cumsum(count_B, 0, dtype=torch.int64)
    overflows = end_B[-1] > capacity
    row_ptr_B1 = torch.nn.functional.pad(end_B.masked_fill(overflows, 0).int(), (1, 0))
    run(row_ptr_B1, True)
    return row_ptr_B1, latent_idx_N, value_N, place_N, overflows.int()


@triton.jit
def _product_if_kernel(
    flag_ptr, left_ptr, mask_ptr, right_ptr, bias_ptr, out_ptr, n_m, n_k, n_j, LEFT_T: tl.constexpr,
    RIGHT_T: tl.constexpr, HAS_MASK: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
    WIDEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """`out = left . right (+ bias)` where the flag is set, else nothing. A transposed factor lies in memory as (K, M) or (J, K).
    HAS_MASK: of `left` only what is above 0 (or NaN) in a matrix of its layout."""
    if tl.load(flag_ptr) == 0:
        return
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_j = tl.program_id(1).to(tl.int64) * BLOCK_J + tl.arange(0, BLOCK_J)
    mask_m = offs_m < n_m
    mask_j = offs_j < n_j
    acc = tl.zeros([BLOCK_M, BLOCK_J], dtype=tl.float32)
    for first_k in range(0, n_k, BLOCK_K):
        offs_k = (first_k + tl.arange(0, BLOCK_K)).to(tl.int64)
        mask_k = offs_k < n_k
        if LEFT_T:
            here = offs_k[:, None] * n_m + offs_m[None, :]  # [BLOCK_K, BLOCK_M]
            inside = mask_k[:, None] & mask_m[None, :]
        else:
            here = offs_m[:, None] * n_k + offs_k[None, :]  # [BLOCK_M, BLOCK_K]
            inside = mask_m[:, None] & mask_k[None, :]
        left = tl.load(left_ptr + here, mask=inside, other=0.0)
        if HAS_MASK:
            left = tl.where(tl.load(mask_ptr + here, mask=inside, other=0.0).to(tl.float32) <= 0.0, 0.0, left)
        if RIGHT_T:
            right = tl.load(
                right_ptr + offs_j[:, None] * n_k + offs_k[None, :], mask=mask_j[:, None] & mask_k[None, :], other=0.0
            )  # [BLOCK_J, BLOCK_K]
        else:
            right = tl.load(
                right_ptr + offs_k[:, None] * n_j + offs_j[None, :], mask=mask_k[:, None] & mask_j[None, :], other=0.0
            )  # [BLOCK_K, BLOCK_J]
        if WIDEN:
            left = left.to(tl.float32)
            right = right.to(tl.float32)
        if LEFT_T:
            left = tl.trans(left)
        if RIGHT_T:
            right = tl.trans(right)
        acc = tl.dot(left, right.to(left.dtype), acc, input_precision=PRECISION)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_j, mask=mask_j, other=0.0).to(tl.float32)[None, :]
    tl.store(out_ptr + offs_m[:, None] * n_j + offs_j[None, :], acc, mask=mask_m[:, None] & mask_j[None, :])


def product_if(
    flag: Tensor, left: Tensor, right: Tensor, out: Tensor, *, mask: Tensor | None = None, bias: Tensor | None = None
) -> None:
    """`out = left @ right + bias` in place where `flag` is not 0. A factor may be the transpose of a contiguous matrix; `mask`
    lies as `left` does."""
    (n_m, n_k), n_j = left.shape, right.shape[1]
    left_t, right_t = (not factor.is_contiguous() for factor in (left, right))
    unaligned = (width for width in (n_m, n_k, n_j) if not rows_are_aligned(width, left.element_size()))
    config = dead_gemm_config(next(unaligned, n_k), left.element_size())
    launch(
        _product_if_kernel, (triton.cdiv(n_m, config.BLOCK_B), triton.cdiv(n_j, config.BLOCK_C)), flag, left,
        left if mask is None else mask, right, left if bias is None else bias, out, n_m, n_k, n_j, LEFT_T=left_t,
        RIGHT_T=right_t, HAS_MASK=mask is not None, HAS_BIAS=bias is not None, PRECISION=precision_of(left),
        WIDEN=INTERPRETED, BLOCK_M=config.BLOCK_B, BLOCK_K=config.BLOCK_I, BLOCK_J=config.BLOCK_C,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
