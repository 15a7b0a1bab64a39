"""decode_recon: decode and reconstruction loss in one op, for a backend that need not write the output.

Axes: B tokens · O flattened output dims · L latents · X crosscoding positions · N stored entries.

    per_x[x] = (1 / B) sum over b and o in segment x of ((a W_dec + b_dec)_bo - target_bo)^2;  loss = sum of per_x

Saved for backward: the residual, the sparse batch and W_dec; the output is neither kept nor, where the kernel manages, written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from crosscode_kernels.checks import acc_dtype
from crosscode_kernels.opset import DecodeReconLoss
from crosscode_kernels.recon_loss.autograd import residual_grad
from crosscode_kernels.registration import contiguous, define_op
from crosscode_kernels.registry import get_kernel
from crosscode_kernels.sparse import SparseLatents
from crosscode_kernels.sparse_decode.autograd import decode_grads, decode_order

_WIDE = (torch.float32, torch.float64)


def _body(
    row_ptr_B1: Tensor,
    latent_idx_N: Tensor,
    value_N: Tensor,
    W_LO: Tensor,
    b_O: Tensor | None,
    order_N: Tensor,
    latent_ptr_L1: Tensor,
    target_BO: Tensor,
    segments: list[int],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    if target_BO.shape[0] == 0:
        per_x_X = target_BO.new_zeros(len(segments), dtype=acc_dtype(target_BO.dtype))
        return per_x_X.sum(), per_x_X, torch.empty_like(target_BO)
    tensors = contiguous(row_ptr_B1, latent_idx_N, value_N, W_LO, b_O, target_BO)
    per_x_X, residual_BO = get_kernel("decode_recon", backend)(*tensors, list(segments))
    return per_x_X.sum(), per_x_X, residual_BO


def _fake(
    row_ptr_B1: Tensor,
    latent_idx_N: Tensor,
    value_N: Tensor,
    W_LO: Tensor,
    b_O: Tensor | None,
    order_N: Tensor,
    latent_ptr_L1: Tensor,
    target_BO: Tensor,
    segments: list[int],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = acc_dtype(target_BO.dtype)
    residual_BO = torch.empty_like(target_BO, memory_format=torch.contiguous_format)
    return target_BO.new_empty((), dtype=dtype), target_BO.new_empty(len(segments), dtype=dtype), residual_BO


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    row_ptr_B1, latent_idx_N, value_N, W_LO, _, order_N, latent_ptr_L1, _, ctx.segments, ctx.backend = inputs
    ctx.save_for_backward(output[2], row_ptr_B1, latent_idx_N, value_N, W_LO, order_N, latent_ptr_L1)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    residual_BO, *sparse = ctx.saved_tensors
    needs, needs_target = tuple(ctx.needs_input_grad[2:5]), ctx.needs_input_grad[7]
    if grads[0] is not None and grads[1] is None and not needs_target and residual_BO.dtype in _WIDE:
        scale = grads[0] * (2 / max(residual_BO.shape[0], 1))
        return None, None, *_scaled_grads(scale, residual_BO, sparse, needs, ctx.backend), *[None] * 5
    dy_BO = residual_grad(grads[0], grads[1], residual_BO, ctx.segments, ctx.backend)
    dvalue_N, dW_LO, db_O = decode_grads(dy_BO, sparse, needs, ctx.backend)
    return None, None, dvalue_N, dW_LO, db_O, None, None, -dy_BO if needs_target else None, None, None


def _scaled_grads(
    scale: Tensor, residual_BO: Tensor, sparse: Sequence[Tensor], needs: tuple[bool, ...], backend: str
) -> tuple[Tensor | None, ...]:
    """Where the gradient of the output is one number times the residual, that number goes to the entries: no pass over
    B x O. Not in half precision, where a scaled value may underflow that a scaled residual would not."""
    row_ptr_B1, latent_idx_N, value_N, *rest = sparse
    scaled = (row_ptr_B1, latent_idx_N, value_N * scale, *rest)
    dvalue_N, dW_LO, db_O = decode_grads(residual_BO, scaled, needs, backend)
    return None if dvalue_N is None else dvalue_N * scale, dW_LO, None if db_O is None else db_O * scale


_decode_recon = define_op(
    "decode_recon",
    "(Tensor row_ptr_B1, Tensor latent_idx_N, Tensor value_N, Tensor W_LO, Tensor? b_O, Tensor order_N,"
    " Tensor latent_ptr_L1, Tensor target_BO, int[] segments, str backend) -> (Tensor, Tensor, Tensor)",
    body=_body,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)


def decode_recon_loss(
    latents: SparseLatents,
    W_LO: Tensor,
    b_O: Tensor | None,
    target_BO: Tensor,
    segments: Sequence[int],
    backend: str,
) -> DecodeReconLoss:
    """The loss of the decoded output. Needs at least one stored entry."""
    sparse = (latents.row_ptr_B1, latents.latent_idx_N, latents.value_N)
    order = decode_order(latents, W_LO, backend)
    loss, per_x_X, residual_BO = _decode_recon(*sparse, W_LO, b_O, *order, target_BO, list(segments), backend)
    return DecodeReconLoss(loss, per_x_X, residual_BO.detach())
