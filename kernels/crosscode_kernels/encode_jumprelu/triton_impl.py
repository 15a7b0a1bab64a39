"""encode_jumprelu from pre-activations: one pass each way, which leaves or takes all that penalties need.

Axes: B tokens · L latents.
"""

from __future__ import annotations

from torch import Tensor

from crosscode_kernels.penalties.deferred import PenaltyTerm
from crosscode_kernels.penalties.triton_impl import part
from crosscode_kernels.triton_common.dense import dense_backward, dense_forward


def encode_jumprelu(h_BL: Tensor, t_L: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    found = dense_forward(h_BL, t_L, jump=True, sums=True)
    assert found.a_BL is not None
    return found.a_BL, found.deficit_L, found.fired_L


def encode_jumprelu_backward(
    da_BL: Tensor, d_deficit_L: Tensor | None, h_BL: Tensor, t_L: Tensor, eps: float, gdm: bool, term: PenaltyTerm
) -> tuple[Tensor, Tensor, Tensor]:
    penalty = {} if term.g is None else part(term.c)
    found = dense_backward(
        h_BL, da_BL, term.g, t_L=t_L, n_L=term.n_L, lambda_L=term.lambda_L, d_deficit_L=d_deficit_L, jump=True, gdm=gdm,
        want_sum=True, eps=eps, **penalty,
    )  # fmt: skip
    return found.dh_BL, found.dt_L, found.db_L
