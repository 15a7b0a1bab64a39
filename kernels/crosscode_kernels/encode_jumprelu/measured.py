"""encode_relu and encode_jumprelu of the torch backend on a CPU: dense, sparse or mixed, as the measured density advises.

Axes: B tokens · I flattened input dims · O flattened output dims · L latents · N stored entries.

sparse: everything with a gradient (the active and those in the window) is stored; all products after the encoder are sparse.
mixed:  few latents are active but many lie in the window. Their gradients are wanted, so the decoder computes that of the
        latents densely; decoding and both weight gradients are sparse.
dense:  elementwise work in row blocks, products dense.

These functions look at the data, so they are for eager execution; traced programs take the dense form.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from crosscode_kernels.blocks import row_blocks
from crosscode_kernels.encode_jumprelu.autograd import encode_jumprelu as encode_jumprelu_dense
from crosscode_kernels.encode_jumprelu.support import SPARSE_BELOW, Counts, ModeLog, Support, locate, measure
from crosscode_kernels.jumprelu.torch_impl import straight_through, threshold, window
from crosscode_kernels.segments.autograd import latent_order, weight_grad
from crosscode_kernels.segments.encode_grads import encode_grads, save_for_encode_grads
from crosscode_kernels.segments.torch_impl import latent_sum, segment_rows_and_common
from crosscode_kernels.sparse import DenseLatents, LatentOrder, Latents, SparseLatents
from crosscode_kernels.sparse_decode.autograd import sparse_rows_sum


def encode_relu(
    x_BI: Tensor, W_enc_LI: Tensor, b_enc_L: Tensor | None, h_BL: Tensor, backend: str, log: ModeLog
) -> SparseLatents | None:
    """Sparse latents from the pre-activations `h_BL` (no gradient), or None where dense ones are cheaper."""
    counts = measure(h_BL, None, 0.0)
    density = counts.n_masked / max(h_BL.numel(), 1)
    log.note("encode_relu", "sparse" if density < SPARSE_BELOW else "dense", density, density)
    if density >= SPARSE_BELOW:
        return None
    support = locate(counts.mask_BL)
    order = latent_order(support.latent_idx_N, h_BL.shape[1], backend)
    value_N = _SparseReLU.apply(x_BI, W_enc_LI, b_enc_L, h_BL.view(-1)[support.flat_N], support, order, backend)
    return SparseLatents(*support[:2], value_N, h_BL.shape[1], LatentOrder(*order))


class _SparseReLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_BI: Tensor,
        W_enc_LI: Tensor,
        b_enc_L: Tensor | None,
        value_N: Tensor,
        support: Support,
        order: tuple[Tensor, Tensor],
        backend: str,
    ) -> Tensor:
        value_N = value_N.clone()
        save_for_encode_grads(ctx, x_BI, W_enc_LI, (*support[:2], value_N, *order), backend)
        return value_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *encode_grads(ctx, grads[0]), None, None, None, None


def encode_jumprelu(
    x_BI: Tensor,
    W_enc_LI: Tensor,
    b_enc_L: Tensor | None,
    h_BL: Tensor,
    t_L: Tensor,
    eps: float,
    gdm: bool,
    backend: str,
    log: ModeLog,
) -> Latents:
    """Latents with their deficit from the pre-activations `h_BL` (no gradient)."""
    theta_L = threshold(t_L.detach(), h_BL.dtype)
    counts = measure(h_BL, theta_L, eps / 2)
    support, active = counts.n_masked / max(h_BL.numel(), 1), counts.n_active / max(h_BL.numel(), 1)
    mode = "sparse" if support < SPARSE_BELOW else "mixed" if active < SPARSE_BELOW else "dense"
    log.note("encode_jumprelu", mode, active, support)
    encoder = (x_BI, W_enc_LI, b_enc_L)
    if mode == "dense":
        return encode_jumprelu_dense(*encoder, h_BL, t_L, eps, gdm, backend)
    if mode == "sparse":
        return _sparse(encoder, h_BL, t_L, eps, gdm, counts, backend)
    return _mixed(encoder, h_BL, t_L, eps, gdm, counts, backend)


Encoder = tuple[Tensor, Tensor, Tensor | None]


def _sparse(
    encoder: Encoder, h_BL: Tensor, t_L: Tensor, eps: float, gdm: bool, counts: Counts, backend: str
) -> SparseLatents:
    support = locate(counts.mask_BL)
    order = LatentOrder(*latent_order(support.latent_idx_N, h_BL.shape[1], backend))
    h_N = h_BL.view(-1)[support.flat_N]
    value_N, deficit_L = _SparseJumpReLU.apply(*encoder, t_L, h_N, support, order, counts.deficit_L, eps, gdm, backend)
    return SparseLatents(*support[:2], value_N, h_BL.shape[1], order, deficit_L)


class _SparseJumpReLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_BI: Tensor,
        W_enc_LI: Tensor,
        b_enc_L: Tensor | None,
        t_L: Tensor,
        h_N: Tensor,
        support: Support,
        order: LatentOrder,
        deficit_L: Tensor,
        eps: float,
        gdm: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        theta_N = threshold(t_L, h_N.dtype).index_select(0, support.latent_idx_N)
        ctx.save_for_backward(x_BI, W_enc_LI, t_L, h_N, *support[:2], *order)
        ctx.eps, ctx.gdm, ctx.backend = eps, gdm, backend
        ctx.set_materialize_grads(False)
        return h_N.masked_fill(h_N <= theta_N, 0), deficit_L

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        dvalue_N, d_deficit_L = grads
        x_BI, W_LI, t_L, h_N, row_ptr_B1, latent_idx_N, order_N, ptr_L1 = ctx.saved_tensors
        theta_L = threshold(t_L, h_N.dtype)
        above_N = h_N - theta_L.index_select(0, latent_idx_N)
        dvalue_N = torch.zeros_like(above_N) if dvalue_N is None else dvalue_N.to(theta_L.dtype)
        dh_N = above_N.sign().relu_().mul_(dvalue_N)
        not_silent_N = (above_N >= 0).to(theta_L.dtype)
        into_window_L = latent_sum(order_N, ptr_L1, window(above_N, ctx.eps).mul_(dvalue_N))
        dt_L = straight_through(into_window_L, theta_L, ctx.eps, ctx.gdm)
        if d_deficit_L is not None:
            n_silent_L = x_BI.shape[0] - latent_sum(order_N, ptr_L1, not_silent_N)
            dt_L += d_deficit_L * theta_L * n_silent_L
            dh_N += not_silent_N.mul_(d_deficit_L.index_select(0, latent_idx_N))
        sparse = (row_ptr_B1, latent_idx_N, order_N, ptr_L1)
        encoder_grads = _encoder_grads(ctx, x_BI, W_LI, sparse, dh_N.to(h_N.dtype), d_deficit_L)
        return *encoder_grads, dt_L.to(t_L.dtype), *(None,) * 7


def _encoder_grads(
    ctx: Any,
    x_BI: Tensor,
    W_LI: Tensor,
    sparse: tuple[Tensor, Tensor, Tensor, Tensor],
    dh_N: Tensor,
    d_deficit_L: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, W_enc and b_enc from those of the stored pre-activations, and from the deficit: `-d_deficit` at every
    token, which is rank one."""
    row_ptr_B1, latent_idx_N, order_N, ptr_L1 = sparse
    needs_x, needs_W, needs_b = ctx.needs_input_grad[:3]
    dx_BI = sparse_rows_sum(row_ptr_B1, latent_idx_N, dh_N, W_LI, ctx.backend) if needs_x else None
    if d_deficit_L is None:
        dW_LI, db_L = weight_grad(order_N, ptr_L1, row_ptr_B1, dh_N, x_BI, ctx.backend)
    else:
        common_L = -d_deficit_L.to(x_BI.dtype)
        dW_LI, db_L = segment_rows_and_common(order_N, ptr_L1, row_ptr_B1, dh_N, x_BI, common_L)
        if dx_BI is not None:
            dx_BI += common_L @ W_LI
    return dx_BI, dW_LI if needs_W else None, db_L if needs_b else None


