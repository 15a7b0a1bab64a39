"""dead_decode with dense products over the dead latents. Eager, on the CPU.

Axes: B tokens · I, O flattened input and output dims · L latents · Q dead latents · K kept per token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from crosscode_kernels.encode_topk.torch_impl import dense_preacts
from crosscode_kernels.encoder import Encoder
from crosscode_kernels.selection.torch_impl import row_topk


def dead_decode(encoder: Encoder, dead_Q: Tensor, k: int, W_dec_LO: Tensor, sparse_grad: bool) -> Tensor:
    return _DeadDecode.apply(*encoder, W_dec_LO, dead_Q, k, sparse_grad)


def _kept(h_BQ: Tensor, k: int) -> Tensor:
    """The k largest of `relu(h)` of each row in place, 0 elsewhere."""
    if k >= h_BQ.shape[1]:
        return h_BQ.relu_()
    value_BK, column_BK = row_topk(h_BQ, k)
    return h_BQ.zero_().scatter_(1, column_BK.long(), value_BK)


class _DeadDecode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        """x_BI, W_enc_LI, b_enc_L, W_dec_LO, dead_Q, k, sparse_grad."""
        x_BI, W_enc_LI, b_enc_L, W_dec_LO, dead_Q, k, ctx.sparse_grad = arguments
        encoder_Q = Encoder(x_BI, W_enc_LI, b_enc_L).of_latents(dead_Q)
        a_BQ, W_dec_QO = _kept(dense_preacts(encoder_Q), k), W_dec_LO[dead_Q]
        ctx.n_latents = W_enc_LI.shape[0]
        ctx.save_for_backward(x_BI, encoder_Q.W_enc_LI, W_dec_QO, a_BQ, dead_Q)
        return a_BQ @ W_dec_QO

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dy_BO = grads[0].contiguous()
        x_BI, W_enc_QI, W_dec_QO, a_BQ, dead_Q = ctx.saved_tensors
        needs_x, needs_W_enc, needs_b_enc, needs_W_dec = ctx.needs_input_grad[:4]
        # Only kept positive values have a gradient. Written as "not positive is 0", so that NaN passes.
        dh_BQ = (dy_BO @ W_dec_QO.T).masked_fill_(a_BQ <= 0, 0)

        def of_latents(rows: Tensor, sparse: bool) -> Tensor:
            size = (ctx.n_latents, *rows.shape[1:])
            if not sparse:
                return rows.new_zeros(size).index_copy_(0, dead_Q, rows)
            return torch.sparse_coo_tensor(dead_Q[None], rows, size, is_coalesced=True, check_invariants=False)

        return (
            dh_BQ @ W_enc_QI if needs_x else None,
            of_latents(dh_BQ.T @ x_BI, ctx.sparse_grad) if needs_W_enc else None,
            of_latents(dh_BQ.sum(0), False) if needs_b_enc else None,
            of_latents(a_BQ.T @ dy_BO, ctx.sparse_grad) if needs_W_dec else None,
            *(None,) * 3,
        )
