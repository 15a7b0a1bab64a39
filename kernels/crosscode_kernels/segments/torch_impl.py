"""Sums over the entries of a sparse batch, by token and by latent.

Axes: B tokens · I flattened input dims · O flattened output dims · L latents · N stored entries · M entries that count · G sums.

By token the rows that are summed are decoder rows: an embedding bag, which fetches rows ahead (2 to 4 times as fast as a
product with a sparse matrix). By latent, over entries sorted by latent, they are the tokens' vectors, and the sum is a
weight gradient. On a CPU with MKL this is a product with a sparse matrix, which writes into memory that is there already;
elsewhere a bag too. Both read the rows that an entry names, sum in float32 or wider, in a fixed order, and write a sum
once; sums without entries are written as zeros.
"""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor

from crosscode_kernels import host_buffers
from crosscode_kernels.checks import acc_dtype
from crosscode_kernels.sparse import Entries

SUM_MODE = 0
_MANY_PAIRS = 0.1
"""Share of all pairs of a token and a latent from which a product of all takes less time."""


def entry_tokens(row_ptr_B1: Tensor, n_entries: int) -> Tensor:
    """Token of each entry, int32."""
    tokens_B = torch.arange(row_ptr_B1.shape[0] - 1, dtype=torch.int32, device=row_ptr_B1.device)
    return torch.repeat_interleave(tokens_B, row_ptr_B1.diff(), output_size=n_entries)


def entry_places(entries: Entries, n_latents: int) -> Tensor:
    """Place of each entry in `B x L`, flat, int64."""
    row_ptr_B1, latent_idx_N, *_ = entries
    return entry_tokens(row_ptr_B1, latent_idx_N.shape[0]).long().mul_(n_latents).add_(latent_idx_N)


def token_sums(entries: Entries, W_LO: Tensor) -> Tensor:
    """For each token the sum over its entries of `value[n] * W[latent[n]]`."""
    ptr_B1, latent_idx_N, value_N = _without_zeros(*entries[:3])
    return _bags(W_LO, latent_idx_N, ptr_B1, value_N, True)


def row_sums(ptr_G1: Tensor, row_idx_N: Tensor, weight_N: Tensor, rows: Tensor) -> Tensor:
    """For each sum g over its entries `ptr[g]` to `ptr[g + 1]`: `weight[n] * rows[row_idx[n]]`. Entries from `ptr[G]` on are
    in no sum."""
    ptr_G1, row_idx_N, weight_N = _without_zeros(ptr_G1, row_idx_N, weight_N)
    if not _by_sparse_product(rows):
        return _bags(rows, row_idx_N, ptr_G1, weight_N, False)[:-1]  # the last bag: what is in no sum
    entries_GR = _csr(ptr_G1, row_idx_N, weight_N, rows.shape[0])
    return host_buffers.empty((ptr_G1.shape[0] - 1, rows.shape[1]), rows).addmm_(entries_GR, rows, beta=0)


def _without_zeros(ptr_G1: Tensor, row_idx_N: Tensor, weight_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """On a CPU, without the entries of weight 0 where these are most: a JumpReLU stores what lies in its window too."""
    if weight_N.device.type != "cpu":  # asking would stall the step
        return ptr_G1, row_idx_N, weight_N
    kept_M = weight_N.nonzero().squeeze(1)
    if 2 * kept_M.shape[0] > weight_N.shape[0]:
        return ptr_G1, row_idx_N, weight_N
    ptr_G1 = torch.searchsorted(kept_M, ptr_G1.long(), out_int32=True)
    return ptr_G1, row_idx_N.index_select(0, kept_M), weight_N.index_select(0, kept_M)


def pair_dots(entries: Entries, rows_BO: Tensor, W_LO: Tensor) -> Tensor:
    """`dot_N = rows[token(n)] . W[latent(n)]`, 0 for padding. Where entries are sorted by latent they are visited so: a row of
    W is read once for all its entries, and what is read many times are `rows`, the smaller matrix."""
    row_ptr_B1, latent_idx_N, _, order_N, latent_ptr_L1 = entries
    if not order_N.shape[0]:
        token_N = entry_tokens(row_ptr_B1, latent_idx_N.shape[0])
        return _bag_dots(rows_BO, W_LO, latent_idx_N, token_N)
    n_pairs = rows_BO.shape[0] * W_LO.shape[0]
    if rows_BO.device.type == "cpu" and order_N.shape[0] > _MANY_PAIRS * n_pairs and rows_BO.dtype.itemsize >= 4:
        return _dots_of_all(entries, rows_BO, W_LO)
    order_N, token_N = without_padding(entries)
    if _by_sparse_product(rows_BO):
        nothing_N = rows_BO.new_zeros(order_N.shape[0])
        pairs_LB = _csr(latent_ptr_L1, token_N, nothing_N, rows_BO.shape[0])
        dot_N = torch.sparse.sampled_addmm(pairs_LB, W_LO, rows_BO.T, beta=0).values()
    else:
        dot_N = _bag_dots(W_LO, rows_BO, token_N, latent_idx_N.index_select(0, order_N))
    return dot_N.new_zeros(latent_idx_N.shape[0]).index_copy_(0, order_N.long(), dot_N)


def _dots_of_all(entries: Entries, rows_BO: Tensor, W_LO: Tensor) -> Tensor:
    """A dense product, in memory that the encoder's has left, and of it what is wanted: 10 times as fast a pair as one by one."""
    n_latents = W_LO.shape[0]
    all_BL = torch.mm(rows_BO, W_LO.T, out=host_buffers.empty((rows_BO.shape[0], n_latents), rows_BO))
    padding_N = entries.order_N[entries.latent_ptr_L1[-1:].tolist()[0] :]
    return all_BL.take(entry_places(entries, n_latents)).index_fill_(0, padding_N.long(), 0)


def _bags(rows: Tensor, row_idx_N: Tensor, ptr: Tensor, weight_N: Tensor, with_end: bool) -> Tensor:
    return torch.ops.aten._embedding_bag_forward_only(rows, row_idx_N, ptr, False, SUM_MODE, False, weight_N, with_end)[
        0
    ]


def _bag_dots(left: Tensor, right: Tensor, right_idx_N: Tensor, left_idx_N: Tensor) -> Tensor:
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        left, right, right_idx_N, left_idx_N[:1], left_idx_N, SUM_MODE
    )