def _mixed(
    encoder: Encoder, h_BL: Tensor, t_L: Tensor, eps: float, gdm: bool, counts: Counts, backend: str
) -> DenseLatents:
    theta_L = threshold(t_L.detach(), h_BL.dtype)
    # A latent that lies exactly on its threshold is not active, but not silent either.
    support = locate(measure(h_BL, theta_L, 0.0, include_edge=True).mask_BL)
    order = LatentOrder(*latent_order(support.latent_idx_N, h_BL.shape[1], backend))
    h_N = h_BL.view(-1)[support.flat_N]
    value_N = h_N.masked_fill(h_N <= theta_L.index_select(0, support.latent_idx_N), 0)
    a_BL, deficit_L = _MixedJumpReLU.apply(
        *encoder, t_L, h_BL, value_N, support, order, counts.deficit_L, eps, gdm, backend
    )
    active = SparseLatents(*support[:2], value_N, h_BL.shape[1], order)
    return DenseLatents(a_BL, deficit_L=deficit_L, active=active)


class _MixedJumpReLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_BI: Tensor,
        W_enc_LI: Tensor,
        b_enc_L: Tensor | None,
        t_L: Tensor,
        h_BL: Tensor,
        value_N: Tensor,
        support: Support,
        order: LatentOrder,
        deficit_L: Tensor,
        eps: float,
        gdm: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x_BI, W_enc_LI, t_L, h_BL, value_N, *support, *order)
        ctx.eps, ctx.gdm, ctx.backend = eps, gdm, backend
        ctx.set_materialize_grads(False)
        a_BL = torch.zeros_like(h_BL)
        a_BL.view(-1).index_copy_(0, support.flat_N, value_N)
        return a_BL, deficit_L

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        da_BL, d_deficit_L = grads
        x_BI, W_LI, t_L, h_BL, value_N, row_ptr_B1, latent_idx_N, flat_N, order_N, ptr_L1 = ctx.saved_tensors
        theta_L = threshold(t_L, h_BL.dtype)
        da_BL = torch.zeros_like(h_BL) if da_BL is None else da_BL.contiguous()
        into_window_L = torch.zeros_like(theta_L)
        for rows in row_blocks(h_BL):
            into_window_L += window(h_BL[rows] - theta_L, ctx.eps).mul_(da_BL[rows]).sum(0)
        dt_L = straight_through(into_window_L, theta_L, ctx.eps, ctx.gdm)
        dh_N = da_BL.view(-1)[flat_N].masked_fill_(value_N <= 0, 0)
        if d_deficit_L is not None:
            n_silent_L = x_BI.shape[0] - ptr_L1.diff()
            dt_L += d_deficit_L * theta_L * n_silent_L
            dh_N += d_deficit_L.index_select(0, latent_idx_N)
        sparse = (row_ptr_B1, latent_idx_N, order_N, ptr_L1)
        return *_encoder_grads(ctx, x_BI, W_LI, sparse, dh_N, d_deficit_L), dt_L.to(t_L.dtype), *(None,) * 8
