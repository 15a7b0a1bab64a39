"""Held-out figures of a group of tokens.

B tokens · Xo output crosscoding dims.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from crosscode.evaluation.fvu import FvuAccumulator


@dataclass(frozen=True)
class GroupFigures:
    """Of the tokens of one group: `fvu` with the group's own variance."""

    n_tokens: int
    fvu: float
    fvu_by_position: dict[str, float]
    l0: float


class GroupSums:
    """Sums over the held-out tokens of one group."""

    def __init__(self, out_dims: tuple[int, ...]):
        self._fvu = FvuAccumulator(out_dims)
        self._l0_parts: list[Tensor] = []

    def add(self, target_BXoDo: Tensor, output_BXoDo: Tensor, l0_B: Tensor) -> None:
        self._fvu.update(target_BXoDo, output_BXoDo)
        self._l0_parts.append(l0_B)

    def result(self, position_names: Sequence[str]) -> GroupFigures:
        fvu_X = self._fvu.fvu_Xo().flatten().tolist()
        return GroupFigures(
            self._fvu.n_tokens,
            self._fvu.fvu(),
            dict(zip(position_names, fvu_X, strict=True)),
            float(torch.cat(self._l0_parts).double().mean()),
        )
