"""encode_relu and encode_jumprelu of the torch backend on a CPU: dense, sparse or mixed, as the measured density advises.

Axes: B tokens · I flattened input dims · O flattened output dims · L latents · N stored entries.

sparse: everything with a gradient (the active and those in the window) is stored; all products after the encoder are sparse.
mixed:  few latents are active but many lie in the window. Their gradients are wanted, so the decoder computes that of the
        latents densely; decoding and both weight gradients are sparse.
dense:  elementwise work in row blocks, products dense.

These functions look at the data, so they are for eager execution; traced programs take the dense form.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from crosscode_kernels import host_buffers
from crosscode_kernels.backend import Backend
from crosscode_kernels.blocks import row_blocks
from crosscode_kernels.encode_jumprelu.autograd import encode_jumprelu as _dense
from crosscode_kernels.encode_jumprelu.support import locate, marked, measure, note, positive
from crosscode_kernels.encode_topk.torch_impl import dense_preacts
from crosscode_kernels.encoder import Encoder
from crosscode_kernels.jumprelu.torch_impl import straight_through, threshold, window
from crosscode_kernels.segments.autograd import latent_order, weight_grad
from crosscode_kernels.segments.encoders import encode_grads
from crosscode_kernels.segments.torch_impl import latent_sum, segment_rows_and_common
from crosscode_kernels.sparse import DenseLatents, Entries, LatentOrder, Latents, SparseLatents
from crosscode_kernels.sparse_decode.autograd import entries_decode


def encode_relu(encoder: Encoder, backend: Backend) -> Latents:
    """Sparse latents, or dense ones where these are cheaper."""
    with torch.no_grad():
        h_BL = dense_preacts(encoder)
    density, flat_N = positive(h_BL, backend.sparse_below)
    note(backend, "encode_relu", "dense" if flat_N is None else "sparse", density, density)
    if flat_N is None:
        return DenseLatents(_DenseReLU.apply(*encoder, h_BL))
    entries = _located(flat_N, h_BL, backend)
    return _latents(entries, _SparseReLU.apply(*encoder, entries, backend), h_BL)


def _located(flat_N: Tensor, h_BL: Tensor, backend: Backend) -> Entries:
    """The entries at these flat indices, with pre-activations as values."""
    support = locate(flat_N, *h_BL.shape)
    order = latent_order(support.latent_idx_N, h_BL.shape[1], backend=backend)
    return Entries(*support, h_BL.view(-1)[flat_N], *order)


def _latents(entries: Entries, value_N: Tensor, h_BL: Tensor, deficit_L: Tensor | None = None) -> SparseLatents:
    return SparseLatents(*entries[:2], value_N, h_BL.shape[1], LatentOrder(*entries[3:]), deficit_L)


class _DenseReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        """x_BI, W_enc_LI, b_enc_L, and the pre-activations, whose memory the latents take."""
        x_BI, W_enc_LI, _, h_BL = arguments
        ctx.mark_dirty(h_BL)
        ctx.save_for_backward(x_BI, W_enc_LI, h_BL.relu_())
        return h_BL

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_BI, W_enc_LI, a_BL = ctx.saved_tensors
        needs_x, needs_W, needs_b = ctx.needs_input_grad[:3]
        dh_BL = host_buffers.empty_like(a_BL)
        torch.ops.aten.threshold_backward.grad_input(grads[0], a_BL, 0, grad_input=dh_BL)
        dW_LI = torch.mm(dh_BL.T, x_BI, out=host_buffers.empty_like(W_enc_LI)) if needs_W else None
        return dh_BL @ W_enc_LI if needs_x else None, dW_LI, dh_BL.sum(0) if needs_b else None, None


class _SparseReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        """x_BI, W_enc_LI, b_enc_L, the entries with their values, the backend."""
        x_BI, W_enc_LI, _, entries, ctx.backend = arguments
        value_N = entries.value_N.clone()
        ctx.save_for_backward(x_BI, W_enc_LI, *entries._replace(value_N=value_N))
        return value_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_BI, W_enc_LI, *entries = ctx.saved_tensors
        found = encode_grads(x_BI, W_enc_LI, Entries(*entries), grads[0], _needs(ctx), ctx.backend)
        return *(found[name] for name in Encoder._fields), None, None


def _needs(ctx: Any) -> set[str]:
    return {name for name, needed in zip(Encoder._fields, ctx.needs_input_grad, strict=False) if needed}


def encode_jumprelu_dense(
    encoder: Encoder, h_BL: Tensor, t_L: Tensor, eps: float, gdm: bool, backend: Backend
) -> DenseLatents:
    """Dense latents with their deficit from the pre-activations `h_BL` (no gradient)."""
    a_BL, deficit_L, fired_L = _dense(h_BL, t_L, *encoder, eps, gdm, backend=backend)
    return DenseLatents(a_BL, h_BL, deficit_L=deficit_L, fired_L=fired_L)


def encode_jumprelu(encoder: Encoder, h_BL: Tensor, t_L: Tensor, eps: float, gdm: bool, backend: Backend) -> Latents:
    """As `encode_jumprelu_dense`, in whatever form the measured density advises."""
    theta_L = threshold(t_L.detach(), h_BL.dtype)
    counts = measure(h_BL, theta_L, eps / 2)
    support, active = counts.n_masked / max(h_BL.numel(), 1), counts.n_active / max(h_BL.numel(), 1)
    # Measured, the two sparse forms cross where 9 % lie in the window or above it, three quarters of the usual `sparse_below`.
    mode = (
        "dense" if active >= backend.sparse_below else "mixed" if support >= 0.75 * backend.sparse_below else "sparse"
    )
    note(backend, "encode_jumprelu", mode, active, support)
    if mode == "dense":
        return encode_jumprelu_dense(encoder, h_BL, t_L, eps, gdm, backend)
    options = (counts.deficit_L, eps, gdm, backend)
    if mode == "sparse":
        entries = _located(marked(counts.mask_BL), h_BL, backend)
        value_N, deficit_L = _SparseJumpReLU.apply(*encoder, t_L, entries, *options)
        return replace(_latents(entries, value_N, h_BL, deficit_L), preacts_N=entries.value_N)
    # A latent that lies exactly on its threshold is not active, but not silent either.
    flat_N = marked((h_BL < theta_L).logical_not_())
    entries = _located(flat_N, h_BL, backend)
    h_N = entries.value_N
    entries = entries._replace(value_N=h_N.masked_fill(h_N <= theta_L.index_select(0, entries.latent_idx_N), 0))
    a_BL, deficit_L = _MixedJumpReLU.apply(*encoder, t_L, entries, *options, h_BL, flat_N)
    return DenseLatents(a_BL, h_BL, deficit_L=deficit_L, active=_latents(entries, entries.value_N, h_BL))


class _SparseJumpReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        """x_BI, W_enc_LI, b_enc_L, t_L, the entries with their pre-activations, deficit_L, eps, gdm, backend."""
        x_BI, W_enc_LI, _, t_L, entries, deficit_L, ctx.eps, ctx.gdm, ctx.backend = arguments
        h_N = entries.value_N
        theta_N = threshold(t_L, h_N.dtype).index_select(0, entries.latent_idx_N)
        ctx.save_for_backward(x_BI, W_enc_LI, t_L, *entries)
        ctx.set_materialize_grads(False)
        return h_N.masked_fill(h_N <= theta_N, 0), deficit_L

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        dvalue_N, d_deficit_L = grads
        x_BI, W_LI, t_L, *saved = ctx.saved_tensors
        _, latent_idx_N, h_N, order_N, ptr_L1 = entries = Entries(*saved)
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
        entries = entries._replace(value_N=dh_N.to(h_N.dtype))
        return *_encoder_grads(ctx, x_BI, W_LI, entries, d_deficit_L), dt_L.to(t_L.dtype), *(None,) * 5


def _encoder_grads(
    ctx: Any, x_BI: Tensor, W_LI: Tensor, entries: Entries, d_deficit_L: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, W_enc and b_enc from those of the stored pre-activations (values of the entries), and from the deficit:
    `-d_deficit` at every token, which is rank one."""
    needs_x, needs_W, needs_b = ctx.needs_input_grad[:3]
    dx_BI = entries_decode(entries, W_LI, None, backend=ctx.backend) if needs_x else None
    if d_deficit_L is None:
        dW_LI, db_L = weight_grad(entries, x_BI, ctx.backend)
    else:
        common_L = -d_deficit_L.to(x_BI.dtype)
        dW_LI, db_L = segment_rows_and_common(entries, x_BI, common_L)
        if dx_BI is not None:
            dx_BI += common_L @ W_LI
    return dx_BI, dW_LI if needs_W else None, db_L if needs_b else None


