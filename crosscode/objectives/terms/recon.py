"""Reconstruction error."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from crosscode.config.registry import ConfigModel
from crosscode.objectives.base import TERMS, LossContext, LossTerm
from crosscode.objectives.schedules import Weight


@TERMS.register
class ReconTerm(LossTerm):
    """Squared error, summed over all output positions and their width, mean over the batch."""

    class Config(ConfigModel):
        type: Literal["recon"] = "recon"
        weight: Weight = 1.0
        """coefficient: a number or a schedule"""
        normalise: bool = False
        """divide by the target's variance over the batch (Gao et al. 2024); AuxK then weighs the same at any width"""

    capturable = True

    def setup(self) -> None:
        self.needs_whole_batch = self.normalise

    def __call__(self, context: LossContext) -> Tensor:
        loss = context.recon.loss
        return context.per_target_variance(loss) if self.normalise else loss
