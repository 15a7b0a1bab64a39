"""What a trainer needs of its stream of activations.

Axes: B tokens · M models · P hookpoints · D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from torch import Tensor

from crosscode.errors import InputError


class ActivationSource(Protocol):
    """Scaled `acts_BMPD`, and a position in the stream that can be saved."""

    @property
    def scaling_MP(self) -> Tensor: ...
    def __iter__(self) -> Iterator[Tensor]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...
    def close(self) -> None: ...


def next_batch(batches: Iterator[Tensor], step: int, n_steps: int) -> Tensor | None:
    """`acts_BMPD` of a step, None at the end of the data or of training.

    Raises:
        InputError: there is not even a first batch.
    """
    acts_BMPD = next(batches, None) if step < n_steps else None
    if acts_BMPD is None and step == 0:
        raise InputError(
            "data: the text does not give the activations of one batch; give more, or lower train.batch_size"
        )
    return acts_BMPD
