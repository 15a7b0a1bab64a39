"""The pre-activation penalty of Anthropic's January 2025 update: it revives dead latents.

Axes: B tokens · L latents.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from crosscode.models.base import BaseCrosscoder
from crosscode.objectives.base import TERMS, LossContext, LossTerm
from crosscode.objectives.groups import SharedRatioConfig, check_shared_ratio, lambda_L, penalty_norms_L
from crosscode.objectives.jumprelu import require_jumprelu
from crosscode.objectives.schedules import Weight


@TERMS.register
class PreActTerm(LossTerm):
    """`mean_B sum_l relu(theta_l - h_l) n_l`, on the pre-activations `h`: silent latents have a gradient."""

    class Config(SharedRatioConfig):
        type: Literal["pre_act"] = "pre_act"
        weight: Weight = 3e-6
        """coefficient (lambda_p): a number or a schedule"""

    capturable = True

    def check_model(self, model: BaseCrosscoder) -> None:
        require_jumprelu("pre_act", model)
        check_shared_ratio("pre_act", model, self.shared_ratio)

    def __call__(self, context: LossContext) -> Tensor:
        model = context.model
        sizes = [part.n_latents for part in model.parts]
        log_thresholds = [log_L for fn in model.activation_fns if (log_L := fn.log_thresholds_L()) is not None]
        of_parts = zip(
            context.result.latents_of_parts,
            log_thresholds,
            penalty_norms_L(context).split(sizes),
            lambda_L(context, self.shared_ratio).split(sizes),
            strict=True,
        )
        penalties = [model.ops.pre_act_penalty(latents, t_L, n_L, weight_L) for latents, t_L, n_L, weight_L in of_parts]
        return torch.stack(penalties).sum()
