"""decoder_norms in stock ops.

Axes: L latents · O flattened output dims · X crosscoding positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from crosscode_kernels import host_buffers
from crosscode_kernels.checks import acc_dtype


def decoder_norms(W_dec_LO: Tensor, segments: list[int], joint: bool) -> tuple[Tensor, Tensor]:
    dtype = acc_dtype(W_dec_LO.dtype)
    norms_LX = torch.stack(
        [torch.linalg.vector_norm(part, dim=1, dtype=dtype) for part in W_dec_LO.split(segments, dim=1)], dim=1
    )
    # The norm of the norms is the norm of the whole row.
    n_L = torch.linalg.vector_norm(norms_LX, dim=1) if joint else norms_LX.sum(1)
    return norms_LX, n_L


def decoder_norms_backward(
    d_norms_LX: Tensor,
    d_n_L: Tensor,
    W_dec_LO: Tensor,
    norms_LX: Tensor,
    n_L: Tensor,
    segments: list[int],
    joint: bool,
) -> Tensor:
    coef_LX = _ratio(d_norms_LX if joint else d_norms_LX + d_n_L.unsqueeze(1), norms_LX)
    if joint:
        coef_LX = coef_LX + _ratio(d_n_L, n_L).unsqueeze(1)
    dW_LO = host_buffers.empty_like(W_dec_LO)
    parts = zip(dW_LO.split(segments, dim=1), W_dec_LO.split(segments, dim=1), coef_LX.unbind(1), strict=True)
    for out, part, coef_L in parts:
        torch.mul(part, coef_L.unsqueeze(1), out=out)
    return dW_LO


def _ratio(grad: Tensor, norm: Tensor) -> Tensor:
    """`grad / norm`, and 0 where the norm is 0."""
    return torch.where(norm == 0, 0, grad / norm)
