"""Losses and gradients that are not finite: kept away from the weights, and told at the next logged step.

Nothing here waits for the device except `check`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from crosscode.errors import CrosscodeError

log = logging.getLogger("crosscode")

GRADIENT = "the gradient norm"


class NonFiniteLoss(CrosscodeError):
    """A loss term or the gradient became infinite or NaN; names the step and the term."""


class FiniteGuard:
    """Leaves out optimizer steps whose loss or gradient is not finite.

    Optimizers that know `found_inf` (torch's fused ones) leave everything as it was. Others get a gradient of zero:
    momentum moves the weights on as if the gradient had been small.

    Args:
        max_skipped: how many steps may be left out in a whole run before training stops.
    """

    def __init__(self, device: torch.device, max_skipped: int = 0):
        self.device, self.max_skipped = device, max_skipped
        self.n_skipped = 0
        self._note([])

    def _note(self, names: list[str]) -> None:
        # Of the steps since the last check, on the device: how many were bad, and for each name the first bad step
        # (-1: none) with its value. They stay where they are, which graphs know.
        self._names, n = names, len(names)
        self._n_bad = torch.zeros((), dtype=torch.int64, device=self.device)
        self._first_step_T = torch.full((n,), -1, dtype=torch.int64, device=self.device)
        self._first_value_T = torch.zeros(n, dtype=torch.float32, device=self.device)

    @torch.no_grad()
    def before_optimizer(
        self,
        step: int | Tensor,
        weighted_parts: Mapping[str, Tensor],
        grad_norm: Tensor,
        optimizer: torch.optim.Optimizer,
        model: nn.Module,
    ) -> None:
        """Take note of a step, and arrange for the optimizer to leave the weights alone if it is bad."""
        names = [*weighted_parts, GRADIENT]
        if names != self._names:
            self._note(names)
        value_T = torch.stack([value.float() for value in (*weighted_parts.values(), grad_norm)])
        bad_T = ~value_T.isfinite()
        is_bad = bad_T.any()
        self._n_bad += is_bad
        is_first_T = bad_T & (self._first_step_T < 0)
        self._first_step_T += is_first_T * (step + 1)  # from -1
        torch.where(is_first_T, value_T, self._first_value_T, out=self._first_value_T)
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            optimizer.found_inf = is_bad.float()  # pyright: ignore[reportAttributeAccessIssue]
            return
        for param in model.parameters():
            if param.grad is not None:
                grad = param.grad._values() if param.grad.is_sparse else param.grad
                grad.masked_fill_(is_bad, 0)

    def check(self, last_checkpoint: str) -> None:
        """Read what was noted since the last check.

        Raises:
            NonFiniteLoss: more steps were bad than may be left out.
        """
        n_bad = int(self._n_bad)
        if n_bad == 0:
            return
        steps, values = self._first_step_T.tolist(), self._first_value_T.tolist()
        first = min((step, i) for i, step in enumerate(steps) if step >= 0)[1]
        what = self._names[first] if self._names[first] == GRADIENT else f"loss term {self._names[first]!r}"
        found = f"{what} is {values[first]} at step {steps[first]}"
        self._n_bad.zero_()
        self._first_step_T.fill_(-1)
        self.n_skipped += n_bad
        if self.n_skipped > self.max_skipped:
            allowed = f" ({self.n_skipped} bad steps, train.max_skipped_steps = {self.max_skipped})"
            raise NonFiniteLoss(
                f"{found}: training stopped{allowed if self.max_skipped else ''}; it did not reach the "
                f"weights; the last checkpoint is {last_checkpoint}; try a lower optimizer.lr, or leave far-out activations "
                "out (data.max_norm_ratio)"
            )
        log.warning("%s: %d step(s) left out, %d of %d allowed", found, n_bad, self.n_skipped, self.max_skipped)

    def state_dict(self) -> dict[str, Any]:
        return {"n_skipped": self.n_skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.n_skipped = state["n_skipped"]
