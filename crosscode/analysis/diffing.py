"""Model diffing: one row per latent for any two output positions a and b along (M, P).

Axes: X output crosscoding positions (flattened) · D width · L latents.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from crosscode.analysis.encoded import EncodedBatch
from crosscode.analysis.geometry import decoder_vectors_LXD, encoder_vectors_LXD, norms_and_cosine
from crosscode.analysis.latent_scaling import LatentScalingResult
from crosscode.errors import InputError
from crosscode.files import write_text
from crosscode.models.base import BaseCrosscoder

Tag = Literal["A-only", "shared", "B-only", "undefined"]
TAGS: tuple[Tag, ...] = ("A-only", "shared", "B-only", "undefined")
EXCLUSIVE_MARGIN = 0.1
"""A relative norm closer to 0 or 1 than this makes a latent A-only or B-only."""


class FiringStats:
    """Collects how often and how strongly each latent fires."""

    def __init__(self, n_latents: int):
        self.n_tokens = 0
        self.counts_L = torch.zeros(n_latents, dtype=torch.int64)
        self.max_L = torch.zeros(n_latents, dtype=torch.float32)
        self._sum_L = torch.zeros(n_latents, dtype=torch.float64)

    def update(self, batch: EncodedBatch) -> None:
        latent_N, value_N = batch.entries.latent_N.cpu(), batch.entries.value_N.float().cpu()
        self.n_tokens += batch.position_B.shape[0]
        self.counts_L.index_add_(0, latent_N, torch.ones_like(latent_N))
        self.max_L.scatter_reduce_(0, latent_N, value_N, "amax")
        self._sum_L.index_add_(0, latent_N, value_N.double())

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
    """Columns of the diffing table, one entry per latent, float64 unless said otherwise.

    Norms are in the scale of training, where every position has the same mean activation norm. NaN: not defined (a
    cosine with a zero vector; encoder columns where the encoder has no such positions; latent scaling of a silent
    latent, or where it was not measured).
    """

    name_a: str
    name_b: str
    decoder_norm_a: Tensor
    decoder_norm_b: Tensor
    relative_norm: Tensor
    """`n_b / (n_a + n_b)`: 0 = only in a, 0.5 = equally in both, 1 = only in b"""
    decoder_cosine: Tensor
    encoder_norm_a: Tensor
    encoder_norm_b: Tensor
    encoder_cosine: Tensor
    tag: list[Tag]
    firings: Tensor
    """int64: tokens on which the latent was active"""
    density: Tensor
    max_activation: Tensor
    beta_error_a: Tensor
    beta_error_b: Tensor
    beta_reconstruction_a: Tensor
    beta_reconstruction_b: Tensor
    nu_error: Tensor
    """`beta(other) / beta(owner)` of the error; the owner is the position with the larger decoder norm"""
    nu_reconstruction: Tensor

    @property
    def n_latents(self) -> int:
        return self.relative_norm.shape[0]

    def columns(self) -> list[str]:
        """Names of the per-latent columns, as they stand in an export."""
        return ["latent", *(f.name for f in fields(self) if f.name not in ("name_a", "name_b"))]

    def row(self, latent: int) -> dict[str, Any]:
        """One latent; undefined values are None."""
        return {"latent": latent} | {name: _cell(getattr(self, name)[latent]) for name in self.columns()[1:]}

    def count(self, tag: Tag, alive_only: bool = True) -> int:
        """Latents with a tag; by default of those that fired."""
        fired = self.firings.tolist()
        return sum(t == tag and (n > 0 or not alive_only) for t, n in zip(self.tag, fired, strict=True))

    def most_specific(self, side: Literal["a", "b"], n: int, min_firings: int = 1) -> list[int]:
        """The n latents with the most extreme relative norm towards a side, among those that fire enough."""
        candidates = ((self.firings >= max(min_firings, 1)) & self.relative_norm.isfinite()).nonzero().squeeze(1)
        relative = self.relative_norm[candidates]
        on_side = relative < 0.5 if side == "a" else relative > 0.5
        order = torch.sort(relative[on_side], descending=side == "b", stable=True).indices
        return candidates[on_side][order][:n].tolist()


def write_out(path: Path, text: str) -> None:
    """A new file whole or not at all; a pipe or a device, such as /dev/stdout, takes the text and stays what it is."""
    if path.is_symlink() or (path.exists() and not path.is_file()):
        with path.open("w", encoding="utf-8") as stream:
            stream.write(text)
    else:
        write_text(path, text)


def as_cell(value: Any) -> Any:
    """Text as a spreadsheet may show it: none that it would run as a formula, no control characters."""
    if not isinstance(value, str):
        return value
    text = "".join(c if c.isprintable() else " " for c in value)
    return f"'{text}" if text.lstrip()[:1] in ("=", "+", "-", "@") else text


def _cell(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return as_cell(value)
    number = value.item()
    if isinstance(number, int):
        return number
    return float(f"{number:.6g}") if math.isfinite(number) else None


def tag_of(relative_norm: float, margin: float = EXCLUSIVE_MARGIN) -> Tag:
    """A-only below `margin`, B-only above `1 - margin`, shared between, undefined for NaN."""
    if math.isnan(relative_norm):
        return "undefined"
    if relative_norm < margin:
        return "A-only"
    return "B-only" if relative_norm > 1 - margin else "shared"


@torch.no_grad()
def diff_latents(
    model: BaseCrosscoder,
    names: list[str],
    a: int,
    b: int,
    firing: FiringStats | None = None,
    scaling: LatentScalingResult | None = None,
    margin: float = EXCLUSIVE_MARGIN,
) -> DiffTable:
    """The diffing table of two output positions.

    Args:
        names: of the flattened output positions.
        a, b: indices into `names`; relative norms point from a (0) to b (1).
        firing, scaling: from a pass over held-out data; without them those columns are 0 or NaN.
        margin: see `tag_of`.
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
    relative_L = norm_dec_L2[:, 1] / norm_dec_L2.sum(1)
    firing = firing or FiringStats(n_latents)
    nan_L2 = nan_L[:, None].expand(-1, 2)
    beta_error_L2 = nan_L2 if scaling is None else scaling.beta_error_L2
    beta_reconstruction_L2 = nan_L2 if scaling is None else scaling.beta_reconstruction_L2
    return DiffTable(
        name_a=names[a],
        name_b=names[b],
        decoder_norm_a=norm_dec_L2[:, 0],
        decoder_norm_b=norm_dec_L2[:, 1],
        relative_norm=relative_L,
        decoder_cosine=cos_dec_L,
        encoder_norm_a=norm_enc_L2[:, 0],
        encoder_norm_b=norm_enc_L2[:, 1],
        encoder_cosine=cos_enc_L,
        tag=[tag_of(r, margin) for r in relative_L.tolist()],
        firings=firing.counts_L,
        density=firing.density_L,
        max_activation=firing.max_L.double(),
        beta_error_a=beta_error_L2[:, 0],
        beta_error_b=beta_error_L2[:, 1],
        beta_reconstruction_a=beta_reconstruction_L2[:, 0],
        beta_reconstruction_b=beta_reconstruction_L2[:, 1],
        nu_error=nan_L if scaling is None else scaling.nu_error_L,
        nu_reconstruction=nan_L if scaling is None else scaling.nu_reconstruction_L,
    )
