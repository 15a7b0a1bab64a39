"""The tanh sparsity penalty of Anthropic's January 2025 update.

Axes: B tokens · L latents.
"""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveFloat
from torch import Tensor

from crosscode.models.base import BaseCrosscoder
from crosscode.objectives.base import TERMS, LossContext, LossTerm
from crosscode.objectives.groups import SharedRatioConfig, check_shared_ratio, lambda_L, penalty_norms_L
from crosscode.objectives.jumprelu import require_jumprelu
from crosscode.objectives.schedules import LinearRamp, Weight


@TERMS.register
class TanhTerm(LossTerm):
    """`mean_B sum_l tanh(c a_l n_l)`. Shared latents may count less."""

    class Config(SharedRatioConfig):
        type: Literal["tanh"] = "tanh"
        weight: Weight = LinearRamp(value=10.0)
        """coefficient (lambda_s): a number or a schedule; by default it rises over the whole run"""
        c: PositiveFloat = 4.0
        """scale inside the tanh"""

    def check_model(self, model: BaseCrosscoder) -> None:
        require_jumprelu("tanh", model)
        check_shared_ratio("tanh", model, self.shared_ratio)

    def __call__(self, context: LossContext) -> Tensor:
        weight_L = lambda_L(context, self.shared_ratio)
        return context.model.ops.weighted_tanh(context.result.latents, penalty_norms_L(context), weight_L, self.c)
