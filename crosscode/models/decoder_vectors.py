"""Decoder vectors by latent and output position, in the model's own scale.

Axes: X output crosscoding positions (flattened) · D width · L latents · N some of them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from crosscode.errors import InputError
from crosscode.models.coder import Coder


@torch.no_grad()
def decoder_vectors_NXD(model: Coder, latents_N: Tensor | None = None) -> Tensor:
    """Vectors of some latents (int64; None: all) at every output position; zeros where a latent of a compound model does
    not write. Of a folded model they are in the space of raw activations.

    Raises:
        InputError: no such latent.
    """
    n_latents, like = model.n_latents, model.parts[0].W_dec_LXoDo
    if latents_N is None:
        latents_N = torch.arange(n_latents, device=like.device)
    outside_N = (latents_N < 0) | (latents_N >= n_latents)
    if bool(outside_N.any()):
        raise InputError(f"latent = {int(latents_N[outside_N][0])}: must be between 0 and {n_latents - 1}")
    latents_N = latents_N.to(like.device)
    vectors_NXD = like.new_zeros(latents_N.shape[0], len(model.segments), model.d_out)
    for part, first, outputs in _parts(model):
        own_N = ((latents_N >= first) & (latents_N < first + part.n_latents)).nonzero().squeeze(1)
        W_dec_LXD = part.W_dec_LXoDo.detach().reshape(part.n_latents, -1, part.d_out)
        vectors_NXD[own_N, outputs] = W_dec_LXD[latents_N[own_N] - first]
    return vectors_NXD


def may_write_LX(model: Coder) -> Tensor:
    """Whether the architecture can write a latent to an output position (bool, on the CPU)."""
    may_LX = torch.zeros(model.n_latents, len(model.segments), dtype=torch.bool)
    for part, first, outputs in _parts(model):
        may_LX[first : first + part.n_latents, outputs] = True
    return may_LX


def _parts(model: Coder) -> Iterator[tuple[Coder, int, slice]]:
    """Each part, its first latent, and the output positions that it writes to."""
    first = 0
    for part, outputs in zip(model.parts, model.outputs_of_parts, strict=True):
        yield part, first, outputs
        first += part.n_latents
