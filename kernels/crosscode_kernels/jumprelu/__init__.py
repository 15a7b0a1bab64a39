"""jumprelu: a threshold per latent with a straight-through gradient (Anthropic, January 2025 update; Rajamanoharan et al. 2024).

Axes: B tokens · L latents.

    theta = exp(t);  a = h where h > theta, else 0
    da/dh := 1[h > theta]
    da/dt := -(theta / eps) 1[|h - theta| < eps / 2]                 ste = "anthropic"
    da/dt := -(theta / eps) 1[|h - theta| < eps / 2] * theta         ste = "gdm" (the kernel is taken with respect to theta)

Shapes: h_BL, t_L -> a_BL. Dtypes: h floating, t of any floating dtype; theta and the comparison in float32 or wider.
Gradients: to h and t. NaN in h stays NaN; -inf gives 0, +inf stays.
Errors (ValueError): t not of shape (L,), eps not positive, an unknown `ste`.
"""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

from crosscode_kernels.backend import AnyBackend, backend_for
from crosscode_kernels.checks import check_choice, check_dims, check_float, check_per_latent, check_positive
from crosscode_kernels.jumprelu import autograd, reference
from crosscode_kernels.opset import door

StraightThrough = Literal["anthropic", "gdm"]


@door
def jumprelu(h_BL: Tensor, t_L: Tensor, eps: float, ste: StraightThrough, *, backend: AnyBackend = "auto") -> Tensor:
    """`h * 1[h > exp(t)]` with the straight-through gradient for t."""
    backend = backend_for(backend, h_BL)
    check_jumprelu("jumprelu", h_BL, t_L, eps, ste)
    if backend.name == "reference":
        return reference.jumprelu(h_BL, t_L, eps, ste == "gdm")
    return autograd.jumprelu(h_BL, t_L, float(eps), ste == "gdm", backend=backend)


def check_jumprelu(op: str, h_BL: Tensor, t_L: Tensor, eps: float, ste: str) -> None:
    check_dims(op, "h_BL", h_BL, 2)
    check_float(op, h_BL=h_BL)
    check_per_latent(op, h_BL, h_BL.shape[1], t_L=t_L)
    check_straight_through(op, eps, ste)


def check_straight_through(op: str, eps: float, ste: str) -> None:
    check_positive(op, eps=eps)
    check_choice(op, "ste", ste, get_args(StraightThrough))
