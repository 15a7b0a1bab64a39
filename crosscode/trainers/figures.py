"""Figures of training, read at logged steps only.

Axes: B tokens · Xo output crosscoding dims · Do width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from crosscode.evaluation.fvu import FvuAccumulator
from crosscode.models.base import ForwardResult
from crosscode.objectives.base import Loss
from crosscode.trainers.phases import peak_memory_gib
from crosscode.trainers.summary import tokens_per_s


class BatchFigures:
    """Of one batch. Collects over the parts of a batch; `values` waits for the device."""

    def __init__(self, out_dims: tuple[int, ...]):
        self._fvu = FvuAccumulator(out_dims)
        self._n_active: Tensor | int = 0
        self._n_tokens = 0

    @torch.no_grad()
    def observe(self, target_BXoDo: Tensor, forward: ForwardResult) -> None:
        self._fvu.update(target_BXoDo, forward.output_BXoDo)
        self._n_active = self._n_active + forward.latents.l0_B().sum()
        self._n_tokens += target_BXoDo.shape[0]

    def values(self, loss: Loss, position_names: Sequence[str]) -> dict[str, Any]:
        fvu_X = self._fvu.fvu_Xo().flatten().tolist()
        return {
            "loss": loss.total.item(),
            **{f"loss/{name}": value.item() for name, value in loss.parts.items()},
            **{f"weight/{name}": float(value) for name, value in loss.weights.items()},
            "fvu": self._fvu.fvu(),
            **{f"fvu/{name}": value for name, value in zip(position_names, fvu_X, strict=True)},
            "l0": float(self._n_active) / self._n_tokens,
        }


def training_metrics(trainer: Any, of_batch: dict[str, Any], grad_norm: Tensor) -> dict[str, Any]:
    """A row of the metrics of a `Trainer`; means of time are those since the last one."""
    trainer.firing.look()
    return {
        **of_batch,
        **trainer.objective.figures(),
        "dead_fraction": trainer.firing.dead_fraction(trainer.config.dead_after_tokens).item(),
        "lr": float(trainer.optimizer.param_groups[0]["lr"]),
        "grad_norm": grad_norm.item(),
        "skipped_steps": trainer.guard.n_skipped,
        "tokens_per_s": tokens_per_s(trainer.counts()),
        "elapsed_s": trainer.phases.training_s,
        **trainer.phases.take_means(),
        **peak_memory_gib(trainer.model.device),
    }
