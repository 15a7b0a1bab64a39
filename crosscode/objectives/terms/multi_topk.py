"""Multi-TopK: the reconstruction from more latents counts as well (Gao et al. 2024, arXiv:2406.04093, appendix A.4)."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveInt
from torch import Tensor

from crosscode.config.registry import ConfigModel
from crosscode.errors import InputError
from crosscode.models.base import BaseCrosscoder
from crosscode.objectives.base import TERMS, LossContext, LossTerm
from crosscode.objectives.schedules import Weight


@TERMS.register
class MultiTopkTerm(LossTerm):
    """The reconstruction error with `factor * k` latents: with `recon`, `L(k) + L(4 k) / 8`."""

    class Config(ConfigModel):
        type: Literal["multi_topk"] = "multi_topk"
        weight: Weight = 1 / 8
        """coefficient: a number or a schedule"""
        factor: PositiveInt = 4
        """by what k is multiplied"""
        normalise: bool = False
        """divide by the target's variance over the batch, as `recon.normalise` does"""

    capturable = True

    def setup(self) -> None:
        self.k_factors, self.needs_whole_batch = (self.factor,), self.normalise

    def check_model(self, model: BaseCrosscoder) -> None:
        for activation in model.activation_fns:
            if not activation.keeps_k:
                raise InputError(
                    "objective.multi_topk: needs crosscoder.activation.type 'topk' or 'batch_topk', "
                    f"got {activation.type_name()!r}"
                )

    def __call__(self, context: LossContext) -> Tensor:
        model = context.model
        with model.k_multiplied(self.factor):
            loss = model.forward_train(context.input_BXiDi).recon_loss(context.target_BXoDo).loss
        return context.per_target_variance(loss) if self.normalise else loss
