"""A model between raw activations.

Axes: B tokens · M models · P hookpoints · D width · Xi/Xo input/output crosscoding dims · Di/Do widths.
"""

from __future__ import annotations

from typing import Self

from torch import Tensor

from crosscode.models.base import BaseCrosscoder
from crosscode.models.split import Split


class RawModel:
    """A model that takes and gives raw activations; in eval mode within the block.

    Args:
        model: either folded, or in training, with the scaling in `scaling_MP`.
    """

    def __init__(self, model: BaseCrosscoder, split: Split, scaling_MP: Tensor | None):
        self.model, self.split, self._scaling_MP = model, split, scaling_MP
        self._was_training = model.training

    def __enter__(self) -> Self:
        self.model.eval()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.model.train(self._was_training)

    def input(self, raw_BMPD: Tensor) -> Tensor:
        """`input_BXiDi` as the model takes it."""
        scaled_BMPD = raw_BMPD if self._scaling_MP is None else raw_BMPD * self._scaling_MP.to(raw_BMPD)[..., None]
        return self.split.activations(scaled_BMPD)[0]

    def raw(self, output_BXoDo: Tensor) -> Tensor:
        """The model's output in the space of raw activations."""
        if self._scaling_MP is None:
            return output_BXoDo
        return output_BXoDo / self.split.scaling(self._scaling_MP.to(output_BXoDo))[1][..., None]
