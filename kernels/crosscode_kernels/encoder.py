"""An encoder and the batch that it is given: what all encoding ops take.

Axes: B tokens · I flattened input dims · L latents.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from crosscode_kernels.backend import Backend
from crosscode_kernels.checks import autocast_dtype, check_dims, check_float
from crosscode_kernels.copies import in_dtype


def autocast(backend: Backend, *tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors of a product in the autocast dtype where autocast is on, as PyTorch's own products have them; weights are cast
    once a step. The reference leaves that to PyTorch."""
    device = next(tensor.device.type for tensor in tensors if tensor is not None)
    dtype = autocast_dtype(device)
    if backend.name == "reference" or dtype is None:
        return tensors
    return tuple(None if tensor is None else in_dtype(tensor, dtype) for tensor in tensors)


def may_look(x_BI: Tensor) -> bool:
    """Whether what to do may depend on the data: looking is free on the CPU, and impossible while tracing and in `torch.func`."""
    traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    return x_BI.device.type == "cpu" and not traced and x_BI.shape[0] > 0


class Encoder(NamedTuple):
    """`h = x W_enc^T + b_enc`."""

    x_BI: Tensor
    W_enc_LI: Tensor
    b_enc_L: Tensor | None

    def of_latents(self, rows: Any) -> Encoder:
        """The same batch for some latents: a slice, or indices."""
        return Encoder(self.x_BI, self.W_enc_LI[rows], None if self.b_enc_L is None else self.b_enc_L[rows])

    def wants_weight_grad(self) -> bool:
        """Whether a weight gradient will need the entries sorted by latent."""
        weights = (self.W_enc_LI, self.b_enc_L)
        return torch.is_grad_enabled() and any(weight is not None and weight.requires_grad for weight in weights)


def checked_encoder(op: str, backend: Backend, encoder: tuple[Tensor, Tensor, Tensor | None]) -> Encoder:
    """x_BI, W_enc_LI and b_enc_L (or None) of one width, dtype and device; in the autocast dtype where that is on."""
    x_BI, W_enc_LI, b_enc_L = encoder = Encoder(*autocast(backend, *encoder))
    check_dims(op, "x_BI", x_BI, 2)
    check_dims(op, "W_enc_LI", W_enc_LI, 2)
    if x_BI.shape[1] != W_enc_LI.shape[1]:
        raise ValueError(
            f"{op}: x_BI has width {x_BI.shape[1]} and W_enc_LI has width {W_enc_LI.shape[1]}; must be equal"
        )
    if b_enc_L is not None and tuple(b_enc_L.shape) != (W_enc_LI.shape[0],):
        raise ValueError(f"{op}: b_enc_L has shape {tuple(b_enc_L.shape)}; must be ({W_enc_LI.shape[0]},)")
    check_float(op, x_BI=x_BI, W_enc_LI=W_enc_LI, b_enc_L=b_enc_L)
    return encoder
