"""The op set of a model whose encoder and decoder rows are spread over ranks.

Every rank is given the same batch and holds some rows of `W_enc` and `W_dec`; whatever has one number a latent (biases,
thresholds, norms) is whole everywhere, and so are selected latents and outputs. A rank encodes and decodes with its own rows;
what it selects of them, and adds to the output, goes to all. Selection is exact (`selection`), and of equal values the lowest
index wins, as in one process. Where nothing is selected, each rank keeps the latents of its own rows (`SpreadLatents`), and
what is summed over latents is summed over ranks.

Axes: B tokens · I, O flattened input and output dims · L latents · R rows of this rank · k kept per token · K offered per token ·
C candidates · N stored entries · S prefixes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from crosscode_kernels import AnyBackend, OpSet
from crosscode_kernels.backend import Backend, resolve
from crosscode_kernels.checks import acc_dtype
from crosscode_kernels.decoder_norms import DecoderNorms
from crosscode_kernels.recon_loss import ReconLoss
from crosscode_kernels.selection.torch_impl import first_of_equal_topk, row_topk
from crosscode_kernels.sparse import DenseLatents, Latents, SparseLatents
from crosscode_kernels.step_l0 import StepL0
from torch import Tensor

from crosscode.parallel.group import Group, gathered, shared, summed
from crosscode.parallel.latents import Piece, SpreadLatents
from crosscode.parallel.selection import collected, kept_of_all, largest_of_all


class ShardedOps(OpSet):
    """The ops that look at weights, of which this rank holds the rows `own` of `n_latents`. All others are the local ones."""

    def __init__(self, group: Group, n_latents: int, backend: AnyBackend, device: torch.device, dtype: torch.dtype):
        self.backend, self.group, self.n_latents = resolve(backend, device, dtype), group, n_latents
        self.own = slice(*group.bounds(n_latents))
        self.local = self.of_rows = OpSet(self.backend)
        if self.own.start == self.own.stop:  # kernels take no weights without rows
            self.of_rows = OpSet(Backend("reference"))

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return getattr(self.local, name)

    # ---- encoders

    def encode_topk(self, x_BI: Tensor, W_enc_RI: Tensor, b_enc_L: Tensor | None, k: int) -> Latents:
        x_BI, b_enc_L, b_R = self._inputs(x_BI, b_enc_L)
        found = self.of_rows.encode_topk(x_BI, W_enc_RI, b_R, min(k, W_enc_RI.shape[0]))
        return self._k_largest(found, k, x_BI, b_enc_L)

    def aux_topk(self, x_BI: Tensor, W_enc_RI: Tensor, b_enc_L: Tensor | None, dead_mask_L: Tensor, k: int) -> Latents:
        x_BI, b_enc_L, b_R = self._inputs(x_BI, b_enc_L)
        found = self.of_rows.aux_topk(x_BI, W_enc_RI, b_R, dead_mask_L[self.own], min(k, W_enc_RI.shape[0]))
        return self._k_largest(found, k, x_BI, b_enc_L)

    def encode_groupmax(self, x_BI: Tensor, W_enc_RI: Tensor, b_enc_L: Tensor | None, k: int) -> Latents:
        x_BI, b_enc_L, b_R = self._inputs(x_BI, b_enc_L)
        found = self.of_rows.encode_groupmax(x_BI, W_enc_RI, b_R, k // self.group.size)  # groups do not cross ranks
        return self._k_largest(found, k, x_BI, b_enc_L)

    def encode_batch_topk(
        self, x_BI: Tensor, W_enc_RI: Tensor, b_enc_L: Tensor | None, k: int, rank_scale_L: Tensor | None = None
    ) -> Latents:
        n_tokens, L = x_BI.shape[0], self.n_latents
        x_BI, b_enc_L, b_R = self._inputs(x_BI, b_enc_L)
        scale_R = None if rank_scale_L is None else rank_scale_L[self.own].detach()
        k_own = min(k, W_enc_RI.shape[0])
        found = self.of_rows.encode_batch_topk(x_BI, W_enc_RI, b_R, k_own, scale_R)  # no more of them can be kept
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
        return self._spread(self.of_rows.encode_threshold(x_BI, W_enc_RI, b_R, threshold, scale_R))

    def encode_relu(self, x_BI: Tensor, W_enc_RI: Tensor, b_enc_L: Tensor | None) -> Latents:
        x_BI, b_enc_L, b_R = self._inputs(x_BI, b_enc_L)
        return self._spread(self.of_rows.encode_relu(x_BI, W_enc_RI, b_R))

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
        found = self.of_rows.encode_jumprelu(x_BI, W_enc_RI, b_R, t_R, eps, ste, input_gradient=input_gradient)
        return self._spread(found, t_R)

    # ---- decoders

    def sparse_decode(self, latents: Latents, W_dec_RO: Tensor, b_dec_O: Tensor | None = None) -> Tensor:
        y_BO = self.of_rows.sparse_decode(self._own_latents(latents), W_dec_RO, None)
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

    def grouped_decode(
        self,
        latents_S: Sequence[Latents],
        W_S: Sequence[Tensor],
        b_dec_O: Tensor | None,
        first_S: Sequence[int],
        n_out: int,
    ) -> Tensor:
        own_S = [self._own_latents(latents) for latents in latents_S]
        y_BO = self.local.grouped_decode(own_S, W_S, None, first_S, n_out)
        y_BO = summed(self.group, _tied(y_BO, *(latents.value for latents in latents_S)))
        return y_BO if b_dec_O is None else y_BO + b_dec_O

    def nested_decode(self, latents: Latents, W_dec_RO: Tensor, b_dec_O: Tensor | None, sizes: Sequence[int]) -> Tensor:
        n_rows = W_dec_RO.shape[0]
        own_sizes = [min(max(size - self.own.start, 0), n_rows) for size in sizes]
        some = sorted({size for size in own_sizes if size})
        y_BSO = latents.value.new_zeros(latents.batch_size, len(sizes), W_dec_RO.shape[1])
        if some:
            found_BSO = self.of_rows.nested_decode(self._own_latents(latents), W_dec_RO, None, some)
            none_BO = y_BSO[:, 0].to(found_BSO.dtype)
            y_BSO = torch.stack([found_BSO[:, some.index(size)] if size else none_BO for size in own_sizes], 1)
        y_BSO = summed(self.group, _tied(y_BSO, latents.value))
        return y_BSO if b_dec_O is None else y_BSO + b_dec_O

    def dead_recon_loss(
        self,
        x_BI: Tensor,
        W_enc_RI: Tensor,
        b_enc_L: Tensor | None,
        dead_mask_L: Tensor,
        k: int,
        W_dec_RO: Tensor,
        residual_BO: Tensor,
        *,
        sparse_grad: bool = False,
    ) -> Tensor:
        latents = self.aux_topk(x_BI, W_enc_RI, b_enc_L, dead_mask_L, k)
        return self.decode_recon_loss(latents, W_dec_RO, None, -residual_BO, [residual_BO.shape[1]]).loss

    def decoder_norms(self, W_dec_RO: Tensor, segments: Sequence[int], mode: str) -> DecoderNorms:
        norms = self.of_rows.decoder_norms(W_dec_RO, segments, mode)
        return DecoderNorms(*(gathered(self.group, rows, self.n_latents) for rows in norms))

    # ---- what is summed over latents

    def weighted_l1(self, latents: Latents, n_L: Tensor, lambda_L: Tensor) -> Tensor:
        return self._over_latents("weighted_l1", latents, n_L, lambda_L)

    def weighted_tanh(self, latents: Latents, n_L: Tensor, lambda_L: Tensor, c: float) -> Tensor:
        return self._over_latents("weighted_tanh", latents, n_L, lambda_L, c=c)

    def pre_act_penalty(self, latents: Latents, t_L: Tensor, n_L: Tensor, lambda_L: Tensor) -> Tensor:
        return self._over_latents("pre_act_penalty", latents, n_L, lambda_L, with_thresholds=True)

    def step_l0(self, latents: Latents, t_L: Tensor, eps: float) -> StepL0:
        assert isinstance(latents, SpreadLatents)
        ((own, n_latents, t_R),) = latents.pieces
        l0_B, firing_R = self.of_rows.step_l0(own, t_R, eps)
        return StepL0(summed(self.group, l0_B), gathered(self.group, firing_R, n_latents))

    def _over_latents(
        self, op: str, latents: Latents, n_L: Tensor, lambda_L: Tensor, *, with_thresholds: bool = False, **options: Any
    ) -> Tensor:
        """Norms are `decoder_norms`, of which a rank passes on the gradient of its own rows."""
        if not isinstance(latents, SpreadLatents):  # selected latents: the same everywhere
            return getattr(self.local, op)(latents, n_L, lambda_L, **options)
        losses = []
        for (own, _, t_R), vectors in latents.own_of_each(n_L, lambda_L):
            losses.append(getattr(self.of_rows, op)(own, *([t_R] if with_thresholds else []), *vectors, **options))
        return summed(self.group, torch.stack(losses).sum())

    # ---- gradients

    def total_norm(self, norms_P: Tensor, params: Sequence[Tensor]) -> Tensor:
        of_rows, of_all = norms_P.new_zeros(()), norms_P.new_zeros(())
        for square, param in zip(norms_P.square().unbind(), params, strict=True):
            (of_rows if getattr(param, "holds_own_rows", False) else of_all).add_(square)
        return (self.group.all_reduce_(of_rows) + of_all).sqrt()

    def rows_of(self, value_R: Tensor, latents_N: Tensor) -> Tensor:
        if not len(value_R):
            return self.group.all_reduce_(value_R.new_zeros(len(latents_N), *value_R.shape[1:]))
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

    def _spread(self, found: Latents, t_R: Tensor | None = None) -> SpreadLatents:
        return SpreadLatents(self.group, [Piece(found, self.n_latents, t_R)])

    def _own_latents(self, latents: Latents) -> Latents:
        if isinstance(latents, SpreadLatents) and len(latents.pieces) == 1:
            return latents.pieces[0].own
        return latents.slice_latents(self.own.start, self.own.stop)

    def _k_largest(self, found: Latents, k: int, *beside: Tensor | None) -> Latents:
        """Of what each rank has found, the k largest of each token."""
        n_tokens, k_most = found.batch_size, min(k, self.group.most_rows(self.n_latents))
        if isinstance(found, DenseLatents):
            row_BK = torch.zeros(n_tokens, 0, dtype=torch.int64, device=found.value_BL.device)
            if k_own := min(k, found.n_latents):
                row_BK = row_topk(found.value_BL.detach(), k_own)[1].long()
            value_BK = found.value_BL.gather(1, row_BK)
        else:
            n_found = found.value_N.shape[0] // max(n_tokens, 1)
            row_BK = found.latent_idx_N.long().view(n_tokens, n_found)
            value_BK = found.value_N.view(n_tokens, n_found)
        missing = (0, k_most - value_BK.shape[1])
        latent_BK = torch.nn.functional.pad(row_BK + self.own.start, missing, value=self.n_latents)
        value_BK = torch.nn.functional.pad(_tied(value_BK, *beside), missing)
        kept_Bk, latent_Bk = largest_of_all(self.group, value_BK.detach(), latent_BK, k)
        latent_Bk = latent_Bk.masked_fill(kept_Bk == 0, 0)  # padding
        latent_BK, order_BK = latent_BK.sort(dim=1)
        place_Bk = torch.searchsorted(latent_BK, latent_Bk).clamp(max=k_most - 1)
        is_own_Bk = (latent_BK.gather(1, place_Bk) == latent_Bk) & (kept_Bk != 0)
        # The same numbers, but a gradient passes to those of this rank.
        value_Bk = torch.where(is_own_Bk, value_BK.gather(1, order_BK.gather(1, place_Bk)), kept_Bk)
        return replace(SparseLatents.from_topk(latent_Bk, value_Bk, self.n_latents), padded=True)


def _tied(tensor: Tensor, *others: Tensor | None) -> Tensor:
    """The same numbers, in the graph behind `others` even where this rank made no use of them: all sum up their gradients."""
    for other in others:
        if other is not None and other.requires_grad and torch.is_grad_enabled():
            tensor = tensor + other.flatten()[:0].sum().to(tensor.dtype)
    return tensor


def _scaled(value: Tensor, scale: Tensor) -> Tensor:
    dtype = acc_dtype(value.dtype)
    return value.to(dtype) * scale.to(dtype)
