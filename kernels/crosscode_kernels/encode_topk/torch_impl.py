"""encode_topk in stock ops.

Axes: B tokens · I flattened input dims · L latents · K kept per token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from crosscode_kernels import host_buffers
from crosscode_kernels.blocks import row_blocks
from crosscode_kernels.registry import register_kernel
from crosscode_kernels.selection.torch_impl import row_topk

_SELECTED_AT_ONCE, _FEWEST_ROWS_AT_ONCE = 1 << 22, 256
"""Pre-activations, and rows, to select from at a time: what selection makes on its way then stays small and in cache."""


def dense_preacts(x_BI: Tensor, W_enc_LI: Tensor, b_enc_L: Tensor | None) -> Tensor:
    """`h_BL`, in one pass, without gradient."""
    h_BL = host_buffers.empty((x_BI.shape[0], W_enc_LI.shape[0]), x_BI)
    if b_enc_L is None:
        return torch.mm(x_BI, W_enc_LI.T, out=h_BL)
    return torch.addmm(b_enc_L, x_BI, W_enc_LI.T, out=h_BL)


@register_kernel("encode_topk", "torch")
def encode_topk(x_BI: Tensor, W_enc_LI: Tensor, b_enc_L: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    h_BL = dense_preacts(x_BI, W_enc_LI, b_enc_L)
    blocks = row_blocks(h_BL, _SELECTED_AT_ONCE, _FEWEST_ROWS_AT_ONCE)
    parts = [row_topk(h_BL[rows], k) for rows in blocks]
    value_BK, latent_idx_BK = (torch.cat(part) for part in zip(*parts, strict=True))
    return latent_idx_BK, value_BK
