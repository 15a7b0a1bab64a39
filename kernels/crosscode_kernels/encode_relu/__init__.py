"""encode_relu: ReLU together with its encoder.

Axes: B tokens · I flattened input dims · L latents.

    h = x W_enc^T + b_enc;  a = relu(h)

Shapes: x_BI, W_enc_LI, b_enc_L (optional) -> Latents over L: dense, but for torch on a CPU, where they are sparse whenever the
density that is measured on the batch says that this is cheaper; for Triton with a capacity dense with their entries beside.
Dtypes: one floating dtype for all. Gradients: to x, W_enc and b_enc.
Errors (ValueError): shapes that do not match, mixed dtypes or devices.
"""

from __future__ import annotations

import importlib

from torch import Tensor

from crosscode_kernels.backend import AnyBackend, backend_for
from crosscode_kernels.encode_jumprelu import measured
from crosscode_kernels.encoder import checked_encoder, may_look
from crosscode_kernels.opset import door
from crosscode_kernels.preacts import preacts
from crosscode_kernels.sparse import DenseLatents, Latents


@door
def encode_relu(x_BI: Tensor, W_enc_LI: Tensor, b_enc_L: Tensor | None, *, backend: AnyBackend = "auto") -> Latents:
    """`relu(x W_enc^T + b_enc)`."""
    backend = backend_for(backend, x_BI)
    encoder = checked_encoder("encode_relu", backend, (x_BI, W_enc_LI, b_enc_L))
    if backend.has_capacity and x_BI.shape[0] > 0:
        return importlib.import_module("crosscode_kernels.capacity").encode_relu(encoder, backend.capacity)
    if backend.name == "torch" and may_look(x_BI):
        return measured.encode_relu(encoder, backend)
    return DenseLatents(preacts(*encoder, backend=backend).relu())
