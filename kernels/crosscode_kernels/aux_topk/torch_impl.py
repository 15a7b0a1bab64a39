"""aux_topk in stock ops: on the CPU only the dead latents are encoded.

Axes: B tokens · I flattened input dims · L latents · Q dead latents · K kept per token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from crosscode_kernels.encode_topk.torch_impl import dense_preacts
from crosscode_kernels.encoder import Encoder
from crosscode_kernels.selection.torch_impl import row_topk


def aux_topk(encoder: Encoder, dead_mask_L: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`latent_idx_BK, value_BK`, padded with (latent 0, value 0)."""
    x_BI = encoder.x_BI
    if x_BI.device.type != "cpu":
        # How many latents are dead is known to the device only; asking would stall the step.
        h_BL = dense_preacts(encoder).masked_fill_(~dead_mask_L, 0)
        value_BK, latent_idx_BK = row_topk(h_BL, k)
        return torch.where(value_BK == 0, 0, latent_idx_BK), value_BK
    dead_Q = dead_mask_L.nonzero().squeeze(1)
    n_kept = min(k, dead_Q.shape[0])
    value_BK = x_BI.new_zeros(x_BI.shape[0], k)
    latent_idx_BK = torch.zeros(x_BI.shape[0], k, dtype=torch.int32)
    if n_kept:
        value, column = row_topk(dense_preacts(encoder.of_latents(dead_Q)), n_kept)
        value_BK[:, :n_kept] = value
        latent_idx_BK[:, :n_kept] = torch.where(value == 0, 0, dead_Q[column].int())
    return latent_idx_BK, value_BK
