"""jumprelu_penalties: JumpReLU with both penalties of the January 2025 update, in one pass over `h_BL` each way.

Axes: B tokens · L latents.

    a = jumprelu(h, t);  tanh = weighted_tanh(a, n, lambda_tanh, c);  pre_act = pre_act(h, t, n, lambda_pre)

with the gradients of these three ops (see their doors) added up. Shapes and dtypes are theirs as well.
Errors (ValueError): theirs.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from crosscode_kernels.backend import AnyBackend, backend_for
from crosscode_kernels.checks import check_per_latent, check_positive
from crosscode_kernels.jumprelu import StraightThrough, check_jumprelu
from crosscode_kernels.jumprelu_penalties import autograd, reference
from crosscode_kernels.opset import door


class JumpReLUPenalties(NamedTuple):
    """`latents_BL` after JumpReLU, and the two weighted penalties (scalars, mean over B)."""

    latents_BL: Tensor
    tanh: Tensor
    pre_act: Tensor


@door
def jumprelu_penalties(
    h_BL: Tensor,
    t_L: Tensor,
    n_L: Tensor,
    lambda_tanh_L: Tensor,
    lambda_pre_L: Tensor,
    *,
    eps: float,
    ste: StraightThrough,
    c: float,
    backend: AnyBackend = "auto",
) -> JumpReLUPenalties:
    """JumpReLU and both penalties."""
    op, backend = "jumprelu_penalties", backend_for(backend, h_BL)
    check_jumprelu(op, h_BL, t_L, eps, ste)
    check_per_latent(op, h_BL, h_BL.shape[1], n_L=n_L, lambda_tanh_L=lambda_tanh_L, lambda_pre_L=lambda_pre_L)
    check_positive(op, c=c)
    tensors, options = (h_BL, t_L, n_L, lambda_tanh_L.detach(), lambda_pre_L.detach()), (float(eps), ste == "gdm")
    if backend.name == "reference":
        return JumpReLUPenalties(*reference.jumprelu_penalties(*tensors, *options, c))
    return JumpReLUPenalties(*autograd.jumprelu_penalties(*tensors, float(c), *options, backend=backend))
