"""A penalty whose coefficient finds the wanted L0 by itself, and what is said of a run that misses it.

A proportional and integral controller on the logarithm of a factor, once a step from the L0 of the whole batch:

    e = log(l0 / target);  I += RATE g;  factor = exp(I + GAIN e), here with e clipped to +-NEAR

`g` is the part of e (clipped to +-1) that the pace of log l0 over the last `PACE` steps leaves over until three quarters of the
run: 0 where L0 gets there by itself. It starts far above the target and comes down at its own pace, whatever the coefficient: a
saturated tanh has no gradient, Adam's steps are as large as its learning rate, and thresholds may have a smaller one. An
integral of all of e would grow meanwhile, and under a factor of 50 JumpReLU comes down more slowly than under 1 and
reconstructs badly. So no e counts for more than NEAR in the proportional part, and while the coefficient still rises by itself,
an L0 that is too large moves I at a tenth of the rate.

Where thresholds learn, what was driven below one hardly comes back: on the demo pair L0 fell on from 24 to 21 while the factor
fell from 0.5 to 0.06. So there a foreseen L0 beyond the target counts while L0 is still further off than NEAR, with the other
sign: the penalty eases early. It comes back at QUICK times the rate, up to its own weight, where L0 would not get there without
it; and the pace is one of the last tenth of the steps, whose noise counts for no more in longer runs.

GAIN and RATE are those of Tyreus and Luyben (1992) for a loop that swings by itself at a gain of 3 with a period of 32 steps, as
L1 did on the demo pair: 3 / 3.2 and that over 2.2 x 32. Other penalties answer more slowly. All of it stays on the device.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

import torch
from pydantic import PositiveFloat
from torch import Tensor

from crosscode.errors import InputError
from crosscode.models.base import BaseCrosscoder
from crosscode.objectives.base import LossContext, LossTerm
from crosscode.objectives.groups import SharedRatioConfig, check_shared_ratio

GAIN, RATE = 3 / 3.2, 3 / 3.2 / (2.2 * 32)
NEAR, WHILE_RISING, QUICK = 0.3, 0.1, 4.0
PACE, UNTIL, MOST = 30, 0.75, 3.0
"""Least steps of a pace, share of the run by which L0 should be there, what the integral stays within."""
TOLERANCE = 0.3
"""An L0 that ends further off its target than this is worth a word."""


def missed(name: str, l0: float, target: float, would_help: str = "train for more steps") -> str | None:
    """What to say of a run that ended with this L0; None: nothing."""
    off = l0 / target - 1
    if abs(off) <= TOLERANCE:
        return None
    side = "above" if off > 0 else "below"
    return f"{name} = {target:g}: the run ended with L0 {l0:.1f}, {abs(off):.0%} {side} it; {would_help}"


def check_target(name: str, target: float, model: BaseCrosscoder) -> None:
    """Raise `InputError` for more latents than there are, or than the activation keeps."""
    if target > model.n_latents:
        raise InputError(f"{name} = {target}: must not exceed n_latents = {model.n_latents}")
    of_parts = [activation.most_kept for activation in model.activation_fns]
    most = of_parts[0] if model.selects_over_parts else sum(of_parts)
    if target > most:
        kind = model.activation_fns[0].type_name()
        raise InputError(f"{name} = {target}: crosscoder.activation = {kind!r} keeps at most {most} latents of a token")


class PenaltyConfig(SharedRatioConfig):
    """Config of a penalty that may aim at an L0."""

    target_l0: PositiveFloat | None = None
    """wanted number of active latents of a token, which a controller finds by a factor on the coefficient (`factor/TERM` in the
    metrics); null: the coefficient is what `weight` says"""


class Penalty(LossTerm):
    """A sparsity penalty, times the controller's factor where there is a target."""

    def setup(self) -> None:
        self.draws_l0 = self.target_l0 is not None
        self._one_way = False  # thresholds that learn: what was driven below one hardly comes back
        self._log_factors = torch.tensor([0.0, 0.0, math.nan])  # the integral, the whole, the recent mean of log l0

    def check_model(self, model: BaseCrosscoder) -> None:
        check_shared_ratio(self.type_name(), model, self.shared_ratio)
        if self.target_l0 is not None:
            check_target(f"{self.section}.target_l0", self.target_l0, model)
            self._one_way = any(True for activation in model.activation_fns for _ in activation.parameters())
            self._log_factors = self._log_factors.to(model.device)

    def __call__(self, context: LossContext) -> Tensor:
        penalty = self.penalty(context)
        return penalty if self.target_l0 is None else penalty * self._log_factors[1].exp()

    @abstractmethod
    def penalty(self, context: LossContext) -> Tensor:
        """A scalar, before any coefficient."""

    @torch.no_grad()
    def after_step(self, l0: Tensor, step: int, n_steps: int) -> None:
        if self.target_l0 is None:
            return
        integral, _, recent = self._log_factors
        log_l0 = l0.to(integral.dtype).clamp(min=1e-30).log()
        recent = torch.where(recent.isnan(), log_l0, recent)
        whole = log_l0 - math.log(self.target_l0)
        pace = (log_l0 - recent) / (max(PACE, step / 10) if self._one_way else PACE)
        foreseen = whole + pace * max(UNTIL * n_steps - step, 0)
        most, side = whole.abs().clamp(max=1), whole.sign()
        least = -most * (most > NEAR) if self._one_way else torch.zeros_like(most)
        left = side * (side * foreseen).clamp(least, most)
        slowly = WHILE_RISING if self.rising else 1.0
        rate = torch.where(integral < 0, QUICK, slowly) if self._one_way else slowly
        counted = torch.where(left > 0, rate * left, left)
        integral = (integral + RATE * counted).clamp(-MOST, MOST)
        found = torch.stack([integral, integral + GAIN * whole.clamp(-NEAR, NEAR), recent + pace])
        self._log_factors.copy_(found)  # in its place, which graphs know

    def figures(self) -> dict[str, float]:
        return {} if self.target_l0 is None else {"factor": self._log_factors[1].exp().item()}

    def missed(self, l0: float) -> str | None:
        if self.target_l0 is None:
            return None
        integral, name = float(self._log_factors[0]), f"{self.section}.target_l0"
        if integral != math.copysign(MOST, l0 - self.target_l0):
            return missed(name, l0, self.target_l0)
        end, then = "largest", "give a larger weight"
        if integral < 0:
            end, then = "least", "a smaller weight lowers L0 less, none raises it"
        of_factor = f"the factor on its weight is at its {end} ({math.exp(integral):.2g}): {then}"
        return missed(name, l0, self.target_l0, of_factor)

    def state_dict(self) -> dict[str, Any]:
        return {} if self.target_l0 is None else {"log_factors": self._log_factors}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        known = state["log_factors"].to(self._log_factors.device)
        self._log_factors = torch.cat([known, self._log_factors[len(known) :]])  # older files have no recent mean
