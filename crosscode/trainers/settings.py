"""What a trainer is given: numbers, a stream of activations, a way to evaluate.

Axes: B tokens · M models · P hookpoints · D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from crosscode.evaluation.evaluation import EvaluationResult
from crosscode.evaluation.precision import Precision
from crosscode.models.base import BaseCrosscoder


class ActivationSource(Protocol):
    """What the trainer needs of a dataloader: scaled `acts_BMPD`, and a position that can be saved."""

    @property
    def scaling_MP(self) -> Tensor: ...
    def __iter__(self) -> Iterator[Tensor]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...
    def close(self) -> None: ...


Evaluate = Callable[[BaseCrosscoder, Tensor | None], EvaluationResult]
"""Held-out figures of a model and the `scaling_MP` that is not folded into it (None: it is folded in)."""


@dataclass(frozen=True)
class TrainerSettings:
    """Numbers of the loop; meanings as in `crosscode.config.experiment.TrainConfig`."""

    n_steps: int
    grad_accumulation: int = 1
    clip_grad_norm: float | None = 1.0
    dead_after_tokens: int = 1_000_000
    log_every: int = 50
    histogram_every: int | None = None
    evaluate_every: int | None = None
    checkpoint_every: int | None = None
    keep_last: int = 2
    keep_every: int | None = None
    max_skipped_steps: int = 0
    precision: Precision = field(default_factory=Precision)
    compile: bool = False
