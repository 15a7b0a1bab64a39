"""encode_batch_topk in stock ops: row candidates first.

Axes: B tokens · I flattened input dims · L latents · R some rows · C candidates · N stored entries.

A batch keeps k * B of B * L, and few rows keep many more than k. So every row offers its `c` largest; the k * B-th
largest of these is a lower bound of the threshold; a row whose last candidate reaches it may hold more, and only such rows
are read again, whole.
"""

from __future__ import annotations

import torch
from torch import Tensor

from crosscode_kernels.checks import acc_dtype
from crosscode_kernels.encode_topk.torch_impl import by_blocks, dense_preacts
from crosscode_kernels.encoder import Encoder
from crosscode_kernels.selection.torch_impl import first_of_equal_topk, topk_in_groups

_CANDIDATES_PER_KEPT = 2


def encode_batch_topk(encoder: Encoder, k: int, rank_scale_L: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """`row_ptr_B1, latent_idx_N, value_N`, after ReLU."""
    h_BL = dense_preacts(encoder)
    n_tokens, n_latents = h_BL.shape
    rank_BL = h_BL
    if rank_scale_L is not None:
        dtype = acc_dtype(h_BL.dtype)
        rank_BL = h_BL.relu_().to(dtype) * rank_scale_L.to(dtype)
    flat_N = batch_topk(rank_BL, k * n_tokens)
    row_N = flat_N // n_latents
    tokens_B1 = torch.arange(n_tokens + 1, device=flat_N.device)
    row_ptr_B1 = torch.searchsorted(row_N, tokens_B1, out_int32=True)
    return row_ptr_B1, (flat_N - row_N * n_latents).int(), h_BL.view(-1).index_select(0, flat_N).relu_()


def batch_topk(rank_BL: Tensor, n_kept: int) -> Tensor:
    """Flat indices, ascending, of the `n_kept` largest of `relu(rank)`; equal: the lowest index."""
    n_tokens, n_latents = rank_BL.shape
    n_candidates = _CANDIDATES_PER_KEPT * max(n_kept // n_tokens, 1)
    # A look at the data is free on the CPU only.
    if rank_BL.device.type == "cpu" and 2 * n_candidates <= n_latents:
        candidate_BC, latent_idx_BC = by_blocks(topk_in_groups, rank_BL, n_candidates)
        bound = candidate_BC.view(-1).kthvalue(candidate_BC.numel() - n_kept + 1).values
        if bool(bound > 0):
            flat_C = _at_least(rank_BL, bound, candidate_BC, latent_idx_BC)
            return flat_C[first_of_equal_topk(rank_BL.view(-1).index_select(0, flat_C), n_kept)]
    return first_of_equal_topk(rank_BL.relu().view(-1), n_kept)


def _at_least(rank_BL: Tensor, bound: Tensor, candidate_BC: Tensor, latent_idx_BC: Tensor) -> Tensor:
    """Flat indices, ascending, of everything not below `bound`: from the candidates (largest first) where a row's last one
    is below it, from the whole row where not. Comparisons are negated so that NaN is kept."""
    n_latents = rank_BL.shape[1]
    first_flat_B1 = torch.arange(rank_BL.shape[0]).unsqueeze(1) * n_latents
    complete_B = candidate_BC[:, -1] < bound
    offered_BC = ~(candidate_BC < bound) & complete_B.unsqueeze(1)
    parts = [(first_flat_B1 + latent_idx_BC)[offered_BC]]
    incomplete_R = (~complete_B).nonzero().squeeze(1)
    if incomplete_R.shape[0]:
        row_N, latent_idx_N = (~(rank_BL[incomplete_R] < bound)).nonzero(as_tuple=True)
        parts.append(incomplete_R[row_N] * n_latents + latent_idx_N)
    return torch.cat(parts).sort().values
