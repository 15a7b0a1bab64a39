"""GroupMax: the largest latent of each of k groups (EleutherAI sparsify, pull request 49).

Axes: B tokens · I flattened input dims · L latents · K groups.
"""

from __future__ import annotations

from typing import Literal

import torch
from crosscode_kernels import OpSet
from crosscode_kernels.sparse import Latents
from pydantic import PositiveInt
from torch import Tensor

from crosscode.config.registry import ConfigModel
from crosscode.errors import InputError
from crosscode.models.activations.base import ACTIVATIONS, ActivationFunction


@ACTIVATIONS.register
class GroupMaxActivation(ActivationFunction):
    """ReLU, then the maximum of each of `k` contiguous groups of `n_latents / k`. A value <= 0 is never kept."""

    class Config(ConfigModel):
        type: Literal["groupmax"] = "groupmax"
        k: PositiveInt
        """number of groups, so the largest possible number of active latents; must divide n_latents"""

    title = "GroupMax"
    is_sparse, in_groups, capturable = True, True, True
    usual_terms = ("recon", "auxk")

    def setup(self) -> None:
        if self.n_latents % self.k:
            raise InputError(
                f"{self.section}.k = {self.k}: GroupMax needs a k that divides n_latents = {self.n_latents}"
            )

    @property
    def most_kept(self) -> int:
        return self.k

    def encode(
        self, ops: OpSet, x_BI: Tensor, W_enc_LI: Tensor, b_enc_L: Tensor | None, n_L: Tensor | None = None
    ) -> Latents:
        return ops.encode_groupmax(x_BI, W_enc_LI, b_enc_L, self.k)

    def forward(self, preacts_BL: Tensor) -> Tensor:
        a_BKG = preacts_BL.relu().unflatten(1, (self.k, self.n_latents // self.k))
        # argmax of equal values may be any of them: the first one is the rule.
        first_BK1 = (a_BKG == a_BKG.amax(2, keepdim=True)).int().argmax(2, keepdim=True)
        return torch.zeros_like(a_BKG).scatter(2, first_BK1, a_BKG.gather(2, first_BK1)).flatten(1)
