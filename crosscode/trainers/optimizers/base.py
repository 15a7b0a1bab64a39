"""What an optimizer is: a plan of how to make a `torch.optim.Optimizer`, and its learning rate over the run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from crosscode.config.registry import Configured, Registry
from crosscode.models.base import BaseCrosscoder


class OptimizerPlan(Configured, ABC):
    """A subclass is one file in this folder."""

    row_sparse: bool | str = False
    """Whether it wants gradients of weights that hold only the rows that a batch touches; "auto": not yet known, so no."""
    fused: bool | str = False
    """Whether it takes gradients that are not computed yet ("deferred" of the Triton backend); "auto": where they are given."""
    lr_on_device: bool = False
    """Whether learning rates lie on the device, which graphs need."""
    states_per_weight: float = 1
    """Numbers that it keeps for each weight, in float32's."""

    def grads_per_weight(self, model: BaseCrosscoder) -> int:
        """1, or 0 where it takes gradients of this model's weights that are not computed before."""
        return 1

    @abstractmethod
    def build(self, model: BaseCrosscoder) -> torch.optim.Optimizer:
        """The optimizer over the model's parameters, each group with its peak learning rate in `initial_lr`.

        Raises:
            InputError: it cannot train this model.
        """

    @abstractmethod
    def lr_factor(self, step: int, n_steps: int) -> float:
        """Factor on every group's `initial_lr` at a step."""

    def can_be_captured(self, model: BaseCrosscoder) -> bool:
        """Whether a step of the optimizer for this model, with `lr_on_device`, can be part of a CUDA graph."""
        return False

    def set_learning_rate(self, optimizer: torch.optim.Optimizer, step: int, n_steps: int) -> None:
        """Before a step. What must be able to travel goes on to the end: the weights' last steps move L0 as well."""
        factor = self.lr_factor(step, n_steps)
        for group in optimizer.param_groups:
            lr, before = max(group["initial_lr"] * factor, group.get("travel", 0.0) / n_steps), group["lr"]
            is_tensor = isinstance(before, torch.Tensor)  # of a state that was read: on the CPU
            group["lr"] = before.to(group["params"][0].device).fill_(lr) if is_tensor else lr

    def forget_rows(self, optimizer: torch.optim.Optimizer, param: torch.Tensor, rows_R: torch.Tensor) -> None:
        """What is kept of rows of a parameter that were set anew begins anew as well.

        Args:
            param: any parameter, (L, I) or of other axes behind L.
            rows_R: numbers of these rows, int64.
        """
        for kept in optimizer.state.get(param, {}).values():
            if isinstance(kept, torch.Tensor) and kept.shape == param.shape:
                kept[rows_R] = 0

    def start_training(self, optimizer: torch.optim.Optimizer) -> None:
        """Put the weights in place at which gradients are taken."""

    def start_evaluation(self, optimizer: torch.optim.Optimizer) -> None:
        """Put the weights in place that are evaluated and kept (an average, for schedule-free optimizers)."""

    def evaluated(
        self, optimizer: torch.optim.Optimizer, constrain: Callable[[], None]
    ) -> AbstractContextManager[None]:
        """Within the block those weights are in place, constrained; afterwards those of before, to the bit. Where they are
        others, the optimizer's state holds those of before."""
        return nullcontext()


def lr_groups(model: BaseCrosscoder, lr: float, threshold_lr_factor: float | None = None) -> list[dict[str, object]]:
    """Parameter groups: weights and biases at `lr`, parameters of activation functions at a factor of it; None: 1, or what
    takes them as far as the activation says within the run."""
    params_of = model.parameter_groups()
    travel = model.parts[0].activation_fn.threshold_travel if threshold_lr_factor is None else 0.0
    of_thresholds = lr * (1.0 if threshold_lr_factor is None else threshold_lr_factor)
    groups = [(params_of["weights"], lr, 0.0), (params_of["thresholds"], of_thresholds, travel)]
    return [{"params": p, "lr": lr, "initial_lr": lr, "travel": travel} for p, lr, travel in groups if p]


def warmup_and_decay(step: int, n_steps: int, warmup_fraction: float, decay_fraction: float) -> float:
    """Linear from 0 over the first share of a run, constant, then linear to 0 over the last share.

    The first step already moves, and the last one still does.
    """
    warmup_steps, decay_steps = warmup_fraction * n_steps, decay_fraction * n_steps
    rising = min(1.0, (step + 1) / warmup_steps) if warmup_steps > 0 else 1.0
    falling = min(1.0, (n_steps - step) / decay_steps) if decay_steps > 0 else 1.0
    return rising * falling


OPTIMIZERS: Registry[Any] = Registry("train.optimizer", __package__ or "")
