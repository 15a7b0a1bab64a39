"""jumprelu as a registered op."""

from __future__ import annotations

import torch
from torch import Tensor

from crosscode_kernels.jumprelu import torch_impl
from crosscode_kernels.registration import Arguments, define_op, like


def _backward(a: Arguments, da_BL: Tensor) -> dict[str, Tensor | None]:
    dh_BL, dt_L = _jumprelu_backward(da_BL, a.h_BL, a.t_L, a.eps, a.gdm, backend=a.backend)
    return {"h_BL": dh_BL, "t_L": dt_L}


_jumprelu_backward = define_op(
    torch_impl.jumprelu_backward,
    empty=lambda a: (torch.empty_like(a.h_BL), torch.zeros_like(a.t_L)) if a.h_BL.numel() == 0 else None,
    fake=lambda a: (like(a.h_BL), torch.empty_like(a.t_L)),
)
jumprelu = define_op(
    torch_impl.jumprelu,
    extra={"eps": float, "gdm": bool},
    empty=lambda a: torch.empty_like(a.h_BL) if a.h_BL.numel() == 0 else None,
    fake=lambda a: like(a.h_BL),
    saved=lambda a, _: {"h_BL": a.h_BL, "t_L": a.t_L},
    backward=_backward,
)
