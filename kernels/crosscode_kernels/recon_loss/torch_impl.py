"""recon_loss in stock ops.

Axes: B tokens · O flattened output dims · X crosscoding positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from crosscode_kernels import host_buffers
from crosscode_kernels.checks import acc_dtype


def recon_loss(y_BO: Tensor, target_BO: Tensor, segments: list[int]) -> tuple[Tensor, Tensor]:
    """`per_x_X, residual_BO`."""
    return errors(torch.sub(y_BO, target_BO, out=host_buffers.empty_like(y_BO)), segments)


def errors(residual_BO: Tensor, segments: list[int]) -> tuple[Tensor, Tensor]:
    """`per_x_X` of a residual, and itself."""
    dtype = acc_dtype(residual_BO.dtype)
    # Row by row: one read of the residual, no buffer of squares, and short sums.
    norms_XB = [torch.linalg.vector_norm(part, dim=1, dtype=dtype) for part in residual_BO.split(segments, dim=1)]
    return torch.stack(norms_XB).square_().sum(1).div_(residual_BO.shape[0]), residual_BO


def recon_loss_backward(g_X: Tensor, residual_BO: Tensor, segments: list[int]) -> Tensor:
    """`dy_BO = 2 g_x residual / B`."""
    scale_X = g_X * (2 / residual_BO.shape[0])
    dy_BO = host_buffers.empty_like(residual_BO)
    for x, (out, part) in enumerate(zip(dy_BO.split(segments, dim=1), residual_BO.split(segments, dim=1), strict=True)):
        torch.mul(part, scale_X[x], out=out)
    return dy_BO
