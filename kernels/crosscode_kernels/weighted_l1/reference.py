"""weighted_l1, dense.

Axes: B tokens · L latents.
"""

from __future__ import annotations

from torch import Tensor

from crosscode_kernels.checks import acc_dtype
from crosscode_kernels.sparse import Latents


def weighted_l1(latents: Latents, n_L: Tensor, lambda_L: Tensor) -> Tensor:
    a_BL = latents.to_dense()
    dtype = acc_dtype(a_BL.dtype)
    penalty_BL = lambda_L.detach().to(dtype) * a_BL.to(dtype) * n_L.to(dtype)
    return penalty_BL.sum() / max(a_BL.shape[0], 1)
