"""JumpReLU and both penalties in one pass over `h_BL` each way, on the dense streaming kernels.

Axes: B tokens · L latents.
"""

from __future__ import annotations

from torch import Tensor

from crosscode_kernels.triton_common.dense import dense_backward, dense_forward


def jumprelu_penalties(
    h_BL: Tensor, t_L: Tensor, n_L: Tensor, lambda_tanh_L: Tensor, lambda_pre_L: Tensor, c: float
) -> tuple[Tensor, Tensor, Tensor]:
    sums = dense_forward(h_BL, t_L, n_L, lambda_tanh_L, lambda_pre_L, jump=True, tanh=True, pre=True, c=c)
    assert sums.a_BL is not None
    return sums.a_BL, sums.penalty, sums.pre


def jumprelu_penalties_backward(
    da_BL: Tensor, g_tanh: Tensor, g_pre: Tensor, h_BL: Tensor, t_L: Tensor, n_L: Tensor, lambda_tanh_L: Tensor,
    lambda_pre_L: Tensor, eps: float, gdm: bool, c: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return dense_backward(
        h_BL, da_BL, g_tanh, g_pre, t_L, n_L, lambda_tanh_L, lambda_pre_L, jump=True, gdm=gdm, tanh=True, pre=True,
        c=c, eps=eps,
    )  # fmt: skip
