"""weighted_tanh: the decoder-norm weighted sparsity penalty.

Axes: B tokens · L latents.

    loss = (1 / B) sum over b, l of lambda_l tanh(c a_bl n_l)                (0 for an empty batch)

Shapes: Latents over L, n_L (decoder norms), lambda_L (coefficient of each latent) -> scalar, float32 (float64 for float64).
Dtypes: latents floating, n_L and lambda_L of any floating dtype; computed and summed in float32 or wider.
Gradients: to the latents and to n_L; none to lambda_L.
Errors (ValueError): c not positive, n_L or lambda_L not of shape (L,), wrong device.
"""

from __future__ import annotations

from torch import Tensor

from crosscode_kernels.backend import AnyBackend, backend_for
from crosscode_kernels.checks import check_positive
from crosscode_kernels.opset import door
from crosscode_kernels.penalties.autograd import check_penalty, penalty
from crosscode_kernels.sparse import Latents
from crosscode_kernels.weighted_tanh import reference


@door
def weighted_tanh(latents: Latents, n_L: Tensor, lambda_L: Tensor, c: float, *, backend: AnyBackend = "auto") -> Tensor:
    """`mean_B sum_l lambda_l tanh(c a_l n_l)`."""
    backend = backend_for(backend, latents)
    check_penalty("weighted_tanh", latents, n_L, lambda_L)
    check_positive("weighted_tanh", c=c)
    if backend.name == "reference":
        return reference.weighted_tanh(latents, n_L, lambda_L, c)
    return penalty(latents, n_L, lambda_L, float(c), backend)
