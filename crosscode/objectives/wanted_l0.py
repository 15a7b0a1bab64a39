"""A penalty whose coefficient finds the wanted L0 by itself, and what is said of a run that misses it.

A proportional and integral controller on the logarithm of a factor, once a step from the L0 of the whole batch:

    e = log(l0 / target), clipped to +-1;  I = -GAIN at first, I += RATE e;  factor = exp(I + GAIN e)

L0 falls with the logarithm of a penalty's coefficient at a slope that differs little between data sets, which is why one
rate and one gain do. It starts far above the target and comes down at its own pace, whatever the coefficient: a saturated tanh
has no gradient, and Adam's steps are as large as its learning rate. So the factor begins at 1 where L0 is e times its target or
more, and falls as L0 does; and while the coefficient still rises by itself, an L0 that is too large moves I at a tenth of the
rate. All of it stays on the device.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from pydantic import PositiveFloat
from torch import Tensor

from crosscode.errors import InputError
from crosscode.models.base import BaseCrosscoder
from crosscode.objectives.base import LossContext, LossTerm
from crosscode.objectives.groups import SharedRatioConfig, check_shared_ratio

RATE, GAIN, WHILE_RISING = 0.03, 3.0, 0.1
TOLERANCE = 0.3
"""An L0 that ends further off its target than this is worth a word."""


def missed(name: str, l0: float, target: float) -> str | None:
    """What to say of a run that ended with this L0; None: nothing."""
    off = l0 / target - 1
    if abs(off) <= TOLERANCE:
        return None
    side = "above" if off > 0 else "below"
    return f"{name} = {target:g}: the run ended with L0 {l0:.1f}, {abs(off):.0%} {side} it; train for more steps"


def check_target(name: str, target: float, model: BaseCrosscoder) -> None:
    """Raise `InputError` for more latents than there are."""
    if target > model.n_latents:
        raise InputError(f"{name} = {target}: must not exceed n_latents = {model.n_latents}")


class PenaltyConfig(SharedRatioConfig):
    """Config of a penalty that may aim at an L0."""

    target_l0: PositiveFloat | None = None
    """wanted number of active latents of a token, which a controller finds by a factor on the coefficient (`factor/TERM` in the
    metrics); null: the coefficient is what `weight` says"""


class Penalty(LossTerm):
    """A sparsity penalty, times the controller's factor where there is a target."""

    def setup(self) -> None:
        self._log_factors = torch.tensor([-GAIN, 0.0])  # the integral, and with what is proportional besides

    def check_model(self, model: BaseCrosscoder) -> None:
        check_shared_ratio(self.type_name(), model, self.shared_ratio)
        if self.target_l0 is not None:
            check_target(f"{self.section}.target_l0", self.target_l0, model)
            self._log_factors = self._log_factors.to(model.device)

    def __call__(self, context: LossContext) -> Tensor:
        penalty = self.penalty(context)
        return penalty if self.target_l0 is None else penalty * self._log_factors[1].exp()

    @abstractmethod
    def penalty(self, context: LossContext) -> Tensor:
        """A scalar, before any coefficient."""

    @torch.no_grad()
    def after_step(self, l0: Tensor) -> None:
        if self.target_l0 is None:
            return
        error = (l0 / self.target_l0).clamp(min=1e-30).log().clamp(-1, 1)
        integral = self._log_factors[0] + RATE * (torch.minimum(error, WHILE_RISING * error) if self.rising else error)
        self._log_factors = torch.stack([integral, integral + GAIN * error])

    def figures(self) -> dict[str, float]:
        return {} if self.target_l0 is None else {"factor": self._log_factors[1].exp().item()}

    def missed(self, l0: float) -> str | None:
        return None if self.target_l0 is None else missed(f"{self.section}.target_l0", l0, self.target_l0)

    def state_dict(self) -> dict[str, Any]:
        return {} if self.target_l0 is None else {"log_factors": self._log_factors}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._log_factors = state["log_factors"].to(self._log_factors.device)
