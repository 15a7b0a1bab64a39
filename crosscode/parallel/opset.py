"""The op set of a model whose encoder and decoder rows are spread over ranks.

Every rank is given the same batch and holds some rows of `W_enc` and `W_dec`; whatever has one number a latent or an entry
(biases, thresholds, norms, selected latents) is whole everywhere, and so are outputs. A rank encodes and decodes with its own
rows; what it selects of them, and adds to the output, goes to all. Selection is exact, and of equal values the lowest index
wins, as in one process: the k largest latents of a token are among the k largest of each rank; those of a batch are found by
histograms (`selection`).

Axes: B tokens · I, O flattened input and output dims · L latents · R rows of this rank · K kept per token · C candidates ·
N stored entries · S prefixes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from crosscode_kernels import AnyBackend, OpSet
from crosscode_kernels.backend import resolve
from crosscode_kernels.checks import acc_dtype
from crosscode_kernels.decoder_norms import DecoderNorms
from crosscode_kernels.recon_loss import ReconLoss
from crosscode_kernels.selection.torch_impl import first_of_equal_topk, row_topk
from crosscode_kernels.sparse import DenseLatents, Latents, SparseLatents
from torch import Tensor

from crosscode.parallel.group import Group, gathered, shared, summed
from crosscode.parallel.selection import collected, kept_of_all


class ShardedOps(OpSet):
    """The ops that look at weights, of which this rank holds the rows `own` of `n_latents`. All others are the local ones."""

    def __init__(self, group: Group, n_latents: int, backend: AnyBackend, device: torch.device, dtype: torch.dtype):
        # Dense where that depends on what is measured: ranks must agree, and measure different latents.
        self.local = OpSet(replace(resolve(backend, device, dtype), sparse_below=0.0))
        self.backend, self.group, self.n_latents = self.local.backend, group, n_latents
        self.own = slice(*group.bounds(n_latents))

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return getattr(self.local, name)

    # ---- encoders

    def encode_topk(self, x_BI: Tensor, W_enc_RI: Tensor, b_enc_L: Tensor | None, k: int) -> Latents:
        x_BI, b_enc_L, b_R = self._inputs(x_BI, b_enc_L)
        found = self.local.encode_topk(x_BI, W_enc_RI, b_R, min(k, W_enc_RI.shape[0]))
        return self._k_largest(found, k, x_BI, b_enc_L)

    def aux_topk(self, x_BI: Tensor, W_enc_RI: Tensor, b_enc_L: Tensor | None, dead_mask_L: Tensor, k: int) -> Latents:
        x_BI, b_enc_L, b_R = self._inputs(x_BI, b_enc_L)
        found = self.local.aux_topk(x_BI, W_enc_RI, b_R, dead_mask_L[self.own], min(k, W_enc_RI.shape[0]))
        return self._k_largest(found, k, x_BI, b_enc_L)

    def encode_groupmax(self, x_BI: Tensor, W_enc_RI: Tensor, b_enc_L: Tensor | None, k: int) -> Latents:
        x_BI, b_enc_L, b_R = self._inputs(x_BI, b_enc_L)
        found = self.local.encode_groupmax(x_BI, W_enc_RI, b_R, k // self.group.size)  # groups do not cross ranks
        return self._k_largest(found, k, x_BI, b_enc_L)

    def encode_batch_topk(
        self, x_BI: Tensor, W_enc_RI: Tensor, b_enc_L: Tensor | None, k: int, rank_scale_L: Tensor | None = None
    ) -> Latents:
        n_tokens, L = x_BI.shape[0], self.n_latents
        x_BI, b_enc_L, b_R = self._inputs(x_BI, b_enc_L)
        scale_R = None if rank_scale_L is None else rank_scale_L[self.own].detach()
        k_own = min(k, W_enc_RI.shape[0])
        found = self.local.encode_batch_topk(x_BI, W_enc_RI, b_R, k_own, scale_R)  # no more of them can be kept
        if isinstance(found, DenseLatents):
            rank_BR = found.value_BL.detach() if scale_R is None else _scaled(found.value_BL.detach(), scale_R)
            flat_C = first_of_equal_topk(rank_BR.flatten(), k_own * n_tokens)
            token_C, row_C = flat_C // rank_BR.shape[1], flat_C % rank_BR.shape[1]
            value_C = found.value_BL[token_C, row_C]
        else:
            token_C, row_C, value_C = found.token_idx_N(), found.latent_idx_N.long(), found.value_N
        rank_C = value_C.detach() if scale_R is None else _scaled(value_C.detach(), scale_R[row_C])
        place_C = token_C * L + row_C + self.own.start
        kept_C = kept_of_all(self.group, rank_C, place_C, k * n_tokens, n_tokens * L)
        value_C = _tied(value_C, x_BI, b_enc_L)
        value_N, place_N = collected(self.group, kept_C, value_C, place_C, k * n_tokens)
        entries = SparseLatents.from_pairs(place_N // L, place_N % L, value_N, n_tokens, L)
        return replace(entries, padded=True)

    def encode_threshold(
        self,
        x_BI: Tensor,
        W_enc_RI: Tensor,
        b_enc_L: Tensor | None,
        threshold: Tensor,
        rank_scale_L: Tensor | None = None,
    ) -> Latents:
        x_BI, b_enc_L, b_R = self._inputs(x_BI, b_enc_L)
        scale_R = None if rank_scale_L is None else rank_scale_L[self.own]
        return self._all_columns(self.local.encode_threshold(x_BI, W_enc_RI, b_R, threshold, scale_R), x_BI, b_enc_L)

    def encode_relu(self, x_BI: Tensor, W_enc_RI: Tensor, b_enc_L: Tensor | None) -> Latents:
        x_BI, b_enc_L, b_R = self._inputs(x_BI, b_enc_L)
        return self._all_columns(self.local.encode_relu(x_BI, W_enc_RI, b_R), x_BI, b_enc_L)

    def encode_jumprelu(
        self,
        x_BI: Tensor,
        W_enc_RI: Tensor,
        b_enc_L: Tensor | None,
        t_L: Tensor,
        eps: float,
        ste: str,
        *,
        input_gradient: bool = False,
    ) -> Latents:
        x_BI, b_enc_L, b_R, t_L = self._inputs(x_BI, b_enc_L, t_L)
        t_R = t_L[self.own]
        found = self.local.encode_jumprelu(x_BI, W_enc_RI, b_R, t_R, eps, ste, input_gradient=input_gradient)
        return self._all_columns(found, x_BI, b_enc_L, t_L)

    # ---- decoders

    def sparse_decode(self, latents: Latents, W_dec_RO: Tensor, b_dec_O: Tensor | None = None) -> Tensor:
        y_BO = self.local.sparse_decode(self._own_latents(latents), W_dec_RO, None)
        y_BO = summed(self.group, _tied(y_BO, latents.value))
        return y_BO if b_dec_O is None else y_BO + b_dec_O

    def decode_recon_loss(
        self,
        latents: Latents,
        W_dec_RO: Tensor,
        b_dec_O: Tensor | None,
        target_BO: Tensor,
        segments: Sequence[int],
    ) -> ReconLoss:
        return self.local.recon_loss(self.sparse_decode(latents, W_dec_RO, b_dec_O), target_BO, segments)

    def nested_decode(self, latents: Latents, W_dec_RO: Tensor, b_dec_O: Tensor | None, sizes: Sequence[int]) -> Tensor:
        n_rows = W_dec_RO.shape[0]
        own_sizes = [min(max(size - self.own.start, 0), n_rows) for size in sizes]
        some = sorted({size for size in own_sizes if size})
        y_BSO = latents.value.new_zeros(latents.batch_size, len(sizes), W_dec_RO.shape[1])
        if some:
            found_BSO = self.local.nested_decode(self._own_latents(latents), W_dec_RO, None, some)
            none_BO = y_BSO[:, 0].to(found_BSO.dtype)
            y_BSO = torch.stack([found_BSO[:, some.index(size)] if size else none_BO for size in own_sizes], 1)
        y_BSO = summed(self.group, _tied(y_BSO, latents.value))
        return y_BSO if b_dec_O is None else y_BSO + b_dec_O

    def dead_decode(
        self,
        x_BI: Tensor,
        W_enc_RI: Tensor,
        b_enc_L: Tensor | None,
        dead_mask_L: Tensor,
        k: int,
        W_dec_RO: Tensor,
        *,
        sparse_grad: bool = False,
    ) -> Tensor:
        return self.sparse_decode(self.aux_topk(x_BI, W_enc_RI, b_enc_L, dead_mask_L, k), W_dec_RO)

    def decoder_norms(self, W_dec_RO: Tensor, segments: Sequence[int], mode: str) -> DecoderNorms:
        norms = self.local.decoder_norms(W_dec_RO, segments, mode)
        return DecoderNorms(*(gathered(self.group, rows, self.n_latents) for rows in norms))

    # ---- gradients

    def total_norm(self, norms_P: Tensor, params: Sequence[Tensor]) -> Tensor:
        is_part_P = torch.tensor([getattr(param, "holds_own_rows", False) for param in params]).to(norms_P.device)
        squares_P = norms_P.square()
        of_rows = self.group.all_reduce_((squares_P * is_part_P).sum())
        return (of_rows + (squares_P * ~is_part_P).sum()).sqrt()

    def rows_of(self, value_R: Tensor, latents_N: Tensor) -> Tensor:
        row_N = latents_N - self.own.start
        here_N = (row_N >= 0) & (row_N < value_R.shape[0])
        found_N = value_R[row_N.clamp(0, value_R.shape[0] - 1)]
        away_N = ~here_N.view(-1, *[1] * (found_N.dim() - 1))
        return self.group.all_reduce_(found_N.detach().masked_fill(away_N, 0))

    # ---- what goes in and out

    def _inputs(self, x_BI: Tensor, b_enc_L: Tensor | None, *vectors_L: Tensor) -> list[Any]:
        """What is whole everywhere, and the own rows of `b_enc_L` behind it."""
        x_BI, b_enc_L, *vectors = shared(self.group, (x_BI, b_enc_L, *vectors_L))  # pyright: ignore[reportAssignmentType]
        return [x_BI, b_enc_L, None if b_enc_L is None else b_enc_L[self.own], *vectors]

    def _own_latents(self, latents: Latents) -> Latents:
        if isinstance(latents, DenseLatents):
            return DenseLatents(latents.value_BL[:, self.own])
        return latents.slice_latents(self.own.start, self.own.stop)

    def _k_largest(self, found: Latents, k: int, *beside: Tensor | None) -> Latents:
        """Of what each rank has found, the k largest of each token."""
        n_tokens, k_most = found.batch_size, min(k, self.group.most_rows(self.n_latents))
        if isinstance(found, DenseLatents):
            row_BK = row_topk(found.value_BL.detach(), min(k, found.n_latents))[1].long()
            value_BK = found.value_BL.gather(1, row_BK)
        else:
            n_found = found.value_N.shape[0] // max(n_tokens, 1)
            row_BK = found.latent_idx_N.long().view(n_tokens, n_found)
            value_BK = found.value_N.view(n_tokens, n_found)
        value_BC, latent_BC = self._candidates(value_BK, row_BK + self.own.start, k_most, *beside)
        kept_BK = _largest(value_BC.detach(), latent_BC, k)
        kept = SparseLatents.from_topk(latent_BC.gather(1, kept_BK), value_BC.gather(1, kept_BK), self.n_latents)
        return replace(kept, padded=True)

    def _candidates(
        self, value_BK: Tensor, index_BK: Tensor, n_most: int, *beside: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """`value_BC, index_BC` of all ranks, each filled up with zeros to `n_most` of a row."""
        missing = (0, n_most - value_BK.shape[1])
        value_BK = torch.nn.functional.pad(_tied(value_BK, *beside), missing)
        index_BK = torch.nn.functional.pad(index_BK, missing)
        value_CB = gathered(self.group, value_BK.T, n_most * self.group.size)
        return value_CB.T, torch.cat(self.group.all_gather(index_BK.int()), 1).long()

    def _all_columns(self, found: Latents, *beside: Tensor | None) -> DenseLatents:
        def of_all(part_BR: Tensor | None) -> Tensor | None:
            if part_BR is None or part_BR.dim() == 1:
                return None if part_BR is None else gathered(self.group, part_BR, self.n_latents)
            return gathered(self.group, part_BR.T, self.n_latents).T.contiguous()

        value_BL = of_all(_tied(found.to_dense(), *beside))
        assert value_BL is not None
        if isinstance(found, SparseLatents):
            return DenseLatents(value_BL)
        return DenseLatents(value_BL, of_all(found.preacts_BL), of_all(found.deficit_L))


def _tied(tensor: Tensor, *others: Tensor | None) -> Tensor:
    """The same numbers, in the graph behind `others` even where this rank made no use of them: all sum up their gradients."""
    for other in others:
        if other is not None and other.requires_grad and torch.is_grad_enabled():
            tensor = tensor + other.flatten()[:0].sum().to(tensor.dtype)
    return tensor


def _scaled(value: Tensor, scale: Tensor) -> Tensor:
    dtype = acc_dtype(value.dtype)
    return value.to(dtype) * scale.to(dtype)


def _largest(rank_BC: Tensor, index_BC: Tensor, k: int) -> Tensor:
    """Where the k largest of each row stand (no negative values); of equal ones the lowest index."""
    if rank_BC.dtype != torch.float64:
        bits_BC = rank_BC.float().abs().view(torch.int32).long()
        return ((bits_BC << 32) | (0xFFFFFFFF - index_BC)).topk(k, dim=1).indices
    by_index_BC = index_BC.argsort(dim=1, stable=True)
    order_BC = rank_BC.gather(1, by_index_BC).sort(dim=1, descending=True, stable=True).indices
    return by_index_BC.gather(1, order_BC)[:, :k]
