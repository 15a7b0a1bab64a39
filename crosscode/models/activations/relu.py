"""ReLU.

Axes: B tokens · I flattened input dims · L latents.
"""

from __future__ import annotations

from typing import Literal

import torch
from crosscode_kernels import OpSet
from crosscode_kernels.sparse import Latents
from torch import Tensor

from crosscode.config.registry import ConfigModel
from crosscode.models.activations.base import ACTIVATIONS, ActivationFunction


@ACTIVATIONS.register
class ReLUActivation(ActivationFunction):
    """`relu(h)`; an L1 penalty makes it sparse."""

    class Config(ConfigModel):
        type: Literal["relu"] = "relu"

    title = "ReLU"
    may_be_either, capturable = True, True

    def encode(
        self, ops: OpSet, x_BI: Tensor, W_enc_LI: Tensor, b_enc_L: Tensor | None, n_L: Tensor | None = None
    ) -> Latents:
        return ops.encode_relu(x_BI, W_enc_LI, b_enc_L)

    def forward(self, preacts_BL: Tensor) -> Tensor:
        return preacts_BL.relu()

    def cutoffs_L(self, n_L: Tensor | None = None) -> Tensor:
        return torch.zeros(self.n_latents)

    def for_prefix(self, n_latents: int, threshold: Tensor | None) -> ReLUActivation:
        return self.for_n_latents(n_latents)

    def rescale_latents_(self, scale_L: Tensor) -> None:
        """Nothing to do: what is positive stays so."""
