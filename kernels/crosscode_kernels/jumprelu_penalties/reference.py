"""jumprelu_penalties, dense: the three ops one after another.

Axes: B tokens · L latents.
"""

from __future__ import annotations

from torch import Tensor

from crosscode_kernels.jumprelu.reference import jumprelu
from crosscode_kernels.pre_act.reference import pre_act
from crosscode_kernels.sparse import DenseLatents
from crosscode_kernels.weighted_tanh.reference import weighted_tanh


def jumprelu_penalties(
    h_BL: Tensor, t_L: Tensor, n_L: Tensor, lambda_tanh_L: Tensor, lambda_pre_L: Tensor, eps: float, gdm: bool, c: float
) -> tuple[Tensor, Tensor, Tensor]:
    a_BL = jumprelu(h_BL, t_L, eps, gdm)
    return (
        a_BL,
        weighted_tanh(DenseLatents(a_BL), n_L, lambda_tanh_L, c),
        pre_act(h_BL, t_L, n_L, lambda_pre_L),
    )
