"""pre_act as a registered op."""

from __future__ import annotations

import torch
from torch import Tensor

from crosscode_kernels.checks import acc_dtype
from crosscode_kernels.penalties import PreActTerm
from crosscode_kernels.pre_act import torch_impl
from crosscode_kernels.registration import Arguments, define_op, like


def _backward(a: Arguments, g: Tensor) -> dict[str, Tensor | None]:
    grads = _pre_act_backward(g, a.h_BL, PreActTerm(a.t_L, a.n_L, a.lambda_L), backend=a.backend)
    return dict(zip(("h_BL", "t_L", "n_L"), grads, strict=True))


_pre_act_backward = define_op(
    torch_impl.pre_act_backward,
    empty=lambda a: (
        (torch.empty_like(a.h_BL), torch.zeros_like(a.t_L), torch.zeros_like(a.n_L)) if a.h_BL.numel() == 0 else None
    ),
    fake=lambda a: (like(a.h_BL), torch.empty_like(a.t_L), torch.empty_like(a.n_L)),
)
pre_act = define_op(
    torch_impl.pre_act,
    empty=lambda a: a.h_BL.new_zeros((), dtype=acc_dtype(a.h_BL.dtype)) if a.h_BL.numel() == 0 else None,
    fake=lambda a: a.h_BL.new_empty((), dtype=acc_dtype(a.h_BL.dtype)),
    saved=lambda a, _: {"h_BL": a.h_BL, "t_L": a.t_L, "n_L": a.n_L, "lambda_L": a.lambda_L},
    backward=_backward,
)
