"""ReLU and JumpReLU on a GPU with sparse products where few latents are active, without asking the device how many.

Axes: B tokens · I, O flattened input and output dims · L latents · N capacity, in entries.

Latents are dense as ever, so that whatever looks at them is right at any density; beside them their entries lie in a buffer of
a fixed size. Decoding, the gradient of the latents and both weight gradients go through these entries. A batch that has more
of them than fit is multiplied densely instead: by kernels whose programs otherwise end at once, so nothing waits or is copied.

The entries are all that has a gradient: what is active, of a JumpReLU what lies in its window as well (with value 0). The
deficit's gradient is rank one besides them (see `encode_jumprelu`). Eager only.
"""

from __future__ import annotations

import importlib
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from crosscode_kernels.backend import Backend
from crosscode_kernels.encode_jumprelu.autograd import backward_op
from crosscode_kernels.encode_jumprelu.autograd import encode_jumprelu as dense_jumprelu
from crosscode_kernels.encoder import Encoder
from crosscode_kernels.jumprelu.torch_impl import threshold
from crosscode_kernels.penalties.deferred import PenaltyGrad, PenaltyTerm, taken
from crosscode_kernels.preacts import preacts
from crosscode_kernels.segments.autograd import latent_order, segment_rows
from crosscode_kernels.sparse import DenseLatents, Entries
from crosscode_kernels.sparse_decode.autograd import decode_grads, entries_decode

_TRITON = Backend("triton")
_SLACK = 1e-5
"""What two roundings of a window's lower end may differ by, of its terms."""


class Capacity(NamedTuple):
    """Entries of a batch `(B, L)`, padded to a capacity; without any where they do not fit, and `overflows`, int32, is 1."""

    entries: Entries
    place_N: Tensor
    """`token * L + latent`, int64; `B * L`: padding"""
    overflows: Tensor

    @classmethod
    def of(cls, h_BL: Tensor, a_BL: Tensor, least_L: Tensor | None, share: float) -> Capacity:
        """Where h is above `least` (None: 0), values from `a`; room for a share of all."""
        n_entries = min(math.ceil(share * h_BL.numel()), 2**31 - 1)
        row_ptr_B1, latent_idx_N, value_N, place_N, overflows = _kernels().support(h_BL, a_BL, least_L, n_entries)
        n_latents = h_BL.shape[1]
        key_N = latent_idx_N.masked_fill(place_N == h_BL.numel(), n_latents)
        order = latent_order(key_N, n_latents, backend=_TRITON)
        return cls(Entries(row_ptr_B1, latent_idx_N, value_N, *order), place_N, overflows)

    def tensors(self) -> tuple[Tensor, ...]:
        """Those that `from_tensors` takes."""
        return *self.entries, self.place_N, self.overflows

    @classmethod
    def from_tensors(cls, *tensors: Tensor) -> Capacity:
        return cls(Entries(*tensors[:-2]), *tensors[-2:])

    def gathered(self, dense_BL: Tensor) -> Tensor:
        """`[N]`: what stands at the entries; 0 for padding."""
        is_padding_N = self.place_N == dense_BL.numel()
        return dense_BL.view(-1)[self.place_N.masked_fill(is_padding_N, 0)].masked_fill(is_padding_N, 0)

    def scattered(self, value_N: Tensor, like_BL: Tensor) -> Tensor:
        """`[B, L]`: these at the entries, 0 elsewhere."""
        flat = value_N.new_zeros(like_BL.numel() + 1)
        return flat.scatter_(0, self.place_N, value_N)[:-1].view(like_BL.shape)


def _kernels() -> Any:
    return importlib.import_module("crosscode_kernels.capacity.triton_impl")


def encode_relu(encoder: Encoder, share: float) -> DenseLatents:
    """`encode_relu` with room for a share of `B x L` entries."""
    with torch.no_grad():
        a_BL = preacts(*encoder, backend=_TRITON).relu_()
        capacity = Capacity.of(a_BL, a_BL, None, share)
    return DenseLatents(_ReLU.apply(*encoder, a_BL, capacity), active=capacity)


def encode_jumprelu(encoder: Encoder, t_L: Tensor, eps: float, gdm: bool, share: float) -> DenseLatents:
    """`encode_jumprelu` with room for a share of `B x L` entries, those in the window among them."""
    with torch.no_grad():
        h_BL = preacts(*encoder, backend=_TRITON)
        a_BL, deficit_L, fired_L = dense_jumprelu(h_BL, t_L, *encoder, eps, gdm, backend=_TRITON)
        theta_L = threshold(t_L, torch.float32)
        least_L = theta_L - eps / 2 - _SLACK * (theta_L + eps)
        capacity = Capacity.of(h_BL, a_BL, least_L, share)
    a_BL, deficit_L = _JumpReLU.apply(*encoder, t_L, h_BL, a_BL, deficit_L, capacity, eps, gdm)
    return DenseLatents(a_BL, h_BL, deficit_L=deficit_L, fired_L=fired_L, active=capacity)


