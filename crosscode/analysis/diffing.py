"""Model diffing: one row per latent for any two output positions a and b along (M, P).

Axes: X output crosscoding positions (flattened) · D width · L latents.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from crosscode.analysis.encoded import EncodedBatch
from crosscode.analysis.geometry import decoder_vectors_LXD, encoder_vectors_LXD, given_LX, norms_and_cosine
from crosscode.analysis.latent_scaling import LatentScalingResult
from crosscode.errors import InputError
from crosscode.groups import ByGroup, Groupings
from crosscode.models.base import BaseCrosscoder
from crosscode.models.decoder_vectors import may_write_LX


class FiringStats:
    """Collects how often and how strongly each latent fires, in all and in each group of tokens.

    Args:
        groupings: ways to group tokens (by source, by role), each with the names of its groups by their numbers.
    """

    def __init__(self, n_latents: int, groupings: Groupings | None = None):
        self.n_tokens = 0
        self._groups = ByGroup(groupings, partial(FiringStats, n_latents))
        self.counts_L = torch.zeros(n_latents, dtype=torch.int64)
        self.max_L = torch.zeros(n_latents, dtype=torch.float32)
        self._sum_L = torch.zeros(n_latents, dtype=torch.float64)

    def update(self, batch: EncodedBatch) -> None:
        latent_N, value_N = batch.entries.latent_N.cpu(), batch.entries.value_N.float().cpu()
        self._add(latent_N, value_N, batch.position_B.shape[0])
        for own, of_group_B in self._groups.of(batch.group_BG):
            own_N = of_group_B[batch.entries.token_N.cpu()]
            own._add(latent_N[own_N], value_N[own_N], int(of_group_B.sum()))

    def _add(self, latent_N: Tensor, value_N: Tensor, n_tokens: int) -> None:
        self.n_tokens += n_tokens
        self.counts_L.index_add_(0, latent_N, torch.ones_like(latent_N))
        self.max_L.scatter_reduce_(0, latent_N, value_N, "amax")
        self._sum_L.index_add_(0, latent_N, value_N.double())

    def groups(self) -> dict[str, dict[str, FiringStats]]:
        """The same of each group, by its kind and name, where there are several."""
        return self._groups.result(lambda own: own)

    @property
    def density_L(self) -> Tensor:
        """Share of tokens on which each latent is active, float64."""
        return self.counts_L.double() / max(self.n_tokens, 1)

    @property
    def mean_active_L(self) -> Tensor:
        """Mean of each latent where it is active; 0 where it never is."""
        return self._sum_L / self.counts_L.clamp(min=1)


@dataclass(frozen=True)
class DiffTable:
    """What is measured of each latent at two output positions, float64 unless said otherwise.

    Norms are in the scale of training, where every position has the same mean activation norm. NaN: not defined (a
    cosine with a zero vector or between different widths; encoder columns where the encoder has no such positions).
    """

    name_a: str
    name_b: str
    decoder_norm_a: Tensor
    decoder_norm_b: Tensor
    relative_norm: Tensor
    """`n_b / (n_a + n_b)`: 0 = written to a alone, 0.5 = equally to both, 1 = to b alone"""
    decoder_cosine: Tensor
    encoder_norm_a: Tensor
    encoder_norm_b: Tensor
    encoder_cosine: Tensor
    firings: Tensor
    """int64: tokens on which the latent was active"""
    may_write_L2: Tensor
    """bool: whether the architecture can write the latent to a, to b"""
    given_L2: Tensor
    """bool: whether a partition of the dictionary lets it belong to a, to b"""
    tied_L: Tensor
    """bool: whether its decoder vectors are one and the same for all models"""
    scaling: LatentScalingResult | None
    """None: no pass over held-out text"""

    @property
    def n_latents(self) -> int:
        return self.relative_norm.shape[0]

    @property
    def effect_L(self) -> Tensor:
        """See `LatentScalingResult`."""
        return torch.full_like(self.relative_norm, math.nan) if self.scaling is None else self.scaling.effect_L


def as_cell(value: Any) -> Any:
    """Text as a spreadsheet may show it: none that it would run as a formula, no control characters."""
    if not isinstance(value, str):
        return value
    text = "".join(c if c.isprintable() else " " for c in value)
    return f"'{text}" if text.lstrip()[:1] in ("=", "+", "-", "@") else text


@torch.no_grad()
def diff_latents(
    model: BaseCrosscoder,
    names: list[str],
    a: int,
    b: int,
    firing: FiringStats | None = None,
    scaling: LatentScalingResult | None = None,
) -> DiffTable:
    """The diffing table of two output positions.

    Args:
        names: of the flattened output positions.
        a, b: indices into `names`; relative norms point from a (0) to b (1).
        firing, scaling: from a pass over held-out data.
    """
    n_positions = len(model.segments)
    if len(names) != n_positions:
        raise InputError(f"names: the model has {n_positions} output positions, got {len(names)} names")
    if a == b or not (0 <= a < n_positions and 0 <= b < n_positions):
        raise InputError(f"positions ({a}, {b}): need two different ones of {n_positions} ({', '.join(names)})")
    n_latents, nan_L = model.n_latents, torch.full((model.n_latents,), math.nan, dtype=torch.float64)
    norm_dec_L2, cos_dec_L = norms_and_cosine(decoder_vectors_LXD(model), a, b)
    W_enc_LXD = encoder_vectors_LXD(model)
    norm_enc_L2, cos_enc_L = (
        (nan_L[:, None].expand(-1, 2), nan_L) if W_enc_LXD is None else norms_and_cosine(W_enc_LXD, a, b)
    )
    pair = [a, b]
    if model.widths.apart(a, b):
        cos_dec_L = cos_enc_L = nan_L
    return DiffTable(
        name_a=names[a],
        name_b=names[b],
        decoder_norm_a=norm_dec_L2[:, 0],
        decoder_norm_b=norm_dec_L2[:, 1],
        relative_norm=norm_dec_L2[:, 1] / norm_dec_L2.sum(1),
        decoder_cosine=cos_dec_L,
        encoder_norm_a=norm_enc_L2[:, 0],
        encoder_norm_b=norm_enc_L2[:, 1],
        encoder_cosine=cos_enc_L,
        firings=(firing or FiringStats(n_latents)).counts_L,
        may_write_L2=may_write_LX(model)[:, pair],
        given_L2=given_LX(model)[:, pair],
        tied_L=torch.arange(n_latents) < model.n_shared_latents,
        scaling=scaling,
    )
