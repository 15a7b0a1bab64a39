"""The forward pass of a training step, up to the terms of the loss.

Axes: B tokens · Xi/Xo input/output crosscoding dims · Di/Do widths · L latents.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor

from crosscode.config.experiment import TrainConfig
from crosscode.evaluation.precision import autocast
from crosscode.models.base import BaseCrosscoder, ForwardResult
from crosscode.objectives.base import NOT_LOOKED_AT, LossContext, Objective, WholeBatch
from crosscode.trainers.firing import FiringTracker

Terms = dict[str, Tensor]
"""The terms of a loss by name, before their coefficients; differentiable."""


class ForwardPass:
    """Runs in the precision that is configured, and through torch.compile where that is."""

    def __init__(self, model: BaseCrosscoder, objective: Objective, firing: FiringTracker, config: TrainConfig):
        self.model, self.objective, self.firing, self.config = model, objective, firing, config
        self._whole, self._part = self._eager_whole, self._eager_part
        self.longest_silence: int | None = None
        if config.compile:
            self._whole, self._part = torch.compile(self._whole), torch.compile(self._part)
        for part in {model, *model.parts}:  # the choice of a backend cannot be traced
            _ = part.ops

    def __call__(self, input_BXiDi: Tensor, target_BXoDo: Tensor) -> tuple[ForwardResult, Terms]:
        """Of a whole batch, of which the firing counts take note. `announce` comes before."""
        with self.autocast():
            return self._whole(input_BXiDi, target_BXoDo)

    def announce(self, n_tokens: int) -> None:
        """Before each step: the size of its batch, from which a bound on the latents' silence follows."""
        if not self.config.compile:  # a number that grows would be traced again and again
            self.longest_silence = self.firing.longest_silence(n_tokens)

    def part(self, input_BXiDi: Tensor, target_BXoDo: Tensor, whole: WholeBatch) -> tuple[ForwardResult, Terms]:
        """Of a part of a batch; `whole` is what is known of all of it."""
        with self.autocast():
            return self._part(input_BXiDi, target_BXoDo, whole)

    def autocast(self) -> AbstractContextManager[object]:
        return autocast(self.config.precision, self.model.device)

    def _eager_whole(self, input_BXiDi: Tensor, target_BXoDo: Tensor) -> tuple[ForwardResult, Terms]:
        forward = self.model.forward_train(input_BXiDi)
        self.firing.update(forward.latents)
        return forward, self._terms(input_BXiDi, target_BXoDo, forward)

    def _eager_part(self, input_BXiDi: Tensor, target_BXoDo: Tensor, whole: WholeBatch) -> tuple[ForwardResult, Terms]:
        forward = self.model.forward_train(input_BXiDi)
        return forward, self._terms(input_BXiDi, target_BXoDo, forward, whole)

    def _terms(
        self,
        input_BXiDi: Tensor,
        target_BXoDo: Tensor,
        forward: ForwardResult,
        whole: WholeBatch = NOT_LOOKED_AT,
    ) -> Terms:
        context = LossContext(
            self.model, input_BXiDi, target_BXoDo, forward, self.firing.tokens_since_fired_L, whole,
            self.config.dead_after_tokens, self.longest_silence,
        )  # fmt: skip
        return self.objective.values(context)
