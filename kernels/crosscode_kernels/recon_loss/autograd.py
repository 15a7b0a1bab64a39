"""recon_loss as a registered op; what it saves for backward is the residual.

Axes: B tokens · O flattened output dims · X crosscoding positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from crosscode_kernels.backend import Backend
from crosscode_kernels.checks import acc_dtype
from crosscode_kernels.recon_loss import torch_impl
from crosscode_kernels.registration import Arguments, define_op, like


def zero_loss(target_BO: Tensor, segments: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """`loss, per_x_X, residual_BO` of an empty batch, and for tracing."""
    per_x_X = target_BO.new_zeros(len(segments), dtype=acc_dtype(target_BO.dtype))
    return per_x_X.sum(), per_x_X, like(target_BO)


def residual_grad(
    d_loss: Tensor | None, d_per_x_X: Tensor | None, residual_BO: Tensor, segments: list[int], backend: Backend
) -> Tensor:
    """Gradient of the output from those of `loss` and `per_x_X`."""
    g_X = residual_BO.new_zeros(len(segments), dtype=acc_dtype(residual_BO.dtype))
    if d_loss is not None:
        g_X = g_X + d_loss
    if d_per_x_X is not None:
        g_X = g_X + d_per_x_X
    return _recon_loss_backward(g_X, residual_BO, segments, backend=backend)


def _backward(a: Arguments, d_loss: Tensor | None, d_per_x_X: Tensor | None, _: None) -> dict[str, Tensor | None]:
    dy_BO = residual_grad(d_loss, d_per_x_X, a.residual_BO, a.segments, a.backend)
    return {"y_BO": dy_BO, "target_BO": -dy_BO if "target_BO" in a.needs else None}


_recon_loss_backward = define_op(
    torch_impl.recon_loss_backward,
    empty=lambda a: torch.empty_like(a.residual_BO) if a.residual_BO.shape[0] == 0 else None,
    fake=lambda a: torch.empty_like(a.residual_BO),
)
recon_loss = define_op(
    torch_impl.recon_loss,
    empty=lambda a: zero_loss(a.y_BO, a.segments) if a.y_BO.shape[0] == 0 else None,
    finish=lambda a, result: (result[0].sum(), *result),
    fake=lambda a: zero_loss(a.y_BO, a.segments),
    saved=lambda a, output: {"residual_BO": output[2]},
    backward=_backward,
    n_results=3,
)