def _csr(ptr_G1: Tensor, column_N: Tensor, value_N: Tensor, n_columns: int) -> Tensor:
    return torch.sparse_csr_tensor(ptr_G1, column_N, value_N, (ptr_G1.shape[0] - 1, n_columns), check_invariants=False)


def _by_sparse_product(rows: Tensor) -> bool:
    return rows.device.type == "cpu" and rows.dtype in (torch.float32, torch.float64) and _has_sparse_product()


@functools.cache
def _has_sparse_product() -> bool:
    if not torch.backends.mkl.is_available():
        return False
    with warnings.catch_warnings():  # PyTorch says once a process that its sparse CSR tensors are in beta state
        warnings.simplefilter("ignore")
        torch.eye(2).to_sparse_csr()
    return True


def without_padding(entries: Entries) -> tuple[Tensor, Tensor]:
    """`order_N`, and the token of each entry in that order. On a device, where the number of entries that are padding is not
    known, they stay, behind the last latent."""
    order_N = entries.order_N
    if order_N.device.type == "cpu":
        order_N = order_N[: entries.latent_ptr_L1[-1:].tolist()[0]]
    return order_N, entry_tokens(entries.row_ptr_B1, entries.order_N.shape[0]).index_select(0, order_N)


def latent_order(latent_idx_N: Tensor, n_latents: int) -> tuple[Tensor, Tensor]:
    sorted_N, order_N = torch.sort(latent_idx_N, stable=True)
    latents_L1 = torch.arange(n_latents + 1, dtype=sorted_N.dtype, device=sorted_N.device)
    return order_N.int(), torch.searchsorted(sorted_N, latents_L1, out_int32=True)


def segment_rows(entries: Entries, rows_BI: Tensor) -> tuple[Tensor, Tensor]:
    """`out_LI, sum_L`: over each latent's entries the sum of value * rows[token] (zeros where there are none), and of values."""
    order_N, token_N = without_padding(entries)
    value_sorted_N = entries.value_N.index_select(0, order_N)
    out_LI = row_sums(entries.latent_ptr_L1, token_N, value_sorted_N, rows_BI)
    return out_LI, _weight_sums(entries.latent_ptr_L1, value_sorted_N)


def segment_rows_and_common(entries: Entries, rows_BI: Tensor, common_L: Tensor) -> tuple[Tensor, Tensor]:
    """`segment_rows` plus `common[l]` times the sum of all rows: one more entry in each latent's sum, no further pass."""
    row_ptr_B1, _, weight_N, order_N, latent_ptr_L1 = entries
    n_entries, n_latents = order_N.shape[0], common_L.shape[0]
    rows_B1I = torch.cat([rows_BI, rows_BI.sum(0, keepdim=True, dtype=acc_dtype(rows_BI.dtype)).to(rows_BI.dtype)])
    counts_L = latent_ptr_L1.diff()
    latents_L1 = torch.arange(n_latents + 1, dtype=torch.int32, device=order_N.device)
    latent_N = torch.repeat_interleave(latents_L1[:-1], counts_L, output_size=n_entries)
    entry_M = (torch.arange(n_entries, device=order_N.device) + latent_N).long()
    last_L = (latent_ptr_L1[1:] + latents_L1[:-1]).long()
    row_M = torch.full((n_entries + n_latents,), rows_BI.shape[0], dtype=torch.int32, device=order_N.device)
    row_M[entry_M] = entry_tokens(row_ptr_B1, n_entries).index_select(0, order_N)
    weight_M = weight_N.new_empty(n_entries + n_latents)
    weight_M[entry_M] = weight_N.index_select(0, order_N)
    weight_M[last_L] = common_L
    out_LI = row_sums(latent_ptr_L1 + latents_L1, row_M, weight_M, rows_B1I)
    return out_LI, latent_sum(order_N, latent_ptr_L1, weight_N) + common_L * rows_BI.shape[0]


def latent_sum(order_N: Tensor, latent_ptr_L1: Tensor, weight_N: Tensor) -> Tensor:
    """For each latent the sum of its entries' weights."""
    return _weight_sums(latent_ptr_L1, weight_N.index_select(0, order_N))


def _weight_sums(ptr_G1: Tensor, weight_N: Tensor) -> Tensor:
    no_row_N = torch.zeros(weight_N.shape[0], dtype=torch.int32, device=weight_N.device)
    return _bags(weight_N.new_ones(1, 1), no_row_N, ptr_G1, weight_N, False)[:-1].squeeze(1)
