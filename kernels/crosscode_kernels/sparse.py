"""Latents of a batch: one idea, two forms.

Axes: B tokens · L latents · K entries per token · N stored entries of a sparse batch · L1, B1 one more than L, B.

An entry whose value is 0 is stored but not active: that keeps shapes fixed (`N = B * k`) where a token has fewer than
k positive pre-activations. Everything about latents counts an entry as active where its value is above 0. Where such
entries are padding (`padded`), they belong to no latent: sorted by latent they lie behind the last one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor


class LatentOrder(NamedTuple):
    """The transpose of a sparse batch: its entries sorted by latent, ties by position. Both int32.

    Entries `order_N[latent_ptr_L1[l] : latent_ptr_L1[l + 1]]` belong to latent l, in order of their tokens; those from
    `latent_ptr_L1[L]` on are padding.
    """

    order_N: Tensor
    latent_ptr_L1: Tensor


class Entries(NamedTuple):
    """A sparse batch as kernels take it: CSR over tokens, and its transpose, whose two tensors are empty where no gradient
    needs them. Indices are int32."""

    row_ptr_B1: Tensor
    latent_idx_N: Tensor
    value_N: Tensor
    order_N: Tensor
    latent_ptr_L1: Tensor

    @property
    def n_tokens(self) -> int:
        return self.row_ptr_B1.shape[0] - 1


@dataclass(frozen=True)
class DenseLatents:
    """`value_BL`, and what the encoder kept besides: the pre-activations `preacts_BL`; of a JumpReLU `deficit_L`, the sum over
    the batch of `relu(theta - h)` (then `preacts_BL` has no gradient), and `fired_L`, the firing counts; `active` holds the
    same latents in sparse form, without gradient, where the encoder found few of them, or a `Capacity` of them."""

    value_BL: Tensor
    preacts_BL: Tensor | None = None
    deficit_L: Tensor | None = None
    active: SparseLatents | Any | None = None
    fired_L: Tensor | None = None

    @property
    def value(self) -> Tensor:
        """The values, `(B, L)`."""
        return self.value_BL

    @property
    def preacts(self) -> Tensor | None:
        """The pre-activations `(B, L)`, if they were kept."""
        return self.preacts_BL

    @property
    def n_latents(self) -> int:
        """L."""
        return self.value_BL.shape[1]

    @property
    def batch_size(self) -> int:
        """B."""
        return self.value_BL.shape[0]

    def to_dense(self) -> Tensor:
        """`(B, L)`."""
        return self.value_BL

    def l0_B(self) -> Tensor:
        """Number of active latents of each token, int64."""
        return (self.value_BL > 0).sum(1)

    def firing_counts_L(self) -> Tensor:
        """Number of tokens on which each latent is active, int64."""
        return (self.value_BL > 0).sum(0) if self.fired_L is None else self.fired_L

    def max_L(self) -> Tensor:
        """Largest value of each latent, 0 where it is never active."""
        value_BL = self.value_BL.detach()
        return torch.cat([value_BL, value_BL.new_zeros(1, self.n_latents)]).amax(0)

    def columns_BN(self, latents_N: Tensor) -> Tensor:
        """Values of some latents, dense."""
        return self.value_BL[:, latents_N]

    def of_entries(self, value_L: Tensor) -> Tensor:
        """`[L]`: for each latent, that of it; there may be more of them behind the last latent."""
        return value_L[: self.n_latents]

    def places(self, stride: int) -> Tensor:
        """`token * stride + latent` of each of `value`, `[B, L]`, int64."""
        token_B, latent_L = (torch.arange(n, device=self.value.device) for n in (self.batch_size, self.n_latents))
        return token_B[:, None] * stride + latent_L

    def with_value(self, value: Tensor) -> DenseLatents:
        """The same with other values: `value` is `[B, L]`."""
        return replace(self, value_BL=value, fired_L=None, active=None)

    def smallest_positive(self, value: Tensor) -> Tensor:
        """Of what there is one of for each of `value`; a scalar, inf where none is."""
        return _smallest_positive(value)

    def slice_latents(self, start: int, stop: int) -> DenseLatents:
        """Latents `start <= l < stop`, numbered from 0."""
        return DenseLatents(self.value_BL[:, start:stop])

    def beside(self, layers: Sequence[Latents]) -> DenseLatents:
        """The latents of all `layers`, of which this is one, of the same tokens."""
        return DenseLatents(torch.cat([layer.to_dense() for layer in layers], 1))

    def above(self, parts: Sequence[Latents]) -> DenseLatents:
        """The tokens of all `parts`, of which this is one, of the same latents; detached."""
        return DenseLatents(torch.cat([part.to_dense().detach() for part in parts]))


@dataclass(frozen=True)
class SparseLatents:
    """CSR over tokens: entries `row_ptr_B1[b] : row_ptr_B1[b + 1]` belong to token b, latent ids ascending or in
    order of selection. `value_N` carries the gradient; `n_latents` is L. `row_ptr_B1` and `latent_idx_N` are int32.

    `by_latent` is the transpose, where somebody has computed it: encoders do so whenever a weight gradient will need
    it, so that the encoder, the decoder and the trackers share one sort. `deficit_L` is there for a JumpReLU: the sum
    over the batch of `relu(theta - h)`, all latents included, and `preacts_N`, those of its entries, without gradient.
    `padded`: entries of value 0 are padding, to whose values no gradient is wanted.
    """

    row_ptr_B1: Tensor
    latent_idx_N: Tensor
    value_N: Tensor
    n_latents: int
    by_latent: LatentOrder | None = None
    deficit_L: Tensor | None = None
    padded: bool = False
    preacts_N: Tensor | None = None

    @classmethod
    def none(cls, n_tokens: int, n_latents: int, like: Tensor) -> SparseLatents:
        """A batch without entries, of the dtype and device of `like`, a tensor `[...]`."""
        indices_B1 = torch.zeros(n_tokens + 1, dtype=torch.int32, device=like.device)
        return cls(indices_B1, indices_B1[:0], like.new_empty(0), n_latents)

    @classmethod
    def from_topk(cls, latent_idx_BK: Tensor, value_BK: Tensor, n_latents: int) -> SparseLatents:
        """Uniform rows: K entries for each token."""
        n_tokens, k = latent_idx_BK.shape
        row_ptr_B1 = torch.arange(n_tokens + 1, dtype=torch.int32, device=value_BK.device) * k
        return cls(row_ptr_B1, latent_idx_BK.reshape(-1).int(), value_BK.reshape(-1), n_latents)

    @classmethod
    def from_dense(cls, value_BL: Tensor) -> SparseLatents:
        """Ragged rows: every entry that is not 0, latent ids ascending. Differentiable. Waits for the device: the
        number of entries depends on the data."""
        token_idx_N, latent_idx_N = (value_BL != 0).nonzero(as_tuple=True)
        return cls.from_pairs(
            token_idx_N, latent_idx_N, value_BL[token_idx_N, latent_idx_N], value_BL.shape[0], value_BL.shape[1]
        )

    @classmethod
    def from_pairs(
        cls, token_idx_N: Tensor, latent_idx_N: Tensor, value_N: Tensor, n_tokens: int, n_latents: int
    ) -> SparseLatents:
        """Ragged rows from entries that are sorted by token."""
        tokens_B1 = torch.arange(n_tokens + 1, device=token_idx_N.device, dtype=token_idx_N.dtype)
        row_ptr_B1 = torch.searchsorted(token_idx_N.contiguous(), tokens_B1, out_int32=True)
        return cls(row_ptr_B1, latent_idx_N.int(), value_N, n_latents)

    @property
    def value(self) -> Tensor:
        """The values `(N,)` of the stored entries; a gradient passes through them."""
        return self.value_N

    @property
    def preacts(self) -> Tensor | None:
        """The pre-activations `(N,)` of the stored entries, if they were kept."""
        return self.preacts_N

    @property
    def batch_size(self) -> int:
        """B."""
        return self.row_ptr_B1.shape[0] - 1

    def entries(self, order: LatentOrder | None) -> Entries:
        """What kernels take, with the given transpose."""
        nothing = self.latent_idx_N.new_empty(0)
        return Entries(self.row_ptr_B1, self.latent_idx_N, self.value_N, *(order or (nothing, nothing)))

    def token_idx_N(self) -> Tensor:
        """Token of each entry, int64."""
        counts_B = self.row_ptr_B1.diff().long()
        return torch.repeat_interleave(counts_B, output_size=self.value_N.shape[0])

    def to_dense(self) -> Tensor:
        """`value_BL` with zeros elsewhere; differentiable."""
        dense_BL = self.value_N.new_zeros(self.batch_size, self.n_latents)
        return dense_BL.index_put((self.token_idx_N(), self.latent_idx_N.long()), self.value_N, accumulate=True)

    def l0_B(self) -> Tensor:
        """Number of active latents of each token, int64."""
        active_N = (self.value_N > 0).long()
        return active_N.new_zeros(self.batch_size).index_add(0, self.token_idx_N(), active_N)

    def firing_counts_L(self) -> Tensor:
        """Number of tokens on which each latent is active, int64."""
        active_N = (self.value_N > 0).long()
        return active_N.new_zeros(self.n_latents).index_add(0, self.latent_idx_N.long(), active_N)

    def max_L(self) -> Tensor:
        """Largest value of each latent, 0 where it is never active."""
        value_N = self.value_N.detach()
        return value_N.new_zeros(self.n_latents).scatter_reduce(0, self.latent_idx_N.long(), value_N, "amax")

    def columns_BN(self, latents_N: Tensor) -> Tensor:
        """Values of some latents, each named once, dense."""
        column_L = latents_N.new_full((self.n_latents,), -1)
        column_L[latents_N] = torch.arange(latents_N.shape[0], device=latents_N.device)
        column_N = column_L[self.latent_idx_N.long()]
        keep_N = column_N >= 0
        dense_BN = self.value_N.new_zeros(self.batch_size, latents_N.shape[0])
        return dense_BN.index_put((self.token_idx_N()[keep_N], column_N[keep_N]), self.value_N[keep_N], accumulate=True)

    def of_entries(self, value_L: Tensor) -> Tensor:
        """`[N]`: for each of `value`, that of its latent."""
        return value_L[self.latent_idx_N.long()]

    def places(self, stride: int) -> Tensor:
        """`token * stride + latent` of each of `value`, `[N]`, int64."""
        return self.token_idx_N() * stride + self.latent_idx_N.long()

    def with_value(self, value: Tensor) -> SparseLatents:
        """The same with other values: `value` is `[N]`."""
        return replace(self, value_N=value)

    def smallest_positive(self, value: Tensor) -> Tensor:
        """Of what there is one of for each of `value`; a scalar, inf where none is."""
        return _smallest_positive(value)

    def transpose(self) -> LatentOrder:
        """Entries sorted by latent: `by_latent` where it is there, else one stable sort."""
        if self.by_latent is not None:
            return self.by_latent
        sorted_N, order_N = torch.sort(self.sort_key_N().long(), stable=True)
        bounds_L1 = torch.arange(self.n_latents + 1, device=sorted_N.device)
        return LatentOrder(order_N.int(), torch.searchsorted(sorted_N, bounds_L1, out_int32=True))

    def sort_key_N(self) -> Tensor:
        """By what entries are sorted: their latent, and a latent beyond the last for padding."""
        return padding_last(self.latent_idx_N, self.value_N, self.n_latents) if self.padded else self.latent_idx_N

    def with_int32(self) -> SparseLatents:
        """The same latents with int32 indices, for those that were made by hand with int64 ones."""
        if self.row_ptr_B1.dtype == self.latent_idx_N.dtype == torch.int32:
            return self
        return replace(self, row_ptr_B1=self.row_ptr_B1.int(), latent_idx_N=self.latent_idx_N.int())

    def with_transpose(self) -> SparseLatents:
        """The same latents, their transpose at hand."""
        return self if self.by_latent is not None else replace(self, by_latent=self.transpose())

    def slice_latents(self, start: int, stop: int) -> SparseLatents:
        """Latents `start <= l < stop`, numbered from 0: the share of a process that holds those rows.

        Shapes do not depend on the data: entries of other latents stay stored, at index 0 with value 0.

        Raises:
            ValueError: no such range.
        """
        if not 0 <= start <= stop <= self.n_latents:
            raise ValueError(f"slice_latents: {start}:{stop} is not a range within the {self.n_latents} latents")
        if start == stop:
            return SparseLatents.none(self.batch_size, 0, self.value_N)
        inside_N = (self.latent_idx_N >= start) & (self.latent_idx_N < stop)
        latent_idx_N = torch.where(inside_N, self.latent_idx_N - start, 0)
        value_N = torch.where(inside_N, self.value_N, 0)
        return SparseLatents(self.row_ptr_B1, latent_idx_N, value_N, stop - start, padded=True)


def _smallest_positive(value: Tensor) -> Tensor:
    return value.masked_fill(value <= 0, math.inf).amin() if value.numel() else value.new_full((), math.inf)


def padding_last(latent_idx_N: Tensor, value_N: Tensor, n_latents: int) -> Tensor:
    """The latent of each entry, and `n_latents` for those of value 0."""
    return latent_idx_N.masked_fill(value_N == 0, n_latents)


Latents = DenseLatents | SparseLatents
