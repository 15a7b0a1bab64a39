"""recon_loss as a registered op; what it saves for backward is the residual.

Axes: B tokens · O flattened output dims · X crosscoding positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from crosscode_kernels.checks import acc_dtype
from crosscode_kernels.opset import DecodeReconLoss
from crosscode_kernels.registration import contiguous, define_op
from crosscode_kernels.registry import get_kernel


def _body(y_BO: Tensor, target_BO: Tensor, segments: list[int], backend: str) -> tuple[Tensor, Tensor, Tensor]:
    if y_BO.shape[0] == 0:
        per_x_X = y_BO.new_zeros(len(segments), dtype=acc_dtype(y_BO.dtype))
        return per_x_X.sum(), per_x_X, torch.empty_like(y_BO)
    y_BO, target_BO = contiguous(y_BO, target_BO)
    per_x_X, residual_BO = get_kernel("recon_loss", backend)(y_BO, target_BO, list(segments))
    return per_x_X.sum(), per_x_X, residual_BO


def _fake(y_BO: Tensor, target_BO: Tensor, segments: list[int], backend: str) -> tuple[Tensor, Tensor, Tensor]:
    dtype = acc_dtype(y_BO.dtype)
    residual_BO = torch.empty_like(y_BO, memory_format=torch.contiguous_format)
    return y_BO.new_empty((), dtype=dtype), y_BO.new_empty(len(segments), dtype=dtype), residual_BO


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, _, ctx.segments, ctx.backend = inputs
    ctx.save_for_backward(output[2])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    (residual_BO,) = ctx.saved_tensors
    dy_BO = residual_grad(grads[0], grads[1], residual_BO, ctx.segments, ctx.backend)
    needs_y, needs_target = ctx.needs_input_grad[:2]
    return dy_BO if needs_y else None, -dy_BO if needs_target else None, None, None


def residual_grad(
    d_loss: Tensor | None, d_per_x_X: Tensor | None, residual_BO: Tensor, segments: list[int], backend: str
) -> Tensor:
    """Gradient of the output from those of `loss` and `per_x_X`."""
    g_X = residual_BO.new_zeros(len(segments), dtype=acc_dtype(residual_BO.dtype))
    if d_loss is not None:
        g_X = g_X + d_loss
    if d_per_x_X is not None:
        g_X = g_X + d_per_x_X
    return _recon_loss_backward(g_X, residual_BO, segments, backend)


def _backward_body(g_X: Tensor, residual_BO: Tensor, segments: list[int], backend: str) -> Tensor:
    if residual_BO.shape[0] == 0:
        return torch.empty_like(residual_BO)
    return get_kernel("recon_loss_backward", backend)(g_X, residual_BO, list(segments))


_recon_loss = define_op(
    "recon_loss",
    "(Tensor y_BO, Tensor target_BO, int[] segments, str backend) -> (Tensor, Tensor, Tensor)",
    body=_body,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
_recon_loss_backward = define_op(
    "recon_loss_backward",
    "(Tensor g_X, Tensor residual_BO, int[] segments, str backend) -> Tensor",
    body=_backward_body,
    fake=lambda g_X, residual_BO, segments, backend: torch.empty_like(residual_BO),
)


def recon_loss(y_BO: Tensor, target_BO: Tensor, segments: Sequence[int], backend: str) -> DecodeReconLoss:
    """See `spec`. The residual comes for nothing: it is what backward needs."""
    loss, per_x_X, residual_BO = _recon_loss(y_BO, target_BO, list(segments), backend)
    return DecodeReconLoss(loss, per_x_X, residual_BO.detach())
