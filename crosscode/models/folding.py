"""Rewriting weights without changing the function.

Axes: Xi/Xo input/output crosscoding dims · Di/Do widths · L latents.
"""

from __future__ import annotations

import torch
from torch import Tensor

from crosscode.errors import InputError
from crosscode.models.coder import Coder


@torch.no_grad()
def fold_scaling_(model: Coder, scaling_in_Xi: Tensor, scaling_out_Xo: Tensor) -> None:
    """See `BaseCrosscoder.fold_activation_scaling_into_weights_`."""
    if model.is_folded:
        raise InputError("fold_activation_scaling_into_weights_: the scaling of this model is folded in already")
    like = model.parts[0].W_enc_LXiDi
    check_scaling(model, scaling_in_Xi, scaling_out_Xo)
    s_in_Xi, s_out_Xo = scaling_in_Xi.to(like), scaling_out_Xo.to(like)
    model.scale_weights_(s_in_Xi, s_out_Xo)
    model.folded_scaling_in_Xi, model.folded_scaling_out_Xo = s_in_Xi.clone(), s_out_Xo.clone()


def scale_weights_(model: Coder, s_in_Xi: Tensor, s_out_Xo: Tensor) -> None:
    """Scale the weights of a model that holds its own."""
    model.W_enc_LXiDi.mul_(s_in_Xi[..., None])
    model.W_dec_LXoDo.div_(s_out_Xo[..., None])
    if model.b_dec_XoDo is not None:
        model.b_dec_XoDo.div_(s_out_Xo[..., None])
    if model.W_skip_XiDiXoDo is not None:
        ones_out = (1,) * (len(model.out_dims) + 1)
        model.W_skip_XiDiXoDo.mul_(s_in_Xi.reshape(*model.in_dims, 1, *ones_out)).div_(s_out_Xo[..., None])


def check_scaling(model: Coder, scaling_in_Xi: Tensor, scaling_out_Xo: Tensor) -> None:
    """Raise `InputError` where these factors could not be folded into the model."""
    for name, scaling, dims in (
        ("scaling_in_Xi", scaling_in_Xi, model.in_dims),
        ("scaling_out_Xo", scaling_out_Xo, model.out_dims),
    ):
        if tuple(scaling.shape) != dims:
            raise InputError(f"{name}: expected shape {dims}, got {tuple(scaling.shape)}")
        if not bool((scaling.isfinite() & (scaling > 0)).all()):
            raise InputError(f"{name}: factors must be positive and finite, got {scaling.tolist()}")
    if model.use_pre_bias and not torch.equal(scaling_in_Xi, scaling_out_Xo):
        raise InputError("scaling: a model with use_pre_bias needs equal factors for input and output")


@torch.no_grad()
def fold_decoder_norms_(model: Coder) -> None:
    """Latents times their decoder norm, decoder to norm 1. A latent without decoder stays as it is."""
    n_L = model.ranking_norms_L()
    n_L = torch.where(n_L > 0, n_L, torch.ones_like(n_L)).to(model.W_enc_LXiDi.dtype)
    model.activation_fn.rescale_latents_(n_L)
    model.W_enc_LXiDi.mul_(n_L.reshape(-1, *(1,) * (model.W_enc_LXiDi.ndim - 1)))
    model.W_dec_LXoDo.div_(n_L.reshape(-1, *(1,) * (model.W_dec_LXoDo.ndim - 1)))
    if model.b_enc_L is not None:
        model.b_enc_L.mul_(n_L)
