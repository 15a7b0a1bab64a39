"""weighted_l1: the decoder-norm weighted sparsity penalty.

Axes: B tokens · L latents.

    loss = (1 / B) sum over b, l of lambda_l a_bl n_l                (0 for an empty batch)

Shapes: Latents over L, n_L (decoder norms), lambda_L (coefficient of each latent) -> scalar, float32 (float64 for float64).
Dtypes: latents floating, n_L and lambda_L of any floating dtype; computed and summed in float32 or wider.
Gradients: to the latents and to n_L; none to lambda_L.
Errors (ValueError): n_L or lambda_L not of shape (L,), wrong device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from crosscode_kernels.backend import AnyBackend, backend_for
from crosscode_kernels.checks import acc_dtype
from crosscode_kernels.opset import door
from crosscode_kernels.penalties.autograd import check_penalty, penalty
from crosscode_kernels.sparse import DenseLatents, Latents
from crosscode_kernels.weighted_l1 import reference


@door
def weighted_l1(latents: Latents, n_L: Tensor, lambda_L: Tensor, *, backend: AnyBackend = "auto") -> Tensor:
    """`mean_B sum_l lambda_l a_l n_l`."""
    backend = backend_for(backend, latents)
    check_penalty("weighted_l1", latents, n_L, lambda_L)
    if backend.name == "reference":
        return reference.weighted_l1(latents, n_L, lambda_L)
    if backend.name == "torch" and isinstance(latents, DenseLatents):
        dtype = acc_dtype(latents.value_BL.dtype)
        # Linear in the sum over the batch, whose gradient is a view: no B x L tensor each way.
        sum_L = latents.value_BL.sum(0, dtype=dtype)
        return torch.dot(sum_L * n_L.to(dtype), lambda_L.detach().to(dtype)) / max(latents.batch_size, 1)
    return penalty(latents, n_L, lambda_L, None, backend)
