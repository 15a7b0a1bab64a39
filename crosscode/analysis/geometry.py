"""Encoder and decoder vectors in the scale of training.

Training scales every (model, hookpoint) to the same mean activation norm. Norms of different positions can only be
compared there: in raw units the model with the larger activations would look as if it owned every latent.

Axes: Xi/Xo input/output crosscoding dims · X either of them flattened · D width · L latents.
"""

from __future__ import annotations

import torch
from torch import Tensor

from crosscode.models.base import BaseCrosscoder
from crosscode.models.decoder_vectors import decoder_vectors_NXD


def output_scaling_X(model: BaseCrosscoder) -> Tensor:
    """Factor from raw to training scale per output position; ones where no scaling is folded in."""
    scaling = model.folded_scaling_out_Xo
    return torch.ones(len(model.segments)).to(model.parts[0].W_dec_LXoDo) if scaling is None else scaling.flatten()


def decoder_vectors_LXD(model: BaseCrosscoder) -> Tensor:
    """One decoder vector per latent and output position; zeros where a latent of a compound model does not write."""
    return decoder_vectors_NXD(model) * output_scaling_X(model)[:, None]


def encoder_vectors_LXD(model: BaseCrosscoder) -> Tensor | None:
    """One encoder vector per latent and position; None where the input's positions are not the output's."""
    if model.in_dims != model.out_dims or model.parts[0] is not model:
        return None
    W_enc_LXiDi = model.W_enc_LXiDi.detach()
    if model.folded_scaling_in_Xi is not None:
        W_enc_LXiDi = W_enc_LXiDi / model.folded_scaling_in_Xi[..., None]
    return W_enc_LXiDi.reshape(model.n_latents, -1, model.d_in)


def given_LX(model: BaseCrosscoder) -> Tensor:
    """Whether a partition of the dictionary lets a latent belong to the model of an output position (bool, on the CPU)."""
    partition = model.partition
    if partition is None:
        return torch.ones(model.n_latents, len(model.segments), dtype=torch.bool)
    given_LM = partition.models_LM()
    return given_LM.repeat_interleave(len(model.segments) // given_LM.shape[1], dim=1)


def norms_and_cosine(W_LXD: Tensor, a: int, b: int) -> tuple[Tensor, Tensor]:
    """`(norms_L2, cosine_L)` of the vectors at two positions, float64 on the CPU; NaN cosine for a zero vector."""
    pair_L2D = W_LXD[:, [a, b]].double()
    norms_L2 = pair_L2D.norm(dim=-1)
    dot_L = (pair_L2D[:, 0] * pair_L2D[:, 1]).sum(-1)
    return norms_L2.cpu(), (dot_L / norms_L2.prod(1)).cpu()
