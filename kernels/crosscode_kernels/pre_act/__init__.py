"""pre_act: the penalty that revives silent latents (Anthropic, January 2025 update).

Axes: B tokens · L latents.

    loss = (1 / B) sum over b, l of lambda_l relu(exp(t_l) - h_bl) n_l                (0 for an empty batch)

The penalty takes pre-activations: fed with latents, its gradient to a silent latent is exactly 0 and revives nothing.
Shapes: h_BL, t_L (log thresholds), n_L (decoder norms), lambda_L -> scalar, float32 (float64 for float64).
Dtypes: h floating, the vectors of any floating dtype; computed and summed in float32 or wider.
Gradients: to h (`-lambda n / B` where h < theta), to t and to n; none to lambda.
Errors (ValueError): shapes that do not match, wrong dtype or device.
"""

from __future__ import annotations

from torch import Tensor

from crosscode_kernels.backend import AnyBackend, backend_for
from crosscode_kernels.checks import check_dims, check_float, check_per_latent
from crosscode_kernels.opset import door
from crosscode_kernels.penalties import PreActTerm
from crosscode_kernels.pre_act import autograd, reference


@door
def pre_act(h_BL: Tensor, t_L: Tensor, n_L: Tensor, lambda_L: Tensor, *, backend: AnyBackend = "auto") -> Tensor:
    """`mean_B sum_l lambda_l relu(exp(t_l) - h_l) n_l`."""
    backend = backend_for(backend, h_BL)
    check_dims("pre_act", "h_BL", h_BL, 2)
    check_float("pre_act", h_BL=h_BL)
    check_per_latent("pre_act", h_BL, h_BL.shape[1], t_L=t_L, n_L=n_L, lambda_L=lambda_L)
    term = PreActTerm(t_L, n_L, lambda_L.detach())
    if backend.name == "reference":
        return reference.pre_act(h_BL, *term)
    return autograd.pre_act(h_BL, term, backend=backend)
