"""L1 of decoder norms (Anthropic, "Sparse Crosscoders", October 2024).

Axes: B tokens · L latents.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from crosscode.objectives.base import TERMS, LossContext
from crosscode.objectives.groups import lambda_L, penalty_norms_L
from crosscode.objectives.schedules import LinearRamp, Weight
from crosscode.objectives.wanted_l0 import Penalty, PenaltyConfig


@TERMS.register
class L1Term(Penalty):
    """`mean_B sum_l a_l n_l`; `n` as the model's `decoder_norm` says. Shared latents may count less."""

    class Config(PenaltyConfig):
        type: Literal["l1"] = "l1"
        weight: Weight = LinearRamp(value=2.0, ramp_steps=1000)
        """coefficient (lambda_s): a number or a schedule"""

    capturable = True

    def penalty(self, context: LossContext) -> Tensor:
        weight_L = lambda_L(context, self.shared_ratio)
        return context.model.ops.weighted_l1(context.result.latents, penalty_norms_L(context), weight_L)
