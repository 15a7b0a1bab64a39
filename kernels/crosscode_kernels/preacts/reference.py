"""preacts, with einops."""

from __future__ import annotations

from einops import einsum
from torch import Tensor

from crosscode_kernels.encoder import Encoder


def preacts(encoder: Encoder) -> Tensor:
    h_BL = einsum(encoder.x_BI, encoder.W_enc_LI, "b i, l i -> b l")
    return h_BL if encoder.b_enc_L is None else h_BL + encoder.b_enc_L
