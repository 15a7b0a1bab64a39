"""nested_decode as a registered op with its gradients: those of `sparse_decode`, where a segment's gradient is the sum over the
prefixes that hold it.

Axes: B tokens · S prefixes · O flattened output dims · N stored entries.

Saved for backward: the split batch and W_dec.
"""

from __future__ import annotations

import torch
from torch import Tensor

from crosscode_kernels.backend import Backend
from crosscode_kernels.nested_decode import torch_impl
from crosscode_kernels.registration import Arguments, define_op
from crosscode_kernels.sparse import SparseLatents
from crosscode_kernels.sparse_decode.autograd import decode_grads, entries_of, ordered_entries


def _without_entries(a: Arguments) -> Tensor | None:
    n_tokens = (a.row_ptr_B1.shape[0] - 1) // a.n_prefixes
    if n_tokens and a.latent_idx_N.shape[0]:
        return None
    y_BSO = a.value_N.new_zeros(n_tokens, a.n_prefixes, a.W_LO.shape[1])
    return y_BSO if a.b_O is None else y_BSO + a.b_O


def _backward(a: Arguments, dy_BSO: Tensor) -> dict[str, Tensor | None]:
    of_segment_BSO = dy_BSO.clone(memory_format=torch.contiguous_format)
    for s in range(a.n_prefixes - 2, -1, -1):
        of_segment_BSO[:, s] += of_segment_BSO[:, s + 1]
    grads = decode_grads(of_segment_BSO.flatten(0, 1), entries_of(a), a.W_LO, a.needs - {"b_O"}, a.backend)
    return {**grads, "b_O": of_segment_BSO[:, 0].sum(0) if "b_O" in a.needs else None}


_nested_decode = define_op(
    torch_impl.nested_decode,
    empty=_without_entries,
    fake=lambda a: a.value_N.new_empty((a.row_ptr_B1.shape[0] - 1) // a.n_prefixes, a.n_prefixes, a.W_LO.shape[1]),
    saved=lambda a, _: {"W_LO": a.W_LO, **entries_of(a)._asdict()},
    backward=_backward,
)


def split_decode(split: SparseLatents, W_LO: Tensor, b_O: Tensor | None, n_prefixes: int, backend: Backend) -> Tensor:
    """`y_BSO` of what `split_tokens` gives."""
    return _nested_decode(ordered_entries(split, W_LO, backend), W_LO, b_O, n_prefixes, backend=backend)
