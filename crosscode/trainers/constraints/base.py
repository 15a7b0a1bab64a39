"""What a constraint is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from crosscode.config.registry import Configured, Registry
from crosscode.models.base import BaseCrosscoder


class Constraint(Configured, ABC):
    """Keeps weights where they belong. A subclass is one file in this folder.

    The trainer calls `check_model` and `start` once; `after_backward` between backward and gradient clipping, last
    constraint first (gradients pass backward through what `after_step` does); `before_step` between clipping and the
    optimizer; `after_step` behind it.
    """

    takes_row_sparse: bool = False
    """Whether it takes gradients that hold only the rows that a batch touches."""

    capturable: bool = False
    """Whether a step with it can be a CUDA graph: it launches the same in each. A subclass says so of itself."""

    def check_model(self, model: BaseCrosscoder) -> None:
        """Raise `InputError` where this constraint cannot hold for the model."""

    def start(self, model: BaseCrosscoder) -> None:
        """Make the constraint hold before the first step; `InputError` where it should and does not."""
        self.after_step(model)

    @abstractmethod
    def after_backward(self, model: BaseCrosscoder) -> None:
        """Change gradients so that the optimizer's step keeps the constraint as far as it can."""

    def before_step(self, model: BaseCrosscoder) -> None:
        """Change gradients in a way that their norm must not know of."""
        return None

    @abstractmethod
    def after_step(self, model: BaseCrosscoder) -> None:
        """Make the constraint hold exactly."""


CONSTRAINTS: Registry[Any] = Registry("constraints.{type}", __package__ or "")
