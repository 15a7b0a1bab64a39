"""GroupMax encode: the vendor's GEMM over a chunk of groups, then one streaming pass for the maximum of each group.

Axes: B tokens · I input width · L latents · K groups.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from crosscode_kernels.encoder import Encoder
from crosscode_kernels.selection.triton_impl import latent_chunks, preacts
from crosscode_kernels.triton_common.heuristics import groupmax_config, key_layout
from crosscode_kernels.triton_common.launch import launch
from crosscode_kernels.triton_common.primitives import rank_keys, relu_nan, value_of_key


@triton.jit
def _groupmax_kernel(
    h_ptr, idx_ptr, value_ptr, n_groups, group_width, KEY_DTYPE: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_W: tl.constexpr,
):  # fmt: skip
    pid_b = tl.program_id(0).to(tl.int64)
    offs_g = tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G)
    mask_g = offs_g < n_groups
    h_row = h_ptr + pid_b * n_groups * group_width
    best = tl.full([BLOCK_G], -1, dtype=tl.int32)
    best_w = tl.zeros([BLOCK_G], dtype=tl.int32)
    for first in range(0, group_width, BLOCK_W):
        offs_w = first + tl.arange(0, BLOCK_W)
        mask = mask_g[:, None] & (offs_w < group_width)[None, :]
        h = tl.load(h_row + offs_g[:, None] * group_width + offs_w[None, :], mask=mask, other=0.0)
        key = tl.where(mask, rank_keys(relu_nan(h.to(tl.float32)), KEY_DTYPE), -1)  # [BLOCK_G, BLOCK_W]
        top = tl.max(key, 1)
        first_w = tl.min(tl.where(key == top[:, None], offs_w[None, :], group_width), 1)
        best_w = tl.where(top > best, first_w, best_w)
        best = tl.maximum(best, top)
    column = offs_g * group_width + best_w
    tl.store(idx_ptr + pid_b * n_groups + offs_g, column, mask=mask_g)
    tl.store(value_ptr + pid_b * n_groups + offs_g, value_of_key(best, KEY_DTYPE), mask=mask_g)


def group_max(h_BL: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`(column_BK int32, value_BK)`: the maximum of `relu(h)` in each of k contiguous groups, of equals the first."""
    n_rows, n_columns = h_BL.shape
    idx_BK, value_BK = h_BL.new_empty(n_rows, k, dtype=torch.int32), h_BL.new_empty(n_rows, k)
    if k == 0:
        return idx_BK, value_BK
    config = groupmax_config(n_columns // k, k)
    launch(
        _groupmax_kernel, (n_rows, triton.cdiv(k, config.BLOCK_G)), h_BL, idx_BK, value_BK, k, n_columns // k,
        KEY_DTYPE=key_layout(h_BL.dtype).KEY_DTYPE, BLOCK_G=config.BLOCK_G, BLOCK_W=config.BLOCK_W,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return idx_BK, value_BK


def encode_groupmax(encoder: Encoder, k: int) -> tuple[Tensor, Tensor]:
    group_width = encoder.W_enc_LI.shape[0] // k
    idx_parts: list[Tensor] = []
    value_parts: list[Tensor] = []
    for chunk in latent_chunks(encoder.x_BI.shape[0], encoder.W_enc_LI.shape[0], group_width):
        h_BL = preacts(encoder.of_latents(chunk))
        idx_BK, value_BK = group_max(h_BL, h_BL.shape[1] // group_width)
        idx_parts.append(idx_BK + chunk.start)
        value_parts.append(value_BK)
    return torch.cat(idx_parts, 1), torch.cat(value_parts, 1)
