"""Decoder vectors of norm 1, with the gradient along them projected out (Gao et al. 2024, arXiv:2406.04093).

Axes: O flattened output · L latents.
"""

from __future__ import annotations

from typing import Literal

import torch

from crosscode.config.registry import ConfigModel
from crosscode.models.base import BaseCrosscoder
from crosscode.trainers.constraints.base import CONSTRAINTS, Constraint


@CONSTRAINTS.register
class UnitNormDecoder(Constraint):
    """Each latent's decoder row, over all crosscoding positions together, has norm 1. A row of zeros stays so."""

    class Config(ConfigModel):
        type: Literal["unit_norm_decoder"] = "unit_norm_decoder"

    capturable = True

    @torch.no_grad()
    def after_backward(self, model: BaseCrosscoder) -> None:
        for part in model.parts:
            if part.W_dec_LXoDo.grad is None:
                continue
            grad_LO, W_dec_LO = part.W_dec_LXoDo.grad.flatten(1), part.W_dec_LO
            # Rows have norm 1 here, up to the rounding of the last normalisation.
            along_L1 = (grad_LO * W_dec_LO).sum(1, keepdim=True)
            part.W_dec_LXoDo.grad.sub_((along_L1 * W_dec_LO).reshape(part.W_dec_LXoDo.shape))

    @torch.no_grad()
    def after_step(self, model: BaseCrosscoder) -> None:
        for part in model.parts:
            norm_L1 = part.W_dec_LO.norm(dim=1, keepdim=True)
            norm_L1 = torch.where(norm_L1 > 0, norm_L1, torch.ones_like(norm_L1))
            part.W_dec_LXoDo.copy_((part.W_dec_LO / norm_L1).reshape(part.W_dec_LXoDo.shape))