class _MixedJumpReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        """As `_SparseJumpReLU`, the values of the entries after the threshold; then h_BL and their places in it."""
        x_BI, W_enc_LI, _, t_L, entries, deficit_L, ctx.eps, ctx.gdm, ctx.backend, h_BL, flat_N = arguments
        ctx.save_for_backward(x_BI, W_enc_LI, t_L, h_BL, flat_N, *entries)
        ctx.set_materialize_grads(False)
        a_BL = host_buffers.empty_like(h_BL).zero_()
        a_BL.view(-1).index_copy_(0, flat_N, entries.value_N)
        return a_BL, deficit_L

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        da_BL, d_deficit_L = grads
        x_BI, W_LI, t_L, h_BL, flat_N, *saved = ctx.saved_tensors
        entries = Entries(*saved)
        theta_L = threshold(t_L, h_BL.dtype)
        da_BL = torch.zeros_like(h_BL) if da_BL is None else da_BL.contiguous()
        into_window_L = torch.zeros_like(theta_L)
        for rows in row_blocks(h_BL):
            into_window_L += window(h_BL[rows] - theta_L, ctx.eps).mul_(da_BL[rows]).sum(0)
        dt_L = straight_through(into_window_L, theta_L, ctx.eps, ctx.gdm)
        dh_N = da_BL.view(-1)[flat_N].masked_fill_(entries.value_N <= 0, 0)
        if d_deficit_L is not None:
            dt_L += d_deficit_L * theta_L * (x_BI.shape[0] - entries.latent_ptr_L1.diff())
            dh_N += d_deficit_L.index_select(0, entries.latent_idx_N)
        entries = entries._replace(value_N=dh_N)
        return *_encoder_grads(ctx, x_BI, W_LI, entries, d_deficit_L), dt_L.to(t_L.dtype), *(None,) * 7