def decode(value_BL: Tensor, capacity: Capacity, W_LO: Tensor, b_O: Tensor | None) -> Tensor:
    """`y_BO`. `capacity` holds the entries of `value_BL`."""
    return _Decode.apply(value_BL, capacity, W_LO, b_O)


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        value_BL, capacity, W_LO, b_O = arguments
        ctx.save_for_backward(value_BL, W_LO, *capacity.tensors())
        y_BO = entries_decode(capacity.entries, W_LO, b_O, backend=_TRITON)
        _kernels().product_if(capacity.overflows, value_BL, W_LO.contiguous(), y_BO, bias=b_O)
        return y_BO

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        value_BL, W_LO, *rest = ctx.saved_tensors
        capacity, dy_BO, W_LO = Capacity.from_tensors(*rest), grads[0].contiguous(), W_LO.contiguous()
        names = ("value_N", "", "W_LO", "b_O")
        needs = {name for name, needed in zip(names, ctx.needs_input_grad, strict=True) if needed}
        found = decode_grads(dy_BO, capacity.entries, W_LO, needs, _TRITON)
        dvalue_BL = None
        if found["value_N"] is not None:
            dvalue_BL = capacity.scattered(found["value_N"], value_BL)
            _kernels().product_if(capacity.overflows, dy_BO, W_LO.T, dvalue_BL)
        if found["W_LO"] is not None:
            _kernels().product_if(capacity.overflows, value_BL.T, dy_BO, found["W_LO"])
        return dvalue_BL, None, found["W_LO"], found["b_O"]


def _encoder_grads(
    ctx: Any, encoder: Encoder, capacity: Capacity, dh_N: Tensor, dh_BL: Tensor, *, mask_BL: Tensor | None = None,
    d_deficit_L: Tensor | None = None, db_L: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of x, W_enc and b_enc from those of the entries (less that of the deficit) and, where these do not fit, from all:
    `dh_BL`, as far as `mask_BL` is above 0. `db_L`: the last of them, where it is known."""
    x_BI, W_LI, product_if = encoder.x_BI, encoder.W_enc_LI, _kernels().product_if
    needs_x, needs_W, needs_b = ctx.needs_input_grad[:3]
    entries, dx_BI, dW_LI = capacity.entries._replace(value_N=dh_N.to(x_BI.dtype)), None, None
    common_L = None if d_deficit_L is None else -d_deficit_L.float()
    if needs_x:
        dx_BI = entries_decode(entries, W_LI, None, backend=_TRITON)
        if common_L is not None:
            dx_BI = (dx_BI.float() + common_L @ W_LI.float()).to(x_BI.dtype)
        product_if(capacity.overflows, dh_BL, W_LI, dx_BI, mask=mask_BL)
    if needs_W or (needs_b and db_L is None):
        dW_LI, sum_L = segment_rows(entries, x_BI, backend=_TRITON)
        if common_L is not None:
            dW_LI = dW_LI.float().addr_(common_L, x_BI.float().sum(0)).to(x_BI.dtype)
        product_if(capacity.overflows, dh_BL.T, x_BI, dW_LI, mask=mask_BL)
        if db_L is None:
            product_if(capacity.overflows, dh_BL.T, x_BI.new_ones(x_BI.shape[0], 1), sum_L, mask=mask_BL)
            db_L = sum_L
    return dx_BI, dW_LI if needs_W else None, db_L if needs_b else None


def _contiguous(encoder: Encoder) -> Encoder:
    return Encoder(encoder.x_BI.contiguous(), encoder.W_enc_LI.contiguous(), None)


class _ReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        x_BI, W_LI, _, a_BL, capacity = arguments
        ctx.save_for_backward(x_BI, W_LI, a_BL, *capacity.tensors())
        return a_BL

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_BI, W_LI, a_BL, *rest = ctx.saved_tensors
        capacity, da_BL = Capacity.from_tensors(*rest), grads[0]
        da_BL = (da_BL.dense() if isinstance(da_BL, PenaltyGrad) else da_BL).contiguous()
        encoder = _contiguous(Encoder(x_BI, W_LI, None))
        found = _encoder_grads(ctx, encoder, capacity, capacity.gathered(da_BL), da_BL, mask_BL=a_BL)
        return *found, None, None


class _JumpReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        x_BI, W_LI, _, t_L, h_BL, a_BL, deficit_L, capacity, ctx.eps, ctx.gdm = arguments
        ctx.save_for_backward(x_BI, W_LI, t_L, h_BL, a_BL, *capacity.tensors())
        ctx.set_materialize_grads(False)
        return a_BL, deficit_L

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x_BI, W_LI, t_L, h_BL, a_BL, *rest = ctx.saved_tensors
        da_BL, d_deficit_L = grads
        da_BL, term = (None, PenaltyTerm()) if da_BL is None else taken(da_BL, a_BL)
        da_BL = torch.zeros_like(h_BL) if da_BL is None else da_BL
        dh_BL, dt_L, db_L = backward_op(da_BL, d_deficit_L, h_BL, t_L, ctx.eps, ctx.gdm, term, backend=_TRITON)
        capacity = Capacity.from_tensors(*rest)
        dh_N = capacity.gathered(dh_BL).float()
        if d_deficit_L is not None:
            of_entry_N = d_deficit_L.float()[capacity.entries.latent_idx_N.long()]
            dh_N += of_entry_N.masked_fill(capacity.place_N == h_BL.numel(), 0)
        encoder = _contiguous(Encoder(x_BI, W_LI, None))
        found = _encoder_grads(ctx, encoder, capacity, dh_N, dh_BL, d_deficit_L=d_deficit_L, db_L=db_L)
        return *found, dt_L, *(None,) * 6
