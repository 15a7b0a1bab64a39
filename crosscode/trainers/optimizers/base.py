"""What an optimizer is: a plan of how to make a `torch.optim.Optimizer`, and its learning rate over the run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import nn

from crosscode.config.registry import ConfigModel, Registry


class OptimizerPlan(ABC):
    """A subclass is one file in this folder."""

    Config: ClassVar[type[ConfigModel]]

    @abstractmethod
    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer over the model's parameters, each group with its peak learning rate in `initial_lr`."""

    @abstractmethod
    def lr_factor(self, step: int, n_steps: int) -> float:
        """Factor on every group's `initial_lr` at a step."""

    def start_training(self, optimizer: torch.optim.Optimizer) -> None:  # noqa: B027
        """Put the weights in place at which gradients are taken."""

    def start_evaluation(self, optimizer: torch.optim.Optimizer) -> None:  # noqa: B027
        """Put the weights in place that are evaluated and kept (an average, for schedule-free optimizers)."""


def warmup_and_decay(step: int, n_steps: int, warmup_fraction: float, decay_fraction: float) -> float:
    """Linear from 0 over the first share of a run, constant, then linear to 0 over the last share.

    The first step already moves, and the last one still does.
    """
    warmup_steps, decay_steps = warmup_fraction * n_steps, decay_fraction * n_steps
    rising = min(1.0, (step + 1) / warmup_steps) if warmup_steps > 0 else 1.0
    falling = min(1.0, (n_steps - step) / decay_steps) if decay_steps > 0 else 1.0
    return rising * falling


OPTIMIZERS: Registry[Any] = Registry("optimizer", __package__ or "")
