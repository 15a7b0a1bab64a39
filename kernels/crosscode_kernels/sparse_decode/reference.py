"""sparse_decode, dense.

Axes: B tokens · O flattened output dims · L latents.
"""

from __future__ import annotations

from einops import einsum
from torch import Tensor

from crosscode_kernels.sparse import Latents


def sparse_decode(latents: Latents, W_dec_LO: Tensor, b_dec_O: Tensor | None) -> Tensor:
    y_BO = einsum(latents.to_dense(), W_dec_LO, "b l, l o -> b o")
    return y_BO if b_dec_O is None else y_BO + b_dec_O
