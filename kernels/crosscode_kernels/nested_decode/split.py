"""The segments of nested prefixes, for any backend's decode.

Axes: B tokens · S prefixes, and so segments · O flattened output dims · L latents · N stored entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from crosscode_kernels.sparse import LatentOrder, SparseLatents


def by_segment(value_BL: Tensor, W_LO: Tensor, sizes: Sequence[int]) -> Tensor:
    """`y_BSO` of dense latents: products that together are the size of one."""
    starts = (0, *sizes)
    return torch.stack([value_BL[:, a:b] @ W_LO[a:b] for a, b in zip(starts, sizes, strict=False)], dim=1)


def split_tokens(latents: SparseLatents, sizes: Sequence[int]) -> SparseLatents:
    """The same entries as a batch of `B * S` tokens: each token S times, with the entries of one segment each. An entry
    beyond the last size has the value 0."""
    n_segments, idx_N = len(sizes), latents.latent_idx_N
    bounds_S = torch.tensor(sizes, dtype=idx_N.dtype, device=idx_N.device)
    segment_N = torch.searchsorted(bounds_S, idx_N, right=True).clamp_(max=n_segments - 1)
    row_N = latents.token_idx_N() * n_segments + segment_N
    row_N, source_N = torch.sort(row_N, stable=True)
    rows = torch.arange(latents.batch_size * n_segments + 1, device=row_N.device)
    value_N = latents.value_N
    if sizes[-1] < latents.n_latents:
        value_N = value_N * (idx_N < sizes[-1])
    order = latents.by_latent
    if order is not None:  # a latent's entries stay in the order of their tokens
        place_N = torch.empty_like(source_N).scatter_(0, source_N, torch.arange(len(source_N), device=source_N.device))
        order = LatentOrder(place_N[order.order_N].int(), order.latent_ptr_L1)
    return replace(
        latents,
        row_ptr_B1=torch.searchsorted(row_N, rows, out_int32=True),
        latent_idx_N=idx_N[source_N],
        value_N=value_N[source_N],
        by_latent=order,
        deficit_L=None,
        preacts_N=None,
    )
