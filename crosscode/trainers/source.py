"""What a trainer needs of its stream of activations.

Axes: B tokens · M models · P hookpoints · D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from torch import Tensor


class ActivationSource(Protocol):
    """Scaled `acts_BMPD`, and a position in the stream that can be saved."""

    @property
    def scaling_MP(self) -> Tensor: ...
    def __iter__(self) -> Iterator[Tensor]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...
    def close(self) -> None: ...
