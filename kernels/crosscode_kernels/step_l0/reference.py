"""step_l0, dense.

Axes: B tokens · L latents.
"""

from __future__ import annotations

from torch import Tensor

from crosscode_kernels.checks import acc_dtype
from crosscode_kernels.sparse import Latents


def step_l0(latents: Latents, t_L: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    assert latents.preacts is not None
    h_BL = latents.preacts.detach()
    theta_L = t_L.to(acc_dtype(h_BL.dtype)).exp()
    window_BL = ((h_BL - theta_L.detach()).abs() < eps / 2).to(theta_L.dtype)
    # The second factor is 0, with the wanted slope.
    step_BL = (h_BL > theta_L).to(theta_L.dtype) - window_BL / eps * (theta_L - theta_L.detach())
    return step_BL.sum(1), step_BL.sum(0)
