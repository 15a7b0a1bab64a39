"""Schedule-free SignSGD: steps of equal size in every coordinate, evaluated at their running average.

Defazio et al. 2024, "The Road Less Scheduled" (arXiv:2405.15682), through the `schedulefree` package, with the sign of
the gradient in place of the gradient (as EleutherAI's sparsify trains).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from pydantic import Field, PositiveFloat
from schedulefree import SGDScheduleFree

from crosscode.config.registry import ConfigModel
from crosscode.models.base import BaseCrosscoder
from crosscode.trainers.optimizers.base import OPTIMIZERS, OptimizerPlan, lr_groups, warmup_and_decay

_WEIGHT = "training_weight"
"""in a saved state: the weight at which gradients are taken, where the saved model has the average"""


class _SignSGD(SGDScheduleFree):
    def _params(self) -> list[torch.nn.Parameter]:
        return [param for group in self.param_groups for param in group["params"]]

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.register_state_dict_post_hook(lambda _, found: self._with_weights(found))  # before what ranks do to it

    def _with_weights(self, found: dict[str, Any]) -> dict[str, Any]:
        weights = {i: {_WEIGHT: param.detach()} for i, param in enumerate(self._params())}
        return {**found, "state": {i: {**found["state"].get(i, {}), **weight} for i, weight in weights.items()}}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for param in self._params():  # a state of before has none: its model has these weights
            weight = self.state[param].pop(_WEIGHT, None)
            if weight is not None:
                param.copy_(weight)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    param.grad.sign_()
        return super().step(closure)


@OPTIMIZERS.register
class SignSGDScheduleFree(OptimizerPlan):
    """Schedule-free SignSGD: no decay, no second moment, half of Adam's memory. Gradient clipping has no effect."""

    class Config(ConfigModel):
        type: Literal["sign_sgd_schedule_free"] = "sign_sgd_schedule_free"
        lr: PositiveFloat | None = None
        """learning rate; null: 5e-3 / sqrt(n_latents / 2**14)"""
        momentum: float = Field(default=0.95, gt=0, lt=1)
        """share of the running average in the weights at which gradients are taken"""
        warmup_fraction: float = Field(default=0.05, ge=0, le=1)
        """share of the run over which the learning rate rises from 0"""
        threshold_lr_factor: PositiveFloat | None = None
        """factor on the learning rate of activation parameters (JumpReLU thresholds); null: 1, and for linear thresholds at
        least what lets them travel by 3 within the run"""

    def build(self, model: BaseCrosscoder) -> torch.optim.Optimizer:
        lr = 5e-3 / math.sqrt(model.n_latents / 2**14) if self.lr is None else self.lr
        optimizer = _SignSGD(lr_groups(model, lr, self.threshold_lr_factor), lr=lr, momentum=self.momentum)
        self.start_training(optimizer)
        return optimizer

    def lr_factor(self, step: int, n_steps: int) -> float:
        return warmup_and_decay(step, n_steps, self.warmup_fraction, 0.0)

    def forget_rows(self, optimizer: torch.optim.Optimizer, param: torch.Tensor, rows_R: torch.Tensor) -> None:
        """The iterate and the average are the new weights, too."""
        if "z" in optimizer.state.get(param, {}):
            optimizer.state[param]["z"][rows_R] = param.detach()[rows_R]

    def start_training(self, optimizer: torch.optim.Optimizer) -> None:
        assert isinstance(optimizer, _SignSGD)
        optimizer.train()

    def start_evaluation(self, optimizer: torch.optim.Optimizer) -> None:
        assert isinstance(optimizer, _SignSGD)
        optimizer.eval()

    @contextmanager
    def evaluated(self, optimizer: torch.optim.Optimizer, constrain: Callable[[], None]) -> Iterator[None]:
        assert isinstance(optimizer, _SignSGD)
        params = optimizer._params()
        before = [param.detach().clone() for param in params]
        self.start_evaluation(optimizer)
        try:
            constrain()
            yield
        finally:
            self.start_training(optimizer)
            with torch.no_grad():
                for param, weight in zip(params, before, strict=True):
                    param.copy_(weight)
