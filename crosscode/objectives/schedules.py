"""Coefficients as plain functions of the training step. No torch here: a schedule is its own config."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt

from crosscode.config.registry import ConfigModel


class Constant(ConfigModel):
    """The same value at every step."""

    type: Literal["constant"] = "constant"
    value: NonNegativeFloat
    """the coefficient"""

    def __call__(self, step: int, n_steps: int) -> float:
        return self.value


class LinearRamp(ConfigModel):
    """From `start` at step 0 in a straight line to `value`, then stays.

    The ramp ends after `ramp_steps` steps if given, else after `ramp_fraction` of the run.
    """

    type: Literal["linear_ramp"] = "linear_ramp"
    value: NonNegativeFloat
    """the final coefficient"""
    start: NonNegativeFloat = 0.0
    """the coefficient at step 0"""
    ramp_steps: NonNegativeInt | None = None
    """steps until the final value; None: use ramp_fraction"""
    ramp_fraction: NonNegativeFloat = 1.0
    """share of the run until the final value"""

    def __call__(self, step: int, n_steps: int) -> float:
        length = self.ramp_steps if self.ramp_steps is not None else self.ramp_fraction * n_steps
        share = 1.0 if length <= 0 else min(step / length, 1.0)
        return self.start + (self.value - self.start) * share


class WarmUp(ConfigModel):
    """0 for `wait_fraction` of the run, then in a straight line to `value` over `warmup_fraction`, then stays."""

    type: Literal["warm_up"] = "warm_up"
    value: NonNegativeFloat
    """the final coefficient"""
    wait_fraction: float = Field(default=0.0, ge=0, le=1)
    """share of the run in which the coefficient is 0"""
    warmup_fraction: float = Field(default=0.05, ge=0, le=1)
    """share of the run in which it rises"""

    def __call__(self, step: int, n_steps: int) -> float:
        past = step - self.wait_fraction * n_steps
        length = self.warmup_fraction * n_steps
        if past < 0:
            return 0.0
        return self.value if past >= length else self.value * past / length


Schedule = Annotated[Constant | LinearRamp | WarmUp, Field(discriminator="type")]
Weight = NonNegativeFloat | Schedule
"""What a config may give as a coefficient: a number, or a schedule."""


def as_schedule(weight: Weight | Callable[[int, int], float]) -> Callable[[int, int], float]:
    """`(step, n_steps) -> coefficient`; a number is that at every step."""
    return Constant(value=float(weight)) if isinstance(weight, (int, float)) else weight
