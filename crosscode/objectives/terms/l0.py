"""A wanted L0: the quadratic step penalty of Gemma Scope 2, on linear JumpReLU thresholds (Rajamanoharan et al. 2024,
arXiv:2407.14435, "training to match a desired L0").

Axes: B tokens · L latents · O flattened output.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import Tensor

from crosscode.config.registry import ConfigModel
from crosscode.errors import InputError
from crosscode.models.base import BaseCrosscoder
from crosscode.objectives.base import TERMS, LossContext, LossTerm
from crosscode.objectives.schedules import WarmUp, Weight
from crosscode.objectives.wanted_l0 import check_target, missed


@TERMS.register
class L0Term(LossTerm):
    """`O (l0 / target - 1)^2`, plus, if wanted, `frequency_weight O / L sum_l relu(share_l / max_firing_share - 1)`.

    `l0` is the number of active latents of a token, `share_l` the share of tokens on which a latent is active, O the width of
    the whole output: of that size is the squared error of scaled activations, so the weight needs no tuning. The step has a
    gradient to the thresholds alone.
    """

    class Config(ConfigModel):
        type: Literal["l0"] = "l0"
        target: PositiveFloat
        """wanted number of active latents of a token"""
        weight: Weight = WarmUp(value=10.0)
        """coefficient: a number or a schedule"""
        pull: Literal["batch", "token"] = "batch"
        """what is drawn to the target: the mean over the batch, or each token (where L0 then ends below the target by its
        variance over the mean)"""
        max_firing_share: float | None = Field(default=None, gt=0, le=1)
        """share of tokens above which a latent's firing is penalised; null: any share is free"""
        frequency_weight: NonNegativeFloat = 1.0
        """size of that penalty"""

    capturable = True
    draws_l0 = True

    def setup(self) -> None:
        self.needs_whole_batch = self.pull == "batch" or self.max_firing_share is not None

    def check_model(self, model: BaseCrosscoder) -> None:
        check_target(f"{self.section}.target", self.target, model)
        for activation in model.activation_fns:
            if activation.step_bandwidth() is None:
                raise InputError(
                    f"{self.section}: moves thresholds that are parameters themselves, got crosscoder.activation = "
                    f"{activation.type_name()!r}; use {{type: jumprelu, thresholds: linear}}"
                )

    def __call__(self, context: LossContext) -> Tensor:
        model = context.model
        counts = [
            model.ops.step_l0(latents, activation.log_thresholds_L(), activation.step_bandwidth())
            for latents, activation in zip(context.result.latents_of_parts, model.activation_fns, strict=True)
        ]
        share_L = torch.cat([firing_L for _, firing_L in counts]) / context.input_BXiDi.shape[0]
        if context.whole.firing_share_L is not None:  # that of all parts, with the gradient of this one
            share_L = context.whole.firing_share_L.to(share_L.dtype) + share_L - share_L.detach()
        if self.pull == "batch":
            loss = (share_L.sum() / self.target - 1).square()
        else:
            l0_B = torch.stack([l0_B for l0_B, _ in counts]).sum(0)
            loss = (l0_B / self.target - 1).square().mean()
        if self.max_firing_share is not None:
            loss = loss + self.frequency_weight * (share_L / self.max_firing_share - 1).relu().mean()
        return sum(model.segments) * loss

    def missed(self, l0: float) -> str | None:
        return missed(f"{self.section}.target", l0, self.target)
