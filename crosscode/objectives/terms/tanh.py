"""The tanh sparsity penalty of Anthropic's January 2025 update.

Axes: B tokens · L latents.
"""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveFloat
from torch import Tensor

from crosscode.models.base import BaseCrosscoder
from crosscode.objectives.base import TERMS, LossContext
from crosscode.objectives.groups import lambda_L, penalty_norms_L
from crosscode.objectives.jumprelu import require_jumprelu
from crosscode.objectives.schedules import LinearRamp, Weight
from crosscode.objectives.wanted_l0 import Penalty, PenaltyConfig


@TERMS.register
class TanhTerm(Penalty):
    """`mean_B sum_l tanh(c a_l n_l)`. Shared latents may count less."""

    class Config(PenaltyConfig):
        type: Literal["tanh"] = "tanh"
        weight: Weight = LinearRamp(value=10.0)
        """coefficient (lambda_s): a number or a schedule; by default it rises over the whole run"""
        c: PositiveFloat = 4.0
        """scale inside the tanh"""

    capturable = True

    def check_model(self, model: BaseCrosscoder) -> None:
        require_jumprelu("tanh", model)
        super().check_model(model)

    def penalty(self, context: LossContext) -> Tensor:
        weight_L = lambda_L(context, self.shared_ratio)
        return context.model.ops.weighted_tanh(context.result.latents, penalty_norms_L(context), weight_L, self.c)
