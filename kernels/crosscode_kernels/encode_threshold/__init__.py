"""encode_threshold: the inference form of BatchTopK; a token's latents do not depend on the rest of the batch.

Axes: B tokens · I flattened input dims · L latents · N stored entries.

    h = x W_enc^T + b_enc;  a = relu(h);  keep a_bl where a_bl > 0 and a_bl * rank_scale_l >= threshold

Shapes: x_BI, W_enc_LI, b_enc_L (optional), threshold () , rank_scale_L (optional) -> Latents over L, any number active.
Dtypes: one floating dtype for x, W and b; threshold and rank_scale_L of any floating dtype. The comparison is done as in
`encode_batch_topk`: in the dtype of x without a scale, else in float32 (float64 for float64).
Ties: equal to the threshold is kept. NaN is kept, so that it is seen.
Gradients: of the kept values, to W_enc, b_enc and, where x asks for it, to x.
Errors (ValueError): a threshold that is not a scalar, shapes that do not match, mixed dtypes or devices.

How many entries are kept depends on the data, so that this is composed from ops rather than being one; while tracing and
on the meta device, where shapes may not depend on the data, latents are dense. Triton's kernels have no gradient: they are for
inference.
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from crosscode_kernels.backend import AnyBackend, backend_for
from crosscode_kernels.checks import acc_dtype, check_per_latent
from crosscode_kernels.encoder import checked_encoder
from crosscode_kernels.opset import door
from crosscode_kernels.preacts import preacts
from crosscode_kernels.sparse import DenseLatents, Latents, SparseLatents


@door
def encode_threshold(
    x_BI: Tensor,
    W_enc_LI: Tensor,
    b_enc_L: Tensor | None,
    threshold: Tensor,
    rank_scale_L: Tensor | None = None,
    *,
    backend: AnyBackend = "auto",
) -> Latents:
    """`a_l = relu(h_l)` where `a_l * rank_scale_l >= threshold` and `a_l > 0`."""
    backend = backend_for(backend, x_BI)
    encoder = checked_encoder("encode_threshold", backend, (x_BI, W_enc_LI, b_enc_L))
    check_per_latent("encode_threshold", x_BI, encoder.W_enc_LI.shape[0], rank_scale_L=rank_scale_L)
    if threshold.dim() != 0 or not threshold.is_floating_point():
        raise ValueError(
            f"encode_threshold: threshold is {threshold.dtype} of shape {tuple(threshold.shape)}; "
            "must be a floating-point scalar tensor"
        )
    traced = torch.compiler.is_compiling() or x_BI.is_meta
    wants_grad = torch.is_grad_enabled() and (x_BI.requires_grad or encoder.wants_weight_grad())
    if backend.name == "triton" and not (wants_grad or traced) and x_BI.shape[0] > 0:
        triton_impl = importlib.import_module("crosscode_kernels.encode_threshold.triton_impl")
        return triton_impl.encode_threshold(encoder, threshold, rank_scale_L)
    h_BL = preacts(*encoder, backend=backend)
    a_BL = h_BL.relu()
    rank_BL = a_BL.detach()
    if rank_scale_L is not None:
        dtype = acc_dtype(a_BL.dtype)
        rank_BL = rank_BL.to(dtype) * rank_scale_L.detach().to(dtype)
    dropped_BL = (a_BL <= 0) | (rank_BL < threshold.detach().to(rank_BL.dtype))
    if traced or backend.name == "reference":
        return DenseLatents(a_BL.masked_fill(dropped_BL, 0))
    token_idx_N, latent_idx_N = (~dropped_BL).nonzero(as_tuple=True)
    return SparseLatents.from_pairs(
        token_idx_N, latent_idx_N, a_BL[token_idx_N, latent_idx_N], h_BL.shape[0], h_BL.shape[1]
    )
