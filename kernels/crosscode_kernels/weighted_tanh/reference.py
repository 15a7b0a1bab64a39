"""weighted_tanh, dense.

Axes: B tokens · L latents.
"""

from __future__ import annotations

from torch import Tensor

from crosscode_kernels.checks import acc_dtype
from crosscode_kernels.sparse import Latents


def weighted_tanh(latents: Latents, n_L: Tensor, lambda_L: Tensor, c: float) -> Tensor:
    a_BL = latents.to_dense()
    dtype = acc_dtype(a_BL.dtype)
    penalty_BL = lambda_L.detach().to(dtype) * (c * a_BL.to(dtype) * n_L.to(dtype)).tanh()
    return penalty_BL.sum() / max(a_BL.shape[0], 1)
