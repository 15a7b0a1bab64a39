"""pre_act, dense.

Axes: B tokens · L latents.
"""

from __future__ import annotations

from torch import Tensor

from crosscode_kernels.checks import acc_dtype


def pre_act(h_BL: Tensor, t_L: Tensor, n_L: Tensor, lambda_L: Tensor) -> Tensor:
    dtype = acc_dtype(h_BL.dtype)
    h_BL, t_L, n_L, lambda_L = (tensor.to(dtype) for tensor in (h_BL, t_L, n_L, lambda_L))
    return (lambda_L * (t_L.exp() - h_BL).relu() * n_L).sum() / max(h_BL.shape[0], 1)
