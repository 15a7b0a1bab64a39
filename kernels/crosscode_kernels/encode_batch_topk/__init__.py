"""encode_batch_topk: the k * B largest latents of the whole batch (Bussmann et al. 2024), after ReLU.

Axes: B tokens · I flattened input dims · L latents · N stored entries.

    h = x W_enc^T + b_enc;  a = relu(h);  keep the k * B largest of a_bl * rank_scale_l, 0 elsewhere

A token may keep none or many. `rank_scale_L` (positive; decoder norms, say) changes the ranking only: kept values are the
unscaled a, and no gradient reaches it.
Shapes: x_BI, W_enc_LI, b_enc_L (optional), rank_scale_L (optional) -> Latents over L with at most k * B active.
Dtypes: one floating dtype for x, W and b; rank_scale_L may be of any. The ranking is done in the dtype of x where there is no
scale, and on `float32(a) * float32(rank_scale)` (float64 for float64) where there is one.
Ties: the lowest flat index `b * L + l` wins. A value that is not positive is never active. NaN ranks above everything.
Gradients: of the kept positive values only, to W_enc, b_enc and, where x asks for it, to x.
Errors (ValueError): k outside 0..L, shapes that do not match, mixed dtypes or devices.
"""

from __future__ import annotations

from torch import Tensor

from crosscode_kernels.backend import AnyBackend, backend_for
from crosscode_kernels.checks import check_k, check_per_latent
from crosscode_kernels.encode_batch_topk import reference, torch_impl
from crosscode_kernels.encoder import checked_encoder
from crosscode_kernels.opset import door
from crosscode_kernels.preacts import preacts
from crosscode_kernels.segments.encoders import define_encoder
from crosscode_kernels.sparse import Latents

_encode = define_encoder(torch_impl.encode_batch_topk)


@door
def encode_batch_topk(
    x_BI: Tensor,
    W_enc_LI: Tensor,
    b_enc_L: Tensor | None,
    k: int,
    rank_scale_L: Tensor | None = None,
    *,
    backend: AnyBackend = "auto",
) -> Latents:
    """The `k * B` largest of the whole batch, ranked by `a_l * rank_scale_l` (1 where None); values unscaled."""
    backend = backend_for(backend, x_BI)
    encoder = checked_encoder("encode_batch_topk", backend, (x_BI, W_enc_LI, b_enc_L))
    check_k("encode_batch_topk", k, encoder.W_enc_LI.shape[0])
    check_per_latent("encode_batch_topk", x_BI, encoder.W_enc_LI.shape[0], rank_scale_L=rank_scale_L)
    rank_scale_L = None if rank_scale_L is None else rank_scale_L.detach()
    if backend.name == "reference":
        return reference.encode_batch_topk(preacts(*encoder, backend=backend), k, rank_scale_L)
    return _encode(encoder, k, rank_scale_L, backend=backend)
