"""preacts: the pre-activations of all latents, dense.

Axes: B tokens · I flattened input dims · L latents.

    h = x W_enc^T + b_enc

Shapes: x_BI, W_enc_LI, b_enc_L (optional) -> h_BL. Dtypes: one of float16, bfloat16, float32, float64 for all.
Gradients: to x, W_enc and b_enc.
Errors (ValueError): shapes that do not match, mixed dtypes or devices.
"""

from __future__ import annotations

import torch
from torch import Tensor

from crosscode_kernels.backend import AnyBackend, backend_for
from crosscode_kernels.encoder import checked_encoder
from crosscode_kernels.opset import door
from crosscode_kernels.preacts import reference


@door
def preacts(x_BI: Tensor, W_enc_LI: Tensor, b_enc_L: Tensor | None, *, backend: AnyBackend = "auto") -> Tensor:
    """`h_BL = x W_enc^T + b_enc`: the vendor's product on all backends but the reference."""
    backend = backend_for(backend, x_BI)
    encoder = checked_encoder("preacts", backend, (x_BI, W_enc_LI, b_enc_L))
    return reference.preacts(encoder) if backend.name == "reference" else torch.nn.functional.linear(*encoder)
