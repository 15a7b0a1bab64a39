"""encode_jumprelu: JumpReLU together with its encoder.

Axes: B tokens · I flattened input dims · L latents.

    h = x W_enc^T + b_enc;  a = jumprelu(h, t)  (see jumprelu);  deficit_l = sum over b of relu(exp(t_l) - h_bl)

A deficit per latent is all that `pre_act_penalty` needs: its gradient to W_enc is `-g_l` times the sum of x over the tokens on
which latent l is silent, that is the sum over all tokens (rank one) less the sum over those on which it is not. So neither
direction keeps or builds a B x L tensor for the penalty where few latents are active.

Shapes: x_BI, W_enc_LI, b_enc_L (optional), t_L -> Latents over L with pre-activations (with `deficit_L`: without gradient).
Dtypes: one floating dtype for x, W and b; t of any floating dtype; deficits in float32 or wider.
Gradients: to x, W_enc, b_enc and t, with the straight-through estimator of `jumprelu`.
Sparse latents may store entries of value 0: those within the window, whose gradient t needs.
Errors (ValueError): shapes that do not match, mixed dtypes or devices, eps not positive, an unknown `ste`.
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from crosscode_kernels.backend import AnyBackend, backend_for
from crosscode_kernels.checks import check_per_latent
from crosscode_kernels.encode_jumprelu import measured
from crosscode_kernels.encode_topk.torch_impl import dense_preacts
from crosscode_kernels.encoder import checked_encoder, may_look
from crosscode_kernels.jumprelu import StraightThrough, check_straight_through, jumprelu
from crosscode_kernels.jumprelu.input_gradient import with_input_gradient
from crosscode_kernels.opset import door
from crosscode_kernels.preacts import preacts
from crosscode_kernels.registration import refuse_tangents
from crosscode_kernels.sparse import DenseLatents, Latents


@door
def encode_jumprelu(
    x_BI: Tensor,
    W_enc_LI: Tensor,
    b_enc_L: Tensor | None,
    t_L: Tensor,
    eps: float,
    ste: StraightThrough,
    *,
    input_gradient: bool = False,
    backend: AnyBackend = "auto",
) -> Latents:
    """`jumprelu(x W_enc^T + b_enc, t)`, with what `pre_act_penalty` needs. `input_gradient`: the pre-activations get a
    straight-through gradient, too (see `jumprelu.input_gradient`), in dense form."""
    backend = backend_for(backend, x_BI)
    encoder = checked_encoder("encode_jumprelu", backend, (x_BI, W_enc_LI, b_enc_L))
    check_per_latent("encode_jumprelu", x_BI, encoder.W_enc_LI.shape[0], t_L=t_L)
    check_straight_through("encode_jumprelu", eps, ste)
    if backend.name == "reference" or input_gradient:
        h_BL = preacts(*encoder, backend=backend)
        a_BL = jumprelu(h_BL, t_L, eps, ste, backend=backend)
        return DenseLatents(with_input_gradient(a_BL, h_BL, t_L, eps) if input_gradient else a_BL, h_BL)
    refuse_tangents("encode_jumprelu", (*encoder, t_L))
    if backend.has_capacity and x_BI.shape[0] > 0:
        with_capacity = importlib.import_module("crosscode_kernels.capacity").encode_jumprelu
        return with_capacity(encoder, t_L, float(eps), ste == "gdm", backend.capacity)
    measures = backend.name == "torch" and may_look(x_BI)
    with torch.no_grad():
        h_BL = dense_preacts(encoder) if measures else preacts(*encoder, backend=backend)
    encode = measured.encode_jumprelu if measures else measured.encode_jumprelu_dense
    return encode(encoder, h_BL, t_L, float(eps), ste == "gdm", backend)
