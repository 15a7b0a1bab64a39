"""pre_act_penalty: `pre_act` of latents that come from `encode_jumprelu`, from what it has kept.

Axes: L latents.

    loss = (1 / B) sum over l of lambda_l n_l deficit_l                (see encode_jumprelu)

Shapes: Latents over L, t_L (the thresholds that they were encoded with), n_L (decoder norms), lambda_L -> scalar.
Gradients: to the encoder, to t and to n; none to lambda.
Errors (ValueError): latents of another encoder; those of `pre_act`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from crosscode_kernels.backend import AnyBackend
from crosscode_kernels.opset import door
from crosscode_kernels.pre_act import pre_act
from crosscode_kernels.sparse import DenseLatents, Latents


@door
def pre_act_penalty(
    latents: Latents, t_L: Tensor, n_L: Tensor, lambda_L: Tensor, *, backend: AnyBackend = "auto"
) -> Tensor:
    """`mean_B sum_l lambda_l relu(exp(t_l) - h_l) n_l`."""
    if latents.deficit_L is None and isinstance(latents, DenseLatents) and latents.preacts_BL is not None:
        return pre_act(latents.preacts_BL, t_L, n_L, lambda_L, backend=backend)
    if latents.deficit_L is None:
        raise ValueError("pre_act_penalty: latents carry no pre-activations; must come from encode_jumprelu")
    dtype = latents.deficit_L.dtype
    coef_L = n_L.to(dtype) * lambda_L.detach().to(dtype)
    return torch.dot(latents.deficit_L, coef_L) / max(latents.batch_size, 1)
