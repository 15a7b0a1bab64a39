"""What a trainer needs of its stream of activations.

Axes: B tokens · M models · P hookpoints · D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from inspect import getattr_static
from typing import Any, Protocol

import torch
from torch import Tensor

from crosscode.errors import InputError


class ActivationSource(Protocol):
    """Scaled `acts_BMPD`, and a position in the stream that can be saved."""

    @property
    def scaling_MP(self) -> Tensor:
        """Factors that the batches were multiplied with (float32, on the CPU); they are folded into the trained model."""
        ...

    def __iter__(self) -> Iterator[Tensor]: ...
    def state_dict(self) -> dict[str, Any]:
        """The position after the batch that was handed out last."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a position: the next iterator gives the batches that followed it."""

    def close(self) -> None:
        """Let go of threads and files."""


def as_source(data: ActivationSource | Iterable[Tensor]) -> ActivationSource:
    """A source with all that a trainer asks for, from one that may lack some of it: batches `acts_BMPD` alone will do.

    Without `scaling_MP` the batches count as unscaled. Without `state_dict` the run trains, evaluates and saves its
    model; to go on with it from a checkpoint is refused.
    """
    names = ("scaling_MP", "state_dict", "load_state_dict", "close")
    # Looked up without asking: a dataloader reads activations to know its scaling.
    whole = all(getattr_static(data, name, None) is not None for name in names)
    return data if whole else _Completed(data)  # pyright: ignore[reportReturnType]


class _Completed:
    def __init__(self, data: Any):
        self._data = data
        self._ones_MP: Tensor | None = None

    def __iter__(self) -> Iterator[Tensor]:
        for acts_BMPD in self._data:
            self._ones_MP = torch.ones(acts_BMPD.shape[1:3])
            yield acts_BMPD

    @property
    def scaling_MP(self) -> Tensor:
        given = getattr(self._data, "scaling_MP", self._ones_MP)
        if given is None:
            raise InputError("data: has no scaling_MP, and gave no batch from which its number of positions is known")
        return given

    def state_dict(self) -> dict[str, Any]:
        own = self._data.state_dict() if hasattr(self._data, "state_dict") else None
        return {"own": own, "scaling_MP": self.scaling_MP}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["own"] is None or not hasattr(self._data, "load_state_dict"):
            raise InputError(
                f"resume: the source of this run ({type(self._data).__name__}) has no state_dict, so that nobody knows "
                "which of its activations were used; begin a new run with finetune_from"
            )
        self._data.load_state_dict(state["own"])

    def close(self) -> None:
        if hasattr(self._data, "close"):
            self._data.close()
