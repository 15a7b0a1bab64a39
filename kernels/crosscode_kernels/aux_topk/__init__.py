"""aux_topk: `encode_topk` among dead latents only (AuxK of Gao et al. 2024).

Axes: B tokens · I flattened input dims · L latents · K kept per token.

    h = x W_enc^T + b_enc;  a = relu(h) where dead_mask;  keep the k largest of each row, 0 elsewhere

Shapes: x_BI, W_enc_LI, b_enc_L (optional), dead_mask_L (bool) -> Latents over L. Fewer than k dead latents: all of them are
kept; a sparse result then has one entry for each, and where their number is not known (on a device, while tracing) pads
each row to k entries with (latent 0, value 0).
Dtypes: one of float16, bfloat16, float32, float64 for x, W and b.
Ties: the lowest latent index wins. A value that is not positive is never active. NaN is kept.
Gradients: of the kept positive values only, to W_enc, b_enc and, where x asks for it, to x.
Errors (ValueError): k outside 0..L, a mask that is not bool of shape (L,), shapes that do not match, mixed dtypes or devices.
"""

from __future__ import annotations

import torch
from torch import Tensor

from crosscode_kernels.aux_topk import reference, torch_impl
from crosscode_kernels.backend import AnyBackend, backend_for
from crosscode_kernels.checks import check_k
from crosscode_kernels.encoder import Encoder, checked_encoder, may_look
from crosscode_kernels.opset import door
from crosscode_kernels.preacts import preacts
from crosscode_kernels.segments.encoders import define_encoder
from crosscode_kernels.sparse import Latents, SparseLatents

_encode = define_encoder(torch_impl.aux_topk)


@door
def aux_topk(
    x_BI: Tensor,
    W_enc_LI: Tensor,
    b_enc_L: Tensor | None,
    dead_mask_L: Tensor,
    k: int,
    *,
    backend: AnyBackend = "auto",
) -> Latents:
    """`encode_topk` among the latents of `dead_mask_L` only (fewer than k dead: all of them)."""
    backend = backend_for(backend, x_BI)
    encoder = checked_encoder("aux_topk", backend, (x_BI, W_enc_LI, b_enc_L))
    check_dead("aux_topk", encoder, dead_mask_L, k)
    if backend.name == "reference":
        return reference.aux_topk(preacts(*encoder, backend=backend), dead_mask_L, k)
    if k and backend.name == "torch" and may_look(x_BI):
        k = min(k, dead_mask_L.sum().reshape(1).tolist()[0])
        if k == 0:  # nothing to compute, no gradient, nothing to keep for one
            return SparseLatents.none(x_BI.shape[0], encoder.W_enc_LI.shape[0], encoder.x_BI)
    return _encode(encoder, dead_mask_L, k, backend=backend)


def check_dead(op: str, encoder: Encoder, dead_mask_L: Tensor, k: int) -> None:
    check_k(op, k, encoder.W_enc_LI.shape[0])
    if dead_mask_L.dtype != torch.bool or tuple(dead_mask_L.shape) != (encoder.W_enc_LI.shape[0],):
        raise ValueError(
            f"{op}: dead_mask_L is {dead_mask_L.dtype} of shape {tuple(dead_mask_L.shape)}; "
            f"must be bool of shape ({encoder.W_enc_LI.shape[0]},)"
        )
    if dead_mask_L.device != encoder.x_BI.device:
        raise ValueError(
            f"{op}: dead_mask_L is on {dead_mask_L.device} and x_BI on {encoder.x_BI.device}; must be on one"
        )
