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

    def __call__(self, context: LossContext) -> Tensor:
        return context.recon.loss
