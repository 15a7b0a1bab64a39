"""Distributions over latents that one number hides.

Axes: L latents · X crosscoding positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from crosscode.models.base import BaseCrosscoder

N_BINS = 64
RAREST = 1e-7


@dataclass(frozen=True)
class Histogram:
    """`counts[i]` values lie between `edges[i]` and `edges[i + 1]`; the last bin holds its upper edge."""

    counts: list[int]
    edges: list[float]

    def to_json(self) -> dict[str, Any]:
        return {"counts": self.counts, "edges": self.edges}


def histogram(values: Tensor, low: float | None = None, high: float | None = None) -> Histogram:
    """Of the finite values, over their range or between `low` and `high` (what lies outside counts in the end bins)."""
    finite = values.detach().flatten().cpu().double()
    finite = finite[finite.isfinite()]
    if finite.numel() == 0:
        return Histogram([0] * N_BINS, torch.linspace(low or 0.0, high or 1.0, N_BINS + 1).tolist())
    low = float(finite.min()) if low is None else low
    high = float(finite.max()) if high is None else high
    if high <= low:
        high = low + max(abs(low), 1.0) * 1e-6
    edges = torch.linspace(low, high, N_BINS + 1, dtype=torch.float64)
    counts, _ = torch.histogram(finite.clamp(low, high), bins=edges)
    return Histogram([int(count) for count in counts], edges.tolist())


@torch.no_grad()
def latent_histograms(model: BaseCrosscoder, density_L: Tensor) -> dict[str, Histogram]:
    """Firing density (log10 of the share of tokens, at least 1e-7), decoder norms, JumpReLU thresholds, and of the
    first two crosscoding positions the relative norm `n_1 / (n_0 + n_1)`: 0 is a latent of the first only."""
    norms = model.decoder_norms()
    found = {
        "log10_density": histogram(density_L.clamp(min=RAREST).log10(), low=-7.0, high=0.0),
        "decoder_norm": histogram(norms.n_L),
    }
    thresholds = [fn.log_thresholds_L() for fn in model.activation_fns]
    if thresholds := [log_threshold_L.exp() for log_threshold_L in thresholds if log_threshold_L is not None]:
        found["threshold"] = histogram(torch.cat(thresholds))
    if norms.norms_LX.shape[1] >= 2:
        first_L, second_L = norms.norms_LX[:, 0], norms.norms_LX[:, 1]
        found["relative_norm"] = histogram(second_L / (first_L + second_L), low=0.0, high=1.0)
    return found
