"""step_l0: how many latents of a JumpReLU are active, with a straight-through gradient to their thresholds (Rajamanoharan et al.
2024, arXiv:2407.14435, section 3).

Axes: B tokens · L latents.

    l0_b = sum over l of 1[h_bl > theta_l];  firing_l = sum over b of the same;  theta = exp(t)
    d 1[h > theta] / dtheta := -(1 / eps) 1[|h - theta| < eps / 2]       (so with respect to t one more factor theta)

Shapes: Latents over L of `encode_jumprelu`, t_L (the thresholds that they were encoded with) -> l0_B, firing_L.
Dtypes: those of `jumprelu`; results in float32 or wider.
Gradients: to t alone, for the step has none to h. From what the encoder keeps for its own backward: no B x L tensor besides.
Errors (ValueError): latents of another encoder, t not of shape (L,), eps not positive.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from crosscode_kernels.backend import AnyBackend, backend_for
from crosscode_kernels.checks import check_per_latent, check_positive
from crosscode_kernels.opset import door
from crosscode_kernels.sparse import DenseLatents, Latents
from crosscode_kernels.step_l0 import autograd, reference


class StepL0(NamedTuple):
    """Active latents of each token, and active tokens of each latent."""

    l0_B: Tensor
    firing_L: Tensor


@door
def step_l0(latents: Latents, t_L: Tensor, eps: float, *, backend: AnyBackend = "auto") -> StepL0:
    """The counts of `h > exp(t)` by token and by latent, differentiable in t."""
    backend = backend_for(backend, latents)
    check_per_latent("step_l0", latents.value, latents.n_latents, t_L=t_L)
    check_positive("step_l0", eps=eps)
    if latents.preacts is None:
        raise ValueError("step_l0: latents carry no pre-activations; must come from encode_jumprelu")
    if backend.name == "reference":
        return StepL0(*reference.step_l0(latents, t_L, eps))
    if isinstance(latents, DenseLatents):
        return StepL0(*autograd.dense_step(latents.preacts.detach(), t_L, eps))
    return StepL0(*autograd.sparse_step(latents, t_L, eps))
