"""sparse_decode in stock ops: sums of decoder rows by token, and both gradients.

Axes: B tokens · O flattened output dims · L latents · N stored entries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from crosscode_kernels.segments.torch_impl import SUM_MODE, entry_tokens, row_sums, without_padding
from crosscode_kernels.sparse import Entries


def sparse_decode(entries: Entries, W_LO: Tensor, b_O: Tensor | None) -> Tensor:
    return row_sums(entries.row_ptr_B1, entries.latent_idx_N, entries.value_N, W_LO, plus=b_O)


def gather_dot(entries: Entries, dy_BO: Tensor, W_LO: Tensor) -> Tensor:
    """`dot_N = dy[token(n)] . W[latent(n)]`."""
    token_idx_N = entry_tokens(entries.row_ptr_B1, entries.latent_idx_N.shape[0])
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        dy_BO, W_LO, entries.latent_idx_N, entries.row_ptr_B1[:-1].contiguous(), token_idx_N, SUM_MODE
    )


def sparse_decode_backward(entries: Entries, dy_BO: Tensor, W_LO: Tensor) -> tuple[Tensor, Tensor]:
    """`dvalue_N, dW_LO` over entries sorted by latent: a row of W is read once for all its entries, and the rows that are read
    many times are those of dy, the smaller matrix."""
    _, latent_idx_N, value_N, _, latent_ptr_L1 = entries
    order_N, token_N = without_padding(entries)
    dot_N = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        W_LO, dy_BO, token_N, latent_ptr_L1[:-1].contiguous(), latent_idx_N.index_select(0, order_N), SUM_MODE
    )
    dvalue_N = dot_N.new_zeros(value_N.shape[0]).index_copy_(0, order_N.long(), dot_N)
    return dvalue_N, row_sums(latent_ptr_L1, token_N, value_N.index_select(0, order_N), dy_BO)
