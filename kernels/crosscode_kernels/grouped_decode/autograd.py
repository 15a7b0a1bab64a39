"""grouped_decode as a registered op with its gradients.

Axes: B tokens · S dictionaries · O flattened output dims · L latents of each · N stored entries of all.

Saved for backward: the sparse batch of all dictionaries, one behind the other, and the weights.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from crosscode_kernels.backend import Backend
from crosscode_kernels.grouped_decode import torch_impl
from crosscode_kernels.registration import Arguments, define_op
from crosscode_kernels.segments.autograd import order_of
from crosscode_kernels.sparse import Entries, SparseLatents
from crosscode_kernels.sparse_decode.autograd import decode_grads, entries_of


def _n_tokens(a: Arguments) -> int:
    return a.row_ptr_B1.shape[0] // len(a.count_S) - 1


def _without_entries(a: Arguments) -> Tensor | None:
    if _n_tokens(a) and a.latent_idx_N.shape[0]:
        return None
    y_BO = a.value_N.new_zeros(_n_tokens(a), a.n_out)
    return y_BO if a.b_O is None else y_BO + a.b_O


def _together(a: Arguments, dy_BO: Tensor, want_W: bool) -> tuple[Tensor, list[Tensor]]:
    """`dvalue_N`, and the gradient of each dictionary (views of few arrays), or none: by few launches for all."""
    entries, dvalue, dW_S = entries_of(a), [], []
    runs = importlib.import_module("crosscode_kernels.grouped_decode.triton_impl").runs_within_memory
    runs = runs(a.count_S, dy_BO.shape[1])
    own_S = list(torch_impl.entries_of_each(entries, a.count_S)) if len(runs) > 1 else []
    for run in runs:
        joined = Entries(*map(torch.cat, zip(*own_S[run], strict=True))) if own_S else entries
        W_S = a.W_S[run]
        dvalue_N, flat = _grouped_backward(
            joined, a.count_S[run], dy_BO, W_S, a.first_S[run], want_W, backend=a.backend
        )
        dvalue.append(dvalue_N)
        if want_W:
            parts = flat.split([W_LO.numel() for W_LO in W_S])
            dW_S += [part.view(W_LO.shape) for part, W_LO in zip(parts, W_S, strict=True)]
    return torch.cat(dvalue) if own_S else dvalue[0], dW_S


def _backward(a: Arguments, dy_BO: Tensor) -> dict[str, Any]:
    dy_BO = dy_BO.contiguous()
    db_O = dy_BO.sum(0) if "b_O" in a.needs else None
    needs = a.needs - {"b_O", "W_S"} | ({"W_LO"} if "W_S" in a.needs else set())
    dvalue_N: Tensor | None = None
    dW_S: list[Tensor | None] = [None] * len(a.count_S)
    if a.backend.name == "triton" and a.order_N.shape[0] and dy_BO.shape[0]:
        want_W = "W_LO" in needs and not a.backend.is_deferred
        dvalue_N, found_S = _together(a, dy_BO, want_W)
        dW_S = [*found_S] if want_W else dW_S
        needs = needs - {"value_N"} - ({"W_LO"} if want_W else set())
    if needs:
        dvalue_S: list[Any] = []
        own_S = torch_impl.entries_of_each(entries_of(a), a.count_S)
        for s, (own, W_LO, first) in enumerate(zip(own_S, a.W_S, a.first_S, strict=True)):
            grads = decode_grads(dy_BO[:, first : first + W_LO.shape[1]], own, W_LO, needs, a.backend)
            dvalue_S.append(grads["value_N"])
            dW_S[s] = grads["W_LO"]
        dvalue_N = torch.cat(dvalue_S) if "value_N" in needs else dvalue_N
    return {"value_N": dvalue_N, "W_S": dW_S, "b_O": db_O}


_grouped_backward = define_op(
    torch_impl.grouped_backward,
    fake=lambda a: (
        torch.empty_like(a.value_N),
        a.dy_BO.new_empty(sum(W_LO.numel() for W_LO in a.W_S) if a.want_W else 0),
    ),
)
_grouped_decode = define_op(
    torch_impl.grouped_decode,
    empty=_without_entries,
    fake=lambda a: a.value_N.new_empty(_n_tokens(a), a.n_out),
    saved=lambda a, _: {"W_S": a.W_S, **entries_of(a)._asdict()},
    backward=_backward,
)
_window_sums = define_op(
    torch_impl.window_sums,
    fake=lambda a: a.y_SBO[0].new_empty(a.y_SBO[0].shape[0], a.n_out),
    saved=lambda a, _: {"like_SB": [y_BO.new_empty(0, y_BO.shape[1]) for y_BO in a.y_SBO]},
    backward=lambda a, dy_BO: {
        "y_SBO": [dy_BO[:, first : first + one.shape[1]] for first, one in zip(a.first_S, a.like_SB, strict=True)],
        "b_O": dy_BO.sum(0) if "b_O" in a.needs else None,
    },
)


def joined_decode(
    latents_S: Sequence[SparseLatents],
    W_S: Sequence[Tensor],
    b_O: Tensor | None,
    first_S: list[int],
    n_out: int,
    backend: Backend,
) -> Tensor:
    """`y_BO`. The batches are joined one behind the other; positions, indices and bounds stay those of each."""
    is_ordered = torch.is_grad_enabled() and any(W_LO.requires_grad for W_LO in W_S)
    each_S = [latents.entries(order_of(latents, backend) if is_ordered else None) for latents in latents_S]
    entries = Entries(*(torch.cat(field) for field in zip(*each_S, strict=True)))
    count_S = [own.value_N.shape[0] for own in each_S]
    return _grouped_decode(entries, count_S, list(W_S), b_O, first_S, n_out, backend=backend)


def window_sums(y_SBO: list[Tensor], b_O: Tensor | None, first_S: list[int], n_out: int) -> Tensor:
    """The sum of what is written to windows, and b; of stock ops on every backend."""
    return _window_sums(y_SBO, b_O, first_S, n_out, backend=Backend("torch"))
