"""recon_loss: squared reconstruction error, summed over the output, mean over the batch.

Axes: B tokens · O flattened output dims · X crosscoding positions.

    per_x[x] = (1 / B) sum over b and over o in segment x of (y_bo - target_bo)^2;  loss = sum of per_x

Shapes: y_BO, target_BO, segments (widths along O) -> loss scalar, per_x_X, both float32 (float64 for float64); an
empty batch gives 0. `residual_BO = y - target` comes for nothing: it is what backward needs. Detached.
Gradients: `2 (y - target) / B` to y, its negative to target, through `loss` and through `per_x_X`.
Errors (ValueError): shapes that differ, mixed dtypes or devices, segments that are not positive or do not sum to O.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from crosscode_kernels.backend import AnyBackend, backend_for
from crosscode_kernels.checks import autocast_dtype, check_dims, check_float, check_segments
from crosscode_kernels.opset import door
from crosscode_kernels.recon_loss import autograd, reference


class ReconLoss(NamedTuple):
    """`loss` (scalar), the same split by position, and what is left of the target, without gradient."""

    loss: Tensor
    per_x_X: Tensor
    residual_BO: Tensor


@door
def recon_loss(y_BO: Tensor, target_BO: Tensor, segments: Sequence[int], *, backend: AnyBackend = "auto") -> ReconLoss:
    """`(1 / B) ||y - target||^2`, and by position."""
    backend = backend_for(backend, y_BO)
    if y_BO.dtype != target_BO.dtype and autocast_dtype(y_BO.device.type) is not None:
        y_BO, target_BO = y_BO.float(), target_BO.float()
    check_dims("recon_loss", "y_BO", y_BO, 2)
    if y_BO.shape != target_BO.shape:
        raise ValueError(
            f"recon_loss: y_BO has shape {tuple(y_BO.shape)} and target_BO {tuple(target_BO.shape)}; must be equal"
        )
    check_float("recon_loss", y_BO=y_BO, target_BO=target_BO)
    check_segments("recon_loss", "y_BO", y_BO.shape[1], segments)
    if backend.name == "reference":
        loss, per_x_X, residual_BO = reference.recon_loss(y_BO, target_BO, segments)
    else:
        loss, per_x_X, residual_BO = autograd.recon_loss(y_BO, target_BO, list(segments), backend=backend)
    return ReconLoss(loss, per_x_X, residual_BO.detach())
