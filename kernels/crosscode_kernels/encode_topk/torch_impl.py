"""encode_topk in stock ops.

Axes: B tokens · I flattened input dims · L latents · K kept per token.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from crosscode_kernels import host_buffers
from crosscode_kernels.blocks import row_blocks
from crosscode_kernels.encoder import Encoder
from crosscode_kernels.selection.torch_impl import row_topk

_SELECTED_AT_ONCE, _FEWEST_ROWS_AT_ONCE = 1 << 23, 256


def dense_preacts(encoder: Encoder) -> Tensor:
    """`h_BL`, in one pass, without gradient."""
    x_BI, W_enc_LI, b_enc_L = encoder
    h_BL = host_buffers.empty((x_BI.shape[0], encoder.W_enc_LI.shape[0]), x_BI)
    if b_enc_L is not None and x_BI.dtype.itemsize < 4:  # added before the only rounding
        return torch.addmm(b_enc_L, x_BI, W_enc_LI.T, out=h_BL)
    torch.mm(x_BI, W_enc_LI.T, out=h_BL)
    # `addmm` first writes the bias to all of `h`, and then reads it again: one pass more.
    return h_BL if b_enc_L is None else h_BL.add_(b_enc_L)


def by_blocks(select: Callable[[Tensor, int], tuple[Tensor, Tensor]], h_BL: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`select`, of some rows at a time: what it makes on its way then stays small and in cache."""
    blocks = row_blocks(h_BL, _SELECTED_AT_ONCE, _FEWEST_ROWS_AT_ONCE)
    value_BK, latent_idx_BK = (
        torch.cat(part) for part in zip(*(select(h_BL[rows], k) for rows in blocks), strict=True)
    )
    return value_BK, latent_idx_BK


def encode_topk(encoder: Encoder, k: int) -> tuple[Tensor, Tensor]:
    """`latent_idx_BK, value_BK`, after ReLU."""
    value_BK, latent_idx_BK = by_blocks(row_topk, dense_preacts(encoder), k)
    return latent_idx_BK, value_BK
