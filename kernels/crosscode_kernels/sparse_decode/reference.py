"""sparse_decode, dense.

Axes: B tokens · O flattened output dims · L latents.
"""

from __future__ import annotations

from collections.abc import Sequence

from einops import einsum
from torch import Tensor

from crosscode_kernels.opset import DecodeReconLoss
from crosscode_kernels.recon_loss.reference import recon_loss_and_residual
from crosscode_kernels.sparse import Latents
from crosscode_kernels.sparse_decode import spec


def decode(latents: Latents, W_dec_LO: Tensor, b_dec_O: Tensor | None = None) -> Tensor:
    """See `spec`."""
    spec.check(latents, W_dec_LO, b_dec_O)
    y_BO = einsum(latents.to_dense(), W_dec_LO, "b l, l o -> b o")
    return y_BO if b_dec_O is None else y_BO + b_dec_O


def decode_recon_loss(
    latents: Latents, W_dec_LO: Tensor, b_dec_O: Tensor | None, target_BO: Tensor, segments: Sequence[int]
) -> DecodeReconLoss:
    """`recon_loss` of the decoded output."""
    return recon_loss_and_residual(decode(latents, W_dec_LO, b_dec_O), target_BO, segments)
