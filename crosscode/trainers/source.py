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


def check_has_begun(acts_BMPD: Tensor | None, step: int) -> None:
    """Raise `InputError` where the data are at their end before the first step."""
    if acts_BMPD is None and step == 0:
        raise InputError(
            "data: the text does not give the activations of one batch; give more, or lower train.batch_size"
        )
