"""Which entries of a dense matrix are kept: the definitions, on whole tensors.

Axes: B tokens · L latents · R rows · C columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from crosscode_kernels.checks import acc_dtype


def topk_mask(value_RC: Tensor, k: int) -> Tensor:
    """True at the k largest of each row; equal values: the lowest columns. NaN counts as the largest of all."""
    n_columns = value_RC.shape[1]
    if k == 0 or value_RC.numel() == 0:
        return torch.zeros_like(value_RC, dtype=torch.bool)
    top = value_RC.topk(min(k + 1, n_columns), dim=1)
    kept_RC = torch.zeros_like(value_RC, dtype=torch.bool).scatter_(1, top.indices[:, :k], True)
    if k < n_columns:
        # `topk` does not say which of several equal values it returns, so rows where the cut runs through equal values
        # are decided by a stable sort.
        tied_R = ~(top.values[:, k - 1] > top.values[:, k])
        order = value_RC[tied_R].sort(dim=1, descending=True, stable=True).indices[:, :k]
        kept_RC[tied_R] = torch.zeros_like(kept_RC[tied_R]).scatter_(1, order, True)
    return kept_RC


def batch_topk_mask(rank_BL: Tensor, n_kept: int) -> Tensor:
    """True at the `n_kept` largest of the whole matrix; equal values: the lowest flat index."""
    return topk_mask(rank_BL.reshape(1, -1), n_kept).view_as(rank_BL)


def groupmax_mask(value_BL: Tensor, n_groups: int) -> Tensor:
    """True at the maximum of each of `n_groups` contiguous groups of a row; equal values: the lowest latent."""
    n_tokens, n_latents = value_BL.shape
    groups = value_BL.reshape(n_tokens * n_groups, n_latents // n_groups)
    return topk_mask(groups, 1).view_as(value_BL)


def ranking(a_BL: Tensor, rank_scale_L: Tensor | None) -> Tensor:
    """What batch top-k compares: `a`, scaled per latent where asked. No gradient."""
    if rank_scale_L is None:
        return a_BL.detach()
    dtype = acc_dtype(a_BL.dtype)
    return a_BL.detach().to(dtype) * rank_scale_L.to(dtype)
