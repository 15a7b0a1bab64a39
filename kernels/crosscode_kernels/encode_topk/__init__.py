"""encode_topk: the k largest latents of each token (Gao et al. 2024), after ReLU.

Axes: B tokens · I flattened input dims · L latents · K kept per token.

    h = x W_enc^T + b_enc;  a = relu(h);  keep the k largest of each row, 0 elsewhere

Shapes: x_BI, W_enc_LI, b_enc_L (optional) -> Latents over L with at most k active per token.
Dtypes: one of float16, bfloat16, float32, float64 for all; products are accumulated in float32 or wider.
Ties: the lowest latent index wins. A value that is not positive is never active. NaN is larger than everything, so that
it is kept and seen. +inf is an ordinary value.
Gradients: of the kept positive values only, to W_enc, b_enc and, where x asks for it, to x.
Errors (ValueError): k outside 0..L, shapes that do not match, mixed dtypes or devices.
"""

from __future__ import annotations

from torch import Tensor

from crosscode_kernels.backend import AnyBackend, backend_for
from crosscode_kernels.checks import check_k
from crosscode_kernels.encode_topk import reference, torch_impl
from crosscode_kernels.encoder import checked_encoder
from crosscode_kernels.opset import door
from crosscode_kernels.preacts import preacts
from crosscode_kernels.segments.encoders import define_encoder
from crosscode_kernels.sparse import Latents

_encode = define_encoder(torch_impl.encode_topk, variants=("screened",))


@door
def encode_topk(
    x_BI: Tensor, W_enc_LI: Tensor, b_enc_L: Tensor | None, k: int, *, backend: AnyBackend = "auto"
) -> Latents:
    """The k largest of `relu(x W_enc^T + b_enc)` of each token."""
    backend = backend_for(backend, x_BI)
    encoder = checked_encoder("encode_topk", backend, (x_BI, W_enc_LI, b_enc_L))
    check_k("encode_topk", k, encoder.W_enc_LI.shape[0])
    if backend.name == "reference":
        return reference.encode_topk(preacts(*encoder, backend=backend), k)
    return _encode(encoder, k, backend=backend)
