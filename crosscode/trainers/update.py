"""One update of the weights: forward, backward, constraints, clipping, the guard, the optimizer.

All of it that changes from step to step comes in as arguments or lies in memory of the device, so that what one update launched
can be launched again (`graphs`).

Axes: B tokens · Xi/Xo input/output crosscoding dims · Di/Do widths.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from crosscode_kernels.row_sparse_adam import clip_grad_norm_
from torch import Tensor
from torch.optim import Optimizer

from crosscode.objectives.base import Coefficients, Loss
from crosscode.trainers.accumulation import BatchInParts, Observer
from crosscode.trainers.constraints import Constraint, constrain
from crosscode.trainers.faults import FiniteGuard
from crosscode.trainers.forward import ForwardPass
from crosscode.trainers.whole_batch import tracks_batches


class Numbers(NamedTuple):
    """What a step needs of the schedules; tensors are scalars on the device."""

    step: int | Tensor
    coefficients: Coefficients


class Update:
    """Of the model and with the objective that `forward` has."""

    def __init__(
        self, forward: ForwardPass, constraints: Sequence[Constraint], guard: FiniteGuard, optimizer: Optimizer
    ):
        self.forward, self.constraints, self.guard, self.optimizer = forward, constraints, guard, optimizer
        self.model, self.objective, self.config = forward.model, forward.objective, forward.config
        n_parts = self.config.grad_accumulation
        self.in_parts = BatchInParts(forward, n_parts) if n_parts > 1 else None
        self.tracks_batches = tracks_batches(self.model)
        self.travelling = {id(p) for group in optimizer.param_groups if group.get("travel") for p in group["params"]}

    def __call__(
        self, input_BXiDi: Tensor, target_BXoDo: Tensor, numbers: Numbers, observers: Sequence[Observer] = ()
    ) -> tuple[Loss, Tensor]:
        """The loss, detached, and the norm that the gradient had. `ForwardPass.announce` comes before."""
        if self.in_parts is None:
            forward, terms = self.forward(input_BXiDi, target_BXoDo)
            loss = self.objective.weigh(terms, numbers.coefficients)
            loss.total.backward()
            loss = loss.detached()
            if self.tracks_batches:
                self.model.after_step(forward.latents)
            for observe in observers:
                observe(target_BXoDo, forward)
            del forward, terms  # the optimizer may need the memory
        else:
            loss = self.in_parts.backward(input_BXiDi, target_BXoDo, numbers.coefficients, observers)
        for constraint in reversed(self.constraints):
            constraint.after_backward(self.model)
        total_norm = self._norm_without_thresholds if self.travelling else self.model.ops.total_norm
        clip = (self.config.clip_grad_norm, self.optimizer, total_norm)
        grad_norm = clip_grad_norm_(self.model.parameters(), *clip)
        for constraint in self.constraints:
            constraint.before_step(self.model)
        self.guard.before_optimizer(numbers.step, loss.weighted_parts(), grad_norm, self.optimizer, self.model)
        self.optimizer.step()
        constrain(self.constraints, self.model)
        self.optimizer.zero_grad(set_to_none=True)
        return loss, grad_norm

    def _norm_without_thresholds(self, norms_P: Tensor, params: Sequence[Tensor]) -> Tensor:
        """The 2-norm of all gradients but those of thresholds whose steps the run's length gives (`lr_groups`).

        The pull on these is hundreds of times the gradient of the weights until L0 has come to its target. If it counted, the
        weights' gradients would be clipped to almost nothing until then, and Adam would take them for far too large when it ends:
        the reconstruction, and L0 with it, breaks down.
        """
        counted = [
            0 * norm if id(p) in self.travelling else norm for norm, p in zip(norms_P.unbind(), params, strict=True)
        ]
        return self.model.ops.total_norm(torch.stack(counted), params)  # 0 times what is not finite is seen
