"""dead_recon_loss with dense products over the dead latents. Eager, on the CPU.

Axes: B tokens · I, O flattened input and output dims · L latents · Q dead latents · K kept per token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from crosscode_kernels import host_buffers
from crosscode_kernels.encode_topk.torch_impl import dense_preacts
from crosscode_kernels.encoder import Encoder
from crosscode_kernels.recon_loss.torch_impl import errors
from crosscode_kernels.selection.torch_impl import row_topk


def dead_recon_loss(
    encoder: Encoder, dead_Q: Tensor, k: int, W_dec_LO: Tensor, residual_BO: Tensor, sparse_grad: bool
) -> Tensor:
    return _DeadReconLoss.apply(*encoder, W_dec_LO, dead_Q, k, residual_BO, sparse_grad)


def _kept(h_BQ: Tensor, k: int) -> Tensor:
    """The k largest of `relu(h)` of each row in place, 0 elsewhere. Only rows of more than k positive values choose."""
    crowded_R = ((h_BQ <= 0).sum(1) < h_BQ.shape[1] - k).nonzero().squeeze(1)
    h_BQ.relu_()
    if crowded_R.shape[0]:
        value_RK, column_RK = row_topk(h_BQ[crowded_R], k)
        kept_RQ = h_BQ.new_zeros(crowded_R.shape[0], h_BQ.shape[1]).scatter_(1, column_RK.long(), value_RK)
        h_BQ.index_copy_(0, crowded_R, kept_RQ)
    return h_BQ


def _rows(W: Tensor, rows_Q: Tensor) -> Tensor:
    return torch.index_select(W, 0, rows_Q, out=host_buffers.empty((rows_Q.shape[0], W.shape[1]), W))


def _product(left: Tensor, right: Tensor) -> Tensor:
    return torch.mm(left, right, out=host_buffers.empty((left.shape[0], right.shape[1]), left))


class _DeadReconLoss(torch.autograd.Function):
    """Of what is as large as the output there is one tensor: what is left of the error, in which the product is summed."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        """x_BI, W_enc_LI, b_enc_L, W_dec_LO, dead_Q, k, residual_BO, sparse_grad."""
        x_BI, W_enc_LI, b_enc_L, W_dec_LO, dead_Q, k, residual_BO, ctx.sparse_grad = arguments
        encoder_Q = Encoder(x_BI, _rows(W_enc_LI, dead_Q), None if b_enc_L is None else b_enc_L[dead_Q])
        a_BQ, W_dec_QO = _kept(dense_preacts(encoder_Q), k), _rows(W_dec_LO, dead_Q)
        left_BO = host_buffers.empty_like(residual_BO).copy_(residual_BO)
        if left_BO.dtype == a_BQ.dtype:
            left_BO.addmm_(a_BQ, W_dec_QO)
        else:
            left_BO.add_(_product(a_BQ, W_dec_QO))
        ctx.n_latents = W_enc_LI.shape[0]
        ctx.save_for_backward(x_BI, encoder_Q.W_enc_LI, W_dec_QO, a_BQ, left_BO, dead_Q)
        return errors(left_BO, [left_BO.shape[1]])[0].sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_BI, W_enc_QI, W_dec_QO, a_BQ, left_BO, dead_Q = ctx.saved_tensors
        needs_x, needs_W_enc, needs_b_enc, needs_W_dec = ctx.needs_input_grad[:4]
        # The gradient of the output is a number times what is left: that number goes to what is small. Not in half precision,
        # as in `decode_recon_loss`.
        scale, dy_BO = grads[0] * (2 / left_BO.shape[0]), left_BO
        if a_BQ.dtype.itemsize < 4:
            scale, dy_BO = torch.ones_like(scale), (left_BO * scale).to(a_BQ.dtype)
        # Only kept positive values have a gradient. Written as "not positive is 0", so that NaN passes.
        dh_BQ = _product(dy_BO, W_dec_QO.T).mul_(scale).masked_fill_(a_BQ <= 0, 0)

        def of_latents(rows: Tensor, sparse: bool) -> Tensor:
            size = (ctx.n_latents, *rows.shape[1:])
            if not sparse:
                return rows.new_zeros(size).index_copy_(0, dead_Q, rows)
            return torch.sparse_coo_tensor(dead_Q[None], rows, size, is_coalesced=True, check_invariants=False)

        return (
            dh_BQ @ W_enc_QI if needs_x else None,
            of_latents(_product(dh_BQ.T, x_BI), ctx.sparse_grad) if needs_W_enc else None,
            of_latents(dh_BQ.sum(0), False) if needs_b_enc else None,
            of_latents(_product((a_BQ * scale).T, dy_BO), ctx.sparse_grad) if needs_W_dec else None,
            *(None,) * 4,
        )
