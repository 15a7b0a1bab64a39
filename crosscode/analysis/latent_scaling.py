"""Latent scaling: how much of each model a latent explains (Minder et al. 2025, arXiv:2504.02922, section 3).

Axes: B tokens · X output crosscoding positions · D width · L latents · N active entries of a batch · K entries of a token ·
S sums that are kept.

Two positions a and b along (M, P). The owner of a latent is the one of the two with the larger decoder norm; d is the
owner's decoder vector. For a target y with one row per token, the best scalar in `y ~ beta f d` is

    beta = d . (Y^T f) / (||f||^2 ||d||^2)

and is taken for both positions' errors (with the latent's own contribution left out of the reconstruction, so that the
owner's error is the part that the latent was there to explain) and reconstructions, and for the activations themselves
less their mean. `nu = beta(other) / beta(owner)`: near 0 where the latent means nothing to the other model, near 1 where it
explains both equally well, whatever the decoder norms say. Of two models with equal activations the last ratio is 1.

A latent may write another vector to the other position. `returned` is the share that the owner has of that one: where it is
near 1, the owner has what the other has, and more.

Models of different width have no direction in common. There d is each position's own decoder vector, at the owner's length, and
`returned` is undefined.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from crosscode.analysis.encoded import EncodedBatch
from crosscode.analysis.geometry import decoder_vectors_LXD
from crosscode.groups import ByGroup, Groupings
from crosscode.models.base import BaseCrosscoder

THRESHOLD = 2 / 3
"""A latent is specific to its owner where nu of the error, the reconstruction and the activations are surely below this. On
pairs that nothing tells apart nu is hardly ever below 0.8 (`benches/diffing_null.py`)."""
RETURNED = 0.5
"""The owner has what a latent writes to the other position where nu of that is surely above this."""


@dataclass(frozen=True)
class Share:
    """What the other position has of the owner's share in one target; float64, NaN for latents that did not fire."""

    beta_L2: Tensor
    """column 0 is position a, column 1 position b"""
    nu_L: Tensor
    owner_z_L: Tensor
    """by how many standard errors the owner's own share is above 0"""
    below_z_L: Tensor
    """by how many standard errors nu is below `THRESHOLD` (`returned`: `RETURNED`)"""


@dataclass(frozen=True)
class LatentScalingResult:
    """float64; NaN for latents that did not fire. Standard errors take tokens as independent."""

    error: Share
    reconstruction: Share
    activation: Share
    returned: Share
    """of the activations along the other's decoder vector: what the owner has of it; NaN where that vector is 0"""
    owner_L: Tensor
    """0 where a owns the latent, 1 where b does"""
    effect_L: Tensor
    """root mean square, where the latent fires, of the vector along d that the owner has and the other lacks"""
    difference: float
    """squared difference of the two positions' activations, in their variance; NaN for different widths"""

    @property
    def shares(self) -> dict[str, Share]:
        """By target."""
        return {"error": self.error, "reconstruction": self.reconstruction, "activations": self.activation}


class _Sums:
    """Over some tokens."""

    def __init__(self, n_latents: int, width: int):
        self.of_entries_LS = torch.zeros(n_latents, 27, dtype=torch.float64)
        self.target_2D = torch.zeros(2, width, dtype=torch.float64)
        self.target_square, self.difference_square, self.n_tokens = 0.0, 0.0, 0

    def add_targets(self, target_B2D: Tensor) -> None:
        self.target_2D += target_B2D.sum(0).cpu()
        self.target_square += float(target_B2D.square().sum())
        self.difference_square += float(target_B2D.diff(dim=1).square().sum())
        self.n_tokens += target_B2D.shape[0]


