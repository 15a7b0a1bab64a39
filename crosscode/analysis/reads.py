"""What a latent reads from each language model (of one model: from each hookpoint).

The encoder adds up over its input positions: `h = b_enc[l] + sum_x W_enc[l, x] . (x - b_pre)_x`, with `b_pre` 0 but for models
that take their decoder bias off the input. What latent l reads from a model is the part of this sum over the positions of that
model, on raw activations with scaling folded in. With the encoder bias the parts add up to h, which is the activation of a latent
that fires, of TopK and its kin, ReLU and JumpReLU.

Axes: B tokens · Xi input crosscoding dims · X = flattened Xi · Di width · L latents · N active entries of a batch · R readers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from crosscode.models.base import BaseCrosscoder

_NUMBERS_AT_ONCE = 1 << 23


def readers(model: BaseCrosscoder, position_names: Sequence[str]) -> dict[str, list[int]]:
    """Input positions by language model, of one model by hookpoint; none where there is one alone, or where the input's
    positions are not those that `position_names` ("<model>/<hookpoint>") name."""
    if model.in_dims != model.out_dims or len(model.parts) > 1:
        return {}
    parts = [name.rpartition("/") for name in position_names]
    of_several = len({part[0] for part in parts}) > 1
    found: dict[str, list[int]] = {}
    for x, (name, _, hookpoint) in enumerate(parts):
        found.setdefault(name if of_several else hookpoint, []).append(x)
    return found if len(found) > 1 else {}


@torch.no_grad()
def read_NR(
    model: BaseCrosscoder, x_BXiDi: Tensor, token_N: Tensor, latent_N: Tensor, positions: Sequence[Sequence[int]]
) -> Tensor:
    """What each latent reads at its token from each reader, of which `positions` has the input positions; float32."""
    x_BXD = model.encoder_input(x_BXiDi).unflatten(1, (-1, model.d_in))
    W_LXD = model.W_enc_LXiDi.reshape(model.n_latents, -1, model.d_in)
    chunks = range(0, token_N.shape[0], max(1, _NUMBERS_AT_ONCE // W_LXD[0].numel()))
    step = chunks.step
    of_chunks = [
        torch.einsum("nxd,nxd->nx", x_BXD[token_N[i : i + step]], W_LXD[latent_N[i : i + step]]) for i in chunks
    ]
    read_NX = torch.cat([x_BXD.new_zeros(0, W_LXD.shape[1]), *of_chunks]).float()
    return torch.stack([read_NX[:, own].sum(1) for own in positions], dim=1)
