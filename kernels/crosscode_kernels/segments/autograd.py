"""Registered ops on the entries of a sparse batch: sort by latent, segment sums. None has a gradient.

Axes: B tokens · I flattened input dims · L latents · N stored entries · Q touched latents.
"""

from __future__ import annotations

import torch
from torch import Tensor

from crosscode_kernels.backend import Backend
from crosscode_kernels.registration import define_op
from crosscode_kernels.segments import torch_impl
from crosscode_kernels.segments.deferred import SegmentGrad
from crosscode_kernels.sparse import Entries, LatentOrder, SparseLatents

ROWS_UP_TO = 0.5
"""Share of touched rows up to which an optimizer step over these alone is cheaper: measured on a CPU, widths 512 to 3072."""

latent_order = define_op(
    torch_impl.latent_order,
    empty=lambda a: (
        (torch.empty_like(a.latent_idx_N), a.latent_idx_N.new_zeros(a.n_latents + 1))
        if a.latent_idx_N.shape[0] == 0
        else None
    ),
    fake=lambda a: (torch.empty_like(a.latent_idx_N), a.latent_idx_N.new_empty(a.n_latents + 1)),
)
segment_rows = define_op(
    torch_impl.segment_rows,
    empty=lambda a: (
        (
            a.rows_BI.new_zeros(a.latent_ptr_L1.shape[0] - 1, a.rows_BI.shape[1]),
            a.rows_BI.new_zeros(a.latent_ptr_L1.shape[0] - 1),
        )
        if a.order_N.shape[0] == 0
        else None
    ),
    fake=lambda a: (
        a.rows_BI.new_empty(a.latent_ptr_L1.shape[0] - 1, a.rows_BI.shape[1]),
        a.rows_BI.new_empty(a.latent_ptr_L1.shape[0] - 1),
    ),
)


def order_of(latents: SparseLatents, backend: Backend) -> LatentOrder:
    """The transpose, computed here where the encoder has not."""
    if latents.by_latent is not None:
        return latents.by_latent
    return LatentOrder(*latent_order(latents.sort_key_N(), latents.n_latents, backend=backend))


def weight_grad(
    entries: Entries, rows_BI: Tensor, backend: Backend, want_sum: bool = True
) -> tuple[Tensor, Tensor | None]:
    """`segment_rows` as a weight's gradient, and the sums of weights, where wanted: with the option "rows" a sparse COO tensor
    over the touched rows, unless these are so many that gathering them costs more than one pass over all; with "deferred"
    none that is computed yet."""
    if backend.is_deferred and entries.order_N.shape[0] and rows_BI.shape[1]:
        sum_L = segment_rows(entries, rows_BI[:, :1], backend=backend)[1] if want_sum else None
        return SegmentGrad.of(entries, rows_BI.contiguous()), sum_L
    if rows_BI.shape[1] == 0:  # the sums of weights are still there
        out_LI, sum_L = weight_grad(entries, rows_BI.new_zeros(rows_BI.shape[0], 1), backend)
        return out_LI[:, :0], sum_L
    if not backend.is_row_sparse or not entries.order_N.shape[0]:
        return segment_rows(entries, rows_BI, backend=backend)
    latent_ptr_L1 = entries.latent_ptr_L1
    touched_Q = latent_ptr_L1.diff().nonzero().squeeze(1)
    if touched_Q.shape[0] > ROWS_UP_TO * (latent_ptr_L1.shape[0] - 1):
        return segment_rows(entries, rows_BI, backend=backend)
    ends_Q1 = torch.cat([latent_ptr_L1[:-1][touched_Q], latent_ptr_L1[-1:]])
    values_QI, sum_Q = segment_rows(entries._replace(latent_ptr_L1=ends_Q1), rows_BI, backend=backend)
    size = (latent_ptr_L1.shape[0] - 1, rows_BI.shape[1])
    sum_L = sum_Q.new_zeros(size[0]).index_copy_(0, touched_Q, sum_Q)
    grad_LI = torch.sparse_coo_tensor(
        touched_Q.unsqueeze(0), values_QI, size, is_coalesced=True, check_invariants=False
    )
    return grad_LI, sum_L