class LatentScaling:
    """Collects the sums behind the betas and their errors, in all and for each group of tokens: a few numbers per latent, and
    nothing of size B x L."""

    def __init__(
        self, model: BaseCrosscoder, a: int, b: int, max_entries: int = 1 << 14, groupings: Groupings | None = None
    ):
        self.positions = (a, b)
        self._max_entries = max_entries
        W_pair_L2D = decoder_vectors_LXD(model)[:, [a, b]]
        norms_L2 = W_pair_L2D.norm(dim=-1)
        owner_L = norms_L2.argmax(1)
        own_first_L2 = torch.stack([owner_L, 1 - owner_L], 1)
        self._d_L2D = W_pair_L2D.gather(1, own_first_L2[..., None].expand_as(W_pair_L2D))
        self._is_apart = model.widths.apart(a, b)
        if self._is_apart:
            d_LD = (normalize(W_pair_L2D, dim=-1) * norms_L2.amax(1)[:, None, None]).flatten(1)
            self._d_L2D = torch.stack([d_LD, torch.zeros_like(d_LD)], 1)
            W_pair_L2D = _apart(W_pair_L2D)
        self._owner_L = owner_L.cpu()
        self._d_dot_own_L2 = (W_pair_L2D.double() * self._d_L2D[:, :1].double()).sum(-1).cpu()
        make_sums = partial(_Sums, model.n_latents, W_pair_L2D.shape[2])
        self._sums, self._groups = make_sums(), ByGroup(groupings, make_sums)

    @torch.no_grad()
    def update(self, batch: EncodedBatch) -> None:
        entries, pair = batch.entries, list(self.positions)
        target_B2D, output_B2D = batch.target_BXD[:, pair], batch.output_BXD[:, pair]
        if self._is_apart:
            target_B2D, output_B2D = _apart(target_B2D), _apart(output_B2D)
        groups = list(self._groups.of(batch.group_BG))
        target_double_B2D = target_B2D.double()
        self._sums.add_targets(target_double_B2D)
        for sums, of_group_B in groups:
            sums.add_targets(target_double_B2D[of_group_B.to(target_B2D.device)])
        y_B4D = torch.cat([target_B2D - output_B2D, output_B2D], 1)
        count_B = torch.bincount(entries.token_N, minlength=y_B4D.shape[0])
        first_B = count_B.cumsum(0) - count_B
        if not len(entries.latent_N):
            return
        widest = int(count_B.max())
        step = max(1, self._max_entries // widest)
        for start in range(0, y_B4D.shape[0], step):
            tokens = slice(start, start + step)
            place_K = torch.arange(int(count_B[tokens].max()), device=count_B.device)
            is_entry_BK = place_K < count_B[tokens, None]
            index_BK = (first_B[tokens, None] + place_K).clamp(max=len(entries.latent_N) - 1)
            d_BK2D = self._d_L2D[entries.latent_N[index_BK]]
            dot_BK4 = d_BK2D[:, :, 0] @ y_B4D[tokens].transpose(1, 2)
            other_BK2 = d_BK2D[:, :, 1] @ target_B2D[tokens].transpose(1, 2)
            dot_N6 = torch.cat([dot_BK4, other_BK2], 2)[is_entry_BK].double().cpu()
            index_N = index_BK[is_entry_BK]
            latent_N, value_N = entries.latent_N[index_N].cpu(), entries.value_N[index_N].double().cpu()
            summands_NS = self._summands_NS(latent_N, value_N, dot_N6)
            self._sums.of_entries_LS.index_add_(0, latent_N, summands_NS)
            for sums, of_group_B in groups:
                own_N = of_group_B[entries.token_N[index_N].cpu()]
                sums.of_entries_LS.index_add_(0, latent_N[own_N], summands_NS[own_N])

    def _summands_NS(self, latent_N: Tensor, f_N: Tensor, dot_N6: Tensor) -> Tensor:
        """Of each entry 1, f, f^2; for errors, reconstructions and activations the products t of f with what they have along
        d, and of f with what activations have along the other's vector, at a and b, and t_a^2, t_b^2, t_a t_b; and f t of both
        kinds of activations."""
        weighted_N6 = dot_N6 * f_N[:, None]
        reconstruction_N2, returned_N2 = weighted_N6[:, 2:4], weighted_N6[:, 4:]
        activation_N2 = weighted_N6[:, :2] + reconstruction_N2
        # f (e + f d_x) . d: the own contribution is left out of the reconstruction
        error_N2 = weighted_N6[:, :2] + self._d_dot_own_L2[latent_N] * f_N[:, None].square()
        columns = [torch.ones_like(f_N), f_N, f_N.square()]
        for t_N2 in (error_N2, reconstruction_N2, activation_N2, returned_N2):
            columns += [*t_N2.T, *t_N2.T.square(), t_N2.prod(1)]
        return torch.stack([*columns, *(activation_N2 * f_N[:, None]).T, *(returned_N2 * f_N[:, None]).T], 1)

    def result(self) -> LatentScalingResult:
        return self._result(self._sums)

    def groups(self) -> dict[str, dict[str, LatentScalingResult]]:
        """The same of each group, by its kind and name, where there are several."""
        return self._groups.result(self._result)

    def _result(self, sums: _Sums) -> LatentScalingResult:
        n_L, f_L, ff_L, *columns = sums.of_entries_LS.T
        n_tokens = max(sums.n_tokens, 1)
        variance = (sums.target_square - float(sums.target_2D.square().sum()) / n_tokens) / 2
        error, reconstruction, activation, returned = (torch.stack(columns[i : i + 5], 1) for i in (0, 5, 10, 15))
        for side, sums_L5 in enumerate((activation, returned)):
            mean_L2 = self._d_L2D[:, side].double().cpu() @ (sums.target_2D / n_tokens).T
            _centre_(sums_L5, mean_L2, f_L, ff_L, torch.stack(columns[20 + 2 * side : 22 + 2 * side], 1))
        d_square_L = self._d_dot_own_L2.gather(1, self._owner_L[:, None]).squeeze(1)
        other_square_L = self._d_L2D[:, 1].double().square().sum(1).cpu()
        spread_L = ff_L - f_L.square() / n_tokens
        share = partial(_share, n_L=n_L, owner_L=self._owner_L)
        of_activation = share(activation, scale_L=spread_L * d_square_L)
        beta_L2 = of_activation.beta_L2.gather(1, torch.stack([self._owner_L, 1 - self._owner_L], 1))
        return LatentScalingResult(
            share(error, scale_L=ff_L * d_square_L),
            share(reconstruction, scale_L=ff_L * d_square_L),
            of_activation,
            _share(returned, n_L=n_L, owner_L=1 - self._owner_L, scale_L=spread_L * other_square_L, bound=RETURNED),
            self._owner_L,
            (beta_L2[:, 0] - beta_L2[:, 1]) * (ff_L / n_L * d_square_L).sqrt(),
            math.nan if self._is_apart else sums.difference_square / variance if variance > 0 else 0.0,
        )


def _apart(pair_B2D: Tensor) -> Tensor:
    """Two vectors `(B, 2, 2 D)` in coordinates of their own."""
    return torch.stack([pad(pair_B2D[:, 0], (0, pair_B2D.shape[-1])), pad(pair_B2D[:, 1], (pair_B2D.shape[-1], 0))], 1)


def _centre_(sums_L5: Tensor, mean_L2: Tensor, f_L: Tensor, ff_L: Tensor, ft_L2: Tensor) -> None:
    """Take the mean of the activations out of the sums of `_share`; `ft_L2` are sums of f t."""
    sums_L5[:, :2] -= f_L[:, None] * mean_L2
    sums_L5[:, 2:4] += mean_L2.square() * ff_L[:, None] - 2 * mean_L2 * ft_L2
    sums_L5[:, 4] += mean_L2.prod(1) * ff_L - (mean_L2 * ft_L2.flip(1)).sum(1)


def _share(sums_L5: Tensor, *, n_L: Tensor, owner_L: Tensor, scale_L: Tensor, bound: float = THRESHOLD) -> Share:
    """From the sums of t_a, t_b, t_a^2, t_b^2 and t_a t_b of each latent."""
    pair_L2 = torch.stack([owner_L, 1 - owner_L], 1)
    own_L, other_L = sums_L5[:, :2].gather(1, pair_L2).T
    own_square_L, other_square_L = sums_L5[:, 2:4].gather(1, pair_L2).T
    difference_square_L = bound**2 * own_square_L - 2 * bound * sums_L5[:, 4] + other_square_L
    return Share(
        sums_L5[:, :2] / scale_L[:, None],
        other_L / own_L,
        _z(own_L, own_square_L, n_L),
        _z(bound * own_L - other_L, difference_square_L, n_L),
    )


def _z(sum_L: Tensor, square_L: Tensor, n_L: Tensor) -> Tensor:
    """A sum over tokens in units of its standard error."""
    spread_L = (square_L - sum_L.square() / n_L).clamp(min=1e-12 * square_L) * n_L / (n_L - 1).clamp(min=1)
    return sum_L / spread_L.sqrt()
