"""Quantiles of each latent's pre-activation over a sample of tokens.

Axes: T tokens of the sample · B batch · I flattened input dims · L latents · C a chunk of latents.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from crosscode.errors import InputError
from crosscode.models.coder import Coder
from crosscode.models.initialization.base import SampleBatches

CHUNK_ELEMENTS = 1 << 24
"""Largest pre-activation buffer: 64 MiB in float32."""


def collect_inputs(model: Coder, samples: SampleBatches, n_tokens: int) -> Tensor:
    """`x_TI`: the first `n_tokens` inputs, flattened, on the model's device."""
    batches, n_left = [], n_tokens
    for input_BXiDi, _ in samples():
        batches.append(input_BXiDi[:n_left].flatten(1).to(model.W_enc_LXiDi))
        n_left -= batches[-1].shape[0]
        if n_left <= 0:
            break
    if not batches or sum(batch.shape[0] for batch in batches) < 2:
        raise InputError("init: calibration needs at least two tokens of activations, the sample holds fewer")
    return torch.cat(batches)


@torch.no_grad()
def upper_quantile_L(x_TI: Tensor, W_enc_LI: Tensor, share: float) -> Tensor:
    """For each latent the value that `x . W_enc` exceeds on a `share` of the tokens (the count is rounded).

    Works on chunks of latents: never holds `tokens x L`.
    """
    n_tokens, n_latents = x_TI.shape[0], W_enc_LI.shape[0]
    n_above = min(max(round(share * n_tokens), 1), n_tokens - 1)
    chunk = max(1, CHUNK_ELEMENTS // n_tokens)
    quantile_L = torch.empty(n_latents, dtype=W_enc_LI.dtype, device=W_enc_LI.device)
    for start in range(0, n_latents, chunk):
        h_CT = W_enc_LI[start : start + chunk] @ x_TI.T
        # Half-way between the two neighbours in order, so that rounding on either side changes nothing.
        top_CT = h_CT.topk(n_above + 1, dim=1).values
        quantile_L[start : start + chunk] = (top_CT[:, -2] + top_CT[:, -1]) / 2
    return quantile_L


def firing_share(given: float | None, n_latents: int) -> float:
    """The share of tokens that a latent fires on at the start: as given, else 10^4 / L (clamped below 1)."""
    share = 1e4 / n_latents if given is None else given
    if not (share > 0 and math.isfinite(share)):
        raise InputError(f"init.initial_approx_firing_pct = {given}: must be above 0")
    return min(share, 0.99)
