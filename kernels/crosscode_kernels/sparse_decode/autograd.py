"""sparse_decode as a registered op with its gradients.

Axes: B tokens · O flattened output dims · L latents · N stored entries.

Saved for backward: the sparse batch (shared with the encoder) and W_dec.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from crosscode_kernels.backend import Backend
from crosscode_kernels.registration import Arguments, define_op, like
from crosscode_kernels.segments.autograd import order_of, weight_grad
from crosscode_kernels.sparse import Entries, SparseLatents
from crosscode_kernels.sparse_decode import torch_impl


def entries_of(a: Arguments) -> Entries:
    return Entries(*(getattr(a, field) for field in Entries._fields))


def decode_grads(
    dy_BO: Tensor, entries: Entries, W_LO: Tensor, needs: Collection[str], backend: Backend
) -> dict[str, Tensor | None]:
    """Gradients of value_N, W_LO and b_O, as far as they are among `needs`."""
    dy_BO = dy_BO.contiguous()
    db_O = dy_BO.sum(0) if "b_O" in needs else None
    if "value_N" in needs and "W_LO" in needs and not (backend.is_row_sparse or backend.is_deferred):
        dvalue_N, dW_LO = _sparse_decode_backward(entries, dy_BO, W_LO, backend=backend)
    else:
        dvalue_N = _gather_dot(entries, dy_BO, W_LO, backend=backend) if "value_N" in needs else None
        dW_LO = weight_grad(entries, dy_BO, backend, want_sum=False)[0] if "W_LO" in needs else None
    return {"value_N": dvalue_N, "W_LO": dW_LO, "b_O": db_O}


def _without_entries(a: Arguments) -> Tensor | None:
    n_tokens = a.row_ptr_B1.shape[0] - 1
    if n_tokens and a.latent_idx_N.shape[0]:
        return None
    y_BO = a.value_N.new_zeros(n_tokens, a.W_LO.shape[1])
    return y_BO if a.b_O is None else y_BO + a.b_O


_gather_dot = define_op(
    torch_impl.gather_dot,
    empty=lambda a: a.dy_BO.new_empty(0) if a.latent_idx_N.shape[0] == 0 else None,
    fake=lambda a: a.dy_BO.new_empty(a.latent_idx_N.shape[0]),
)
_sparse_decode_backward = define_op(
    torch_impl.sparse_decode_backward,
    empty=lambda a: (torch.empty_like(a.value_N), torch.zeros_like(a.W_LO)) if a.value_N.shape[0] == 0 else None,
    fake=lambda a: (torch.empty_like(a.value_N), like(a.W_LO)),
)
entries_decode = define_op(
    torch_impl.sparse_decode,
    empty=_without_entries,
    fake=lambda a: a.value_N.new_empty(a.row_ptr_B1.shape[0] - 1, a.W_LO.shape[1]),
    saved=lambda a, _: {"W_LO": a.W_LO, **entries_of(a)._asdict()},
    backward=lambda a, dy_BO: decode_grads(dy_BO, entries_of(a), a.W_LO, a.needs, a.backend),
)


def ordered_entries(latents: SparseLatents, W_LO: Tensor, backend: Backend) -> Entries:
    """The entries, with the transpose where the encoder has computed it or the gradient of W needs it."""
    if latents.by_latent is None and torch.is_grad_enabled() and W_LO.requires_grad:
        return latents.entries(order_of(latents, backend))
    return latents.entries(latents.by_latent)


def latents_decode(latents: SparseLatents, W_LO: Tensor, b_O: Tensor | None, backend: Backend) -> Tensor:
    """`y_BO`."""
    return entries_decode(ordered_entries(latents, W_LO, backend), W_LO, b_O, backend=backend)
