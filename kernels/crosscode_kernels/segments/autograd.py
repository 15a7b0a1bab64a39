"""Registered ops on the entries of a sparse batch: sort by latent, gather-dot, segment sums. None has a gradient.

Axes: B tokens · I flattened input dims · O flattened output dims · L latents · N stored entries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from crosscode_kernels.registration import contiguous, define_op
from crosscode_kernels.registry import get_kernel, has_option


def _order_body(latent_idx_N: Tensor, n_latents: int, backend: str) -> tuple[Tensor, Tensor]:
    if latent_idx_N.shape[0] == 0:
        return torch.empty_like(latent_idx_N), latent_idx_N.new_zeros(n_latents + 1)
    return get_kernel("latent_order", backend)(latent_idx_N.contiguous(), n_latents)


def _order_fake(latent_idx_N: Tensor, n_latents: int, backend: str) -> tuple[Tensor, Tensor]:
    return torch.empty_like(latent_idx_N), latent_idx_N.new_empty(n_latents + 1)


latent_order = define_op(
    "latent_order",
    "(Tensor latent_idx_N, SymInt n_latents, str backend) -> (Tensor, Tensor)",
    body=_order_body,
    fake=_order_fake,
)


def _gather_dot_body(row_ptr_B1: Tensor, latent_idx_N: Tensor, dy_BO: Tensor, W_LO: Tensor, backend: str) -> Tensor:
    if latent_idx_N.shape[0] == 0:
        return dy_BO.new_empty(0)
    return get_kernel("gather_dot", backend)(*contiguous(row_ptr_B1, latent_idx_N, dy_BO, W_LO))


def _gather_dot_fake(row_ptr_B1: Tensor, latent_idx_N: Tensor, dy_BO: Tensor, W_LO: Tensor, backend: str) -> Tensor:
    return dy_BO.new_empty(latent_idx_N.shape[0])


gather_dot = define_op(
    "gather_dot",
    "(Tensor row_ptr_B1, Tensor latent_idx_N, Tensor dy_BO, Tensor W_LO, str backend) -> Tensor",
    body=_gather_dot_body,
    fake=_gather_dot_fake,
)


def is_row_sparse(backend: str) -> bool:
    """Whether weight gradients are sparse over rows. Their shapes depend on the data, so never while tracing."""
    return has_option(backend, "rows") and not torch.compiler.is_compiling()


def weight_grad(
    order_N: Tensor, latent_ptr_L1: Tensor, row_ptr_B1: Tensor, weight_N: Tensor, rows_BI: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    """`segment_rows` as a weight's gradient: with the option "rows" a sparse COO tensor over the touched rows."""
    if is_row_sparse(backend) and order_N.shape[0]:
        touched_Q = latent_ptr_L1.diff().nonzero().squeeze(1)
        ends_Q1 = torch.cat([latent_ptr_L1[:-1][touched_Q], latent_ptr_L1[-1:]])
        values_QI, sum_Q = segment_rows(order_N, ends_Q1, row_ptr_B1, weight_N, rows_BI, backend)
        size = (latent_ptr_L1.shape[0] - 1, rows_BI.shape[1])
        sum_L = sum_Q.new_zeros(size[0]).index_copy_(0, touched_Q, sum_Q)
        grad_LI = torch.sparse_coo_tensor(
            touched_Q.unsqueeze(0), values_QI, size, is_coalesced=True, check_invariants=False
        )
        return grad_LI, sum_L
    return segment_rows(order_N, latent_ptr_L1, row_ptr_B1, weight_N, rows_BI, backend)


def _segment_rows_body(
    order_N: Tensor, latent_ptr_L1: Tensor, row_ptr_B1: Tensor, weight_N: Tensor, rows_BI: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    n_latents = latent_ptr_L1.shape[0] - 1
    if order_N.shape[0] == 0:
        return rows_BI.new_zeros(n_latents, rows_BI.shape[1]), rows_BI.new_zeros(n_latents)
    kernel = get_kernel("segment_rows", backend)
    if rows_BI.shape[1] == 0:  # the sums of weights are still there
        out_LI, sum_L = kernel(order_N, latent_ptr_L1, row_ptr_B1, weight_N, rows_BI.new_zeros(rows_BI.shape[0], 1))
        return out_LI[:, :0].contiguous(), sum_L
    return kernel(*contiguous(order_N, latent_ptr_L1, row_ptr_B1, weight_N, rows_BI))


def _segment_rows_fake(
    order_N: Tensor, latent_ptr_L1: Tensor, row_ptr_B1: Tensor, weight_N: Tensor, rows_BI: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    n_latents = latent_ptr_L1.shape[0] - 1
    return rows_BI.new_empty(n_latents, rows_BI.shape[1]), rows_BI.new_empty(n_latents)


segment_rows = define_op(
    "segment_rows",
    "(Tensor order_N, Tensor latent_ptr_L1, Tensor row_ptr_B1, Tensor weight_N, Tensor rows_BI, str backend)"
    " -> (Tensor, Tensor)",
    body=_segment_rows_body,
    fake=_segment_rows_fake,
)
