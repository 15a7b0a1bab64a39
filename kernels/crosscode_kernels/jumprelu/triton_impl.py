"""JumpReLU with the straight-through gradient, on the dense streaming kernels.

Axes: B tokens · L latents.
"""

from __future__ import annotations

from torch import Tensor

from crosscode_kernels.triton_common.dense import dense_backward, dense_forward


def jumprelu(h_BL: Tensor, t_L: Tensor) -> Tensor:
    a_BL = dense_forward(h_BL, t_L, jump=True).a_BL
    assert a_BL is not None
    return a_BL


def jumprelu_backward(da_BL: Tensor, h_BL: Tensor, t_L: Tensor, eps: float, gdm: bool) -> tuple[Tensor, Tensor]:
    return dense_backward(h_BL, da_BL, t_L=t_L, jump=True, gdm=gdm, eps=eps)[:2]
