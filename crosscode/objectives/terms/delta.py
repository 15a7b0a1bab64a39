"""The reconstruction error of what differs between models (delta crosscoder, Kassem et al. 2026, arXiv:2603.04426).

Axes: B tokens · M models · P hookpoints · D width.
"""

from __future__ import annotations

from typing import Literal

from pydantic import NonNegativeInt
from torch import Tensor

from crosscode.config.registry import ConfigModel
from crosscode.errors import InputError
from crosscode.models.base import BaseCrosscoder
from crosscode.models.model_hookpoint_acausal import ModelHookpointAcausalCrosscoder
from crosscode.objectives.base import TERMS, LossContext, LossTerm
from crosscode.objectives.schedules import Weight


@TERMS.register
class DeltaTerm(LossTerm):
    """`mean_B sum_(m != r) || (y_m - y_r) - (yhat_m - yhat_r) ||^2`, summed over hookpoints and width, of activations as
    training scales them. What models have in common cancels out, so that a direction which changed counts for more.

    After the paper's abstract, its text was not at hand; the contrast of "paired activations on matched inputs" is that all
    models read the same tokens.
    """

    class Config(ConfigModel):
        type: Literal["delta"] = "delta"
        weight: Weight = 1.0
        """coefficient: a number or a schedule"""
        reference: NonNegativeInt = 0
        """the model r from which differences are taken, as a place in language_models"""

    capturable = True

    def check_model(self, model: BaseCrosscoder) -> None:
        n_models = model.n_models if isinstance(model, ModelHookpointAcausalCrosscoder) else 1
        if n_models < 2:
            raise InputError("objective.delta: needs a crosscoder of at least two models (model_hookpoint_acausal)")
        model.widths.check_alike("objective.delta: models of different width have no difference")
        if self.reference >= n_models:
            raise InputError(f"objective.delta.reference = {self.reference}: must be below the {n_models} models")

    def __call__(self, context: LossContext) -> Tensor:
        error_BMPD = context.target_BXoDo - context.result.output_BXoDo
        reference_B1PD = error_BMPD[:, self.reference : self.reference + 1]
        return (error_BMPD - reference_B1PD).square().flatten(1).sum(1).mean()
