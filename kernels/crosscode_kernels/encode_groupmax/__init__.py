"""encode_groupmax: the maximum of each of k contiguous groups of L / k latents, after ReLU (sparsify, PR 49).

Axes: B tokens · I flattened input dims · L latents · K groups, one entry each.

    h = x W_enc^T + b_enc;  a = relu(h);  group g holds latents g * L/k .. (g + 1) * L/k - 1;  keep each group's maximum

Shapes: x_BI, W_enc_LI, b_enc_L (optional) -> Latents over L with at most one active per group and token.
Dtypes: one of float16, bfloat16, float32, float64 for all; products are accumulated in float32 or wider.
Ties: the lowest latent index of the group wins. A maximum that is not positive is not active. NaN is the maximum.
Gradients: of the kept positive values only, to W_enc, b_enc and, where x asks for it, to x.
Errors (ValueError): k outside 0..L, L not divisible by k, shapes that do not match, mixed dtypes or devices.
"""

from __future__ import annotations

from torch import Tensor

from crosscode_kernels.backend import AnyBackend, backend_for
from crosscode_kernels.checks import check_k
from crosscode_kernels.encode_groupmax import reference, torch_impl
from crosscode_kernels.encoder import checked_encoder
from crosscode_kernels.opset import door
from crosscode_kernels.preacts import preacts
from crosscode_kernels.segments.encoders import define_encoder
from crosscode_kernels.sparse import Latents

_encode = define_encoder(torch_impl.encode_groupmax)


@door
def encode_groupmax(
    x_BI: Tensor, W_enc_LI: Tensor, b_enc_L: Tensor | None, k: int, *, backend: AnyBackend = "auto"
) -> Latents:
    """The maximum of each of k contiguous groups of L / k latents of `relu(x W_enc^T + b_enc)`."""
    backend = backend_for(backend, x_BI)
    encoder = checked_encoder("encode_groupmax", backend, (x_BI, W_enc_LI, b_enc_L))
    check_k("encode_groupmax", k, encoder.W_enc_LI.shape[0])
    if k > 0 and encoder.W_enc_LI.shape[0] % k:
        raise ValueError(
            f"encode_groupmax: {encoder.W_enc_LI.shape[0]} latents do not divide into k = {k} equal groups"
        )
    if backend.name == "reference":
        return reference.encode_groupmax(preacts(*encoder, backend=backend), k)
    return _encode(encoder, k, backend=backend)
