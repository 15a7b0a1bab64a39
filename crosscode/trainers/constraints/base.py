"""What a constraint is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from crosscode.config.registry import ConfigModel, Registry, type_of
from crosscode.models.base import BaseCrosscoder


class Constraint(ABC):
    """Keeps weights where they belong. A subclass is one file in this folder.

    The trainer calls `check_model` and `start` once, `after_backward` between backward and gradient clipping, and
    `after_step` behind the optimizer.
    """

    Config: ClassVar[type[ConfigModel]]

    def check_model(self, model: BaseCrosscoder) -> None:  # noqa: B027
        """Raise `InputError` where this constraint cannot hold for the model."""

    def start(self, model: BaseCrosscoder) -> None:
        """Make the constraint hold before the first step."""
        self.after_step(model)

    @abstractmethod
    def after_backward(self, model: BaseCrosscoder) -> None:
        """Change gradients so that the optimizer's step keeps the constraint as far as it can."""

    @abstractmethod
    def after_step(self, model: BaseCrosscoder) -> None:
        """Make the constraint hold exactly."""

    @classmethod
    def type_name(cls) -> str:
        return type_of(cls.Config)


CONSTRAINTS: Registry[Any] = Registry("constraint", __package__ or "")
