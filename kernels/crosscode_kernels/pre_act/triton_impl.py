"""The pre_act penalty, on the dense streaming kernels.

Axes: B tokens · L latents.
"""

from __future__ import annotations

from torch import Tensor

from crosscode_kernels.penalties import PreActTerm
from crosscode_kernels.triton_common.dense import dense_backward, dense_forward


def pre_act(h_BL: Tensor, term: PreActTerm) -> Tensor:
    return dense_forward(h_BL, term.t_L, term.n_L, lambda_pre_L=term.lambda_L, pre=True).pre


def pre_act_backward(g: Tensor, h_BL: Tensor, term: PreActTerm) -> tuple[Tensor, Tensor, Tensor]:
    return dense_backward(h_BL, g_pre=g, t_L=term.t_L, n_L=term.n_L, lambda_pre_L=term.lambda_L, pre=True)[:3]
