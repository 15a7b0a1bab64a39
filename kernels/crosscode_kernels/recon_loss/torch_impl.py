"""recon_loss in stock ops.

Axes: B tokens · O flattened output dims · X crosscoding positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from crosscode_kernels import host_buffers
from crosscode_kernels.checks import acc_dtype
from crosscode_kernels.registry import register_kernel
from crosscode_kernels.segments.torch_impl import sparse_decode


@register_kernel("recon_loss", "torch")
def recon_loss(y_BO: Tensor, target_BO: Tensor, segments: list[int]) -> tuple[Tensor, Tensor]:
    return _errors(y_BO - target_BO, segments)


@register_kernel("decode_recon", "torch")
def decode_recon(
    row_ptr_B1: Tensor,
    latent_idx_N: Tensor,
    value_N: Tensor,
    W_LO: Tensor,
    b_O: Tensor | None,
    target_BO: Tensor,
    segments: list[int],
) -> tuple[Tensor, Tensor]:
    """The residual takes the place of the output, whose bits are those of `sparse_decode`: 0 where that equals the target."""
    y_BO = sparse_decode(row_ptr_B1, latent_idx_N, value_N, W_LO, b_O)
    return _errors(y_BO.sub_(target_BO), segments)


def _errors(residual_BO: Tensor, segments: list[int]) -> tuple[Tensor, Tensor]:
    dtype = acc_dtype(residual_BO.dtype)
    # Row by row: one read of the residual, no buffer of squares, and short sums.
    norms_XB = [torch.linalg.vector_norm(part, dim=1, dtype=dtype) for part in residual_BO.split(segments, dim=1)]
    return torch.stack(norms_XB).square_().sum(1).div_(residual_BO.shape[0]), residual_BO


@register_kernel("recon_loss_backward", "torch")
def recon_loss_backward(g_X: Tensor, residual_BO: Tensor, segments: list[int]) -> Tensor:
    scale_X = g_X * (2 / residual_BO.shape[0])
    dy_BO = host_buffers.empty_like(residual_BO)
    for x, (out, part) in enumerate(zip(dy_BO.split(segments, dim=1), residual_BO.split(segments, dim=1), strict=True)):
        torch.mul(part, scale_X[x], out=out)
    return dy_BO
