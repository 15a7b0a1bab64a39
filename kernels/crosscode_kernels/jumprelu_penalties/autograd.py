"""jumprelu_penalties as a registered op."""

from __future__ import annotations

import torch
from torch import Tensor

from crosscode_kernels.checks import acc_dtype
from crosscode_kernels.jumprelu_penalties import torch_impl
from crosscode_kernels.registration import Arguments, define_op, grad_or_zeros, like

_TENSORS = ("h_BL", "t_L", "n_L", "lambda_tanh_L", "lambda_pre_L")


def _zeros(a: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    tanh, pre_act = (a.h_BL.new_zeros((), dtype=acc_dtype(a.h_BL.dtype)) for _ in range(2))
    return like(a.h_BL), tanh, pre_act


def _backward(a: Arguments, da_BL: Tensor | None, *g: Tensor | None) -> dict[str, Tensor | None]:
    scalar = a.h_BL.new_zeros((), dtype=acc_dtype(a.h_BL.dtype))
    upstream = grad_or_zeros(da_BL, a.h_BL), *(grad_or_zeros(one, scalar) for one in g)
    tensors = (getattr(a, name) for name in _TENSORS)
    grads = _backward_op(*upstream, *tensors, a.eps, a.gdm, a.c, backend=a.backend)
    return dict(zip(_TENSORS[:3], grads, strict=True))


_backward_op = define_op(
    torch_impl.jumprelu_penalties_backward,
    empty=lambda a: (
        (torch.empty_like(a.h_BL), torch.zeros_like(a.t_L), torch.zeros_like(a.n_L)) if a.h_BL.numel() == 0 else None
    ),
    fake=lambda a: (like(a.h_BL), torch.empty_like(a.t_L), torch.empty_like(a.n_L)),
)
jumprelu_penalties = define_op(
    torch_impl.jumprelu_penalties,
    extra={"eps": float, "gdm": bool},
    empty=lambda a: _zeros(a) if a.h_BL.numel() == 0 else None,
    fake=_zeros,
    saved=lambda a, _: {name: getattr(a, name) for name in _TENSORS},
    backward=_backward,
)
