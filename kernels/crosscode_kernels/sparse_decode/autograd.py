"""sparse_decode as a registered op with its gradients.

Axes: B tokens · O flattened output dims · L latents · N stored entries.

Saved for backward: the sparse batch (shared with the encoder) and W_dec.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from crosscode_kernels.registration import contiguous, define_op
from crosscode_kernels.registry import get_kernel, has_kernel
from crosscode_kernels.segments.autograd import gather_dot, is_row_sparse, latent_order, weight_grad
from crosscode_kernels.sparse import SparseLatents


def _body(
    row_ptr_B1: Tensor,
    latent_idx_N: Tensor,
    value_N: Tensor,
    W_LO: Tensor,
    b_O: Tensor | None,
    order_N: Tensor,
    latent_ptr_L1: Tensor,
    backend: str,
) -> Tensor:
    n_tokens = row_ptr_B1.shape[0] - 1
    if n_tokens == 0 or latent_idx_N.shape[0] == 0:
        y_BO = value_N.new_zeros(n_tokens, W_LO.shape[1])
        return y_BO if b_O is None else y_BO + b_O
    return get_kernel("sparse_decode", backend)(*contiguous(row_ptr_B1, latent_idx_N, value_N, W_LO, b_O))


def _fake(
    row_ptr_B1: Tensor,
    latent_idx_N: Tensor,
    value_N: Tensor,
    W_LO: Tensor,
    b_O: Tensor | None,
    order_N: Tensor,
    latent_ptr_L1: Tensor,
    backend: str,
) -> Tensor:
    return value_N.new_empty(row_ptr_B1.shape[0] - 1, W_LO.shape[1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    row_ptr_B1, latent_idx_N, value_N, W_LO, _, order_N, latent_ptr_L1, ctx.backend = inputs
    ctx.save_for_backward(row_ptr_B1, latent_idx_N, value_N, W_LO, order_N, latent_ptr_L1)


def _backward(ctx: Any, dy_BO: Tensor) -> tuple[Tensor | None, ...]:
    needs = tuple(ctx.needs_input_grad[2:5])
    return None, None, *decode_grads(dy_BO, ctx.saved_tensors, needs, ctx.backend), None, None, None


def decode_grads(
    dy_BO: Tensor, sparse: Sequence[Tensor], needs: tuple[bool, ...], backend: str
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of the values, of W and of b, as far as needed. `sparse`: row_ptr_B1, latent_idx_N, value_N, W_LO, order_N,
    latent_ptr_L1."""
    row_ptr_B1, latent_idx_N, value_N, W_LO, order_N, latent_ptr_L1 = sparse
    needs_value, needs_W, needs_b = needs
    dy_BO = dy_BO.contiguous()
    db_O = dy_BO.sum(0) if needs_b else None
    if needs_value and needs_W and has_kernel("sparse_decode_backward", backend) and not is_row_sparse(backend):
        batch = (order_N, latent_ptr_L1, row_ptr_B1, latent_idx_N, value_N)
        return *_sparse_decode_backward(*batch, dy_BO, W_LO, backend), db_O
    dvalue_N = gather_dot(row_ptr_B1, latent_idx_N, dy_BO, W_LO, backend) if needs_value else None
    dW_LO = weight_grad(order_N, latent_ptr_L1, row_ptr_B1, value_N, dy_BO, backend)[0] if needs_W else None
    return dvalue_N, dW_LO, db_O


def _backward_body(
    order_N: Tensor,
    latent_ptr_L1: Tensor,
    row_ptr_B1: Tensor,
    latent_idx_N: Tensor,
    value_N: Tensor,
    dy_BO: Tensor,
    W_LO: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor]:
    if value_N.shape[0] == 0:
        return torch.empty_like(value_N), torch.zeros_like(W_LO)
    tensors = contiguous(order_N, latent_ptr_L1, row_ptr_B1, latent_idx_N, value_N, dy_BO, W_LO)
    return get_kernel("sparse_decode_backward", backend)(*tensors)


def _backward_fake(
    order_N: Tensor,
    latent_ptr_L1: Tensor,
    row_ptr_B1: Tensor,
    latent_idx_N: Tensor,
    value_N: Tensor,
    dy_BO: Tensor,
    W_LO: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(value_N), torch.empty_like(W_LO, memory_format=torch.contiguous_format)


_sparse_decode_backward = define_op(
    "sparse_decode_backward",
    "(Tensor order_N, Tensor latent_ptr_L1, Tensor row_ptr_B1, Tensor latent_idx_N, Tensor value_N, Tensor dy_BO,"
    " Tensor W_LO, str backend) -> (Tensor, Tensor)",
    body=_backward_body,
    fake=_backward_fake,
)
_sparse_decode = define_op(
    "sparse_decode",
    "(Tensor row_ptr_B1, Tensor latent_idx_N, Tensor value_N, Tensor W_LO, Tensor? b_O, Tensor order_N,"
    " Tensor latent_ptr_L1, str backend) -> Tensor",
    body=_body,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)


def decode_order(latents: SparseLatents, W_LO: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """The transpose, which only the gradient of W needs; computed here where the encoder has not."""
    if latents.by_latent is not None:
        return latents.by_latent
    if torch.is_grad_enabled() and W_LO.requires_grad:
        return latent_order(latents.latent_idx_N, latents.n_latents, backend)
    return latents.latent_idx_N.new_empty(0), latents.latent_idx_N.new_empty(0)


def sparse_decode(latents: SparseLatents, W_LO: Tensor, b_O: Tensor | None, backend: str) -> Tensor:
    """`y_BO`."""
    order = decode_order(latents, W_LO, backend)
    return _sparse_decode(latents.row_ptr_B1, latents.latent_idx_N, latents.value_N, W_LO, b_O, *order, backend)


def sparse_rows_sum(row_ptr_B1: Tensor, latent_idx_N: Tensor, value_N: Tensor, W_LO: Tensor, backend: str) -> Tensor:
    """The same sum without gradient: what an encoder's input receives."""
    no_order = latent_idx_N.new_empty(0)
    return _sparse_decode(row_ptr_B1, latent_idx_N, value_N, W_LO, None, no_order, no_order, backend)
