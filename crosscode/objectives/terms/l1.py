"""L1 of decoder norms (Anthropic, "Sparse Crosscoders", October 2024).

Axes: B tokens · L latents.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from crosscode.models.base import BaseCrosscoder
from crosscode.objectives.base import TERMS, LossContext, LossTerm
from crosscode.objectives.groups import SharedRatioConfig, check_shared_ratio, lambda_L, penalty_norms_L
from crosscode.objectives.schedules import LinearRamp, Weight


@TERMS.register
class L1Term(LossTerm):
    """`mean_B sum_l a_l n_l`; `n` as the model's `decoder_norm` says. Shared latents may count less."""

    class Config(SharedRatioConfig):
        type: Literal["l1"] = "l1"
        weight: Weight = LinearRamp(value=2.0, ramp_steps=1000)
        """coefficient (lambda_s): a number or a schedule"""

    def check_model(self, model: BaseCrosscoder) -> None:
        check_shared_ratio("l1", model, self.shared_ratio)

    def __call__(self, context: LossContext) -> Tensor:
        weight_L = lambda_L(context, self.shared_ratio)
        return context.model.ops.weighted_l1(context.result.latents, penalty_norms_L(context), weight_L)
