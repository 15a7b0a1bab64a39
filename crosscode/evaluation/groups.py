"""Held-out figures apart for each group of tokens: by the text that they come from, by who says them.

B tokens · G ways to group · Xo output crosscoding dims.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from crosscode.evaluation.fvu import FvuAccumulator

Groupings = Mapping[str, Sequence[str]]
"""Ways to group tokens (source, role), each with the names of its groups by their numbers."""


@dataclass(frozen=True)
class GroupFigures:
    """Of the tokens of one group: `fvu` with the group's own variance."""

    n_tokens: int
    fvu: float
    fvu_by_position: dict[str, float]
    l0: float


class GroupSums:
    """Sums over a held-out set, a set of them for each group that occurs."""

    def __init__(self, out_dims: tuple[int, ...], groupings: Groupings):
        self._out_dims, self._groupings = out_dims, groupings
        self._of: dict[tuple[str, int], tuple[FvuAccumulator, list[Tensor]]] = {}

    def add(self, group_BG: Tensor, target_BXoDo: Tensor, output_BXoDo: Tensor, l0_B: Tensor) -> None:
        for g, kind in enumerate(self._groupings):
            for number in group_BG[:, g].unique().tolist():
                fvu, l0_parts = self._of.setdefault((kind, number), (FvuAccumulator(self._out_dims), []))
                of_group_B = (group_BG[:, g] == number).to(target_BXoDo.device)
                fvu.update(target_BXoDo[of_group_B], output_BXoDo[of_group_B])
                l0_parts.append(l0_B[of_group_B])

    def result(self, position_names: Sequence[str]) -> dict[str, dict[str, GroupFigures]]:
        """By kind and group, where there are several groups."""
        found: dict[str, dict[str, GroupFigures]] = {}
        for (kind, number), (fvu, l0_parts) in sorted(self._of.items(), key=lambda item: item[0][1]):
            fvu_X = fvu.fvu_Xo().flatten().tolist()
            found.setdefault(kind, {})[self._groupings[kind][number]] = GroupFigures(
                fvu.n_tokens,
                fvu.fvu(),
                dict(zip(position_names, fvu_X, strict=True)),
                float(torch.cat(l0_parts).double().mean()),
            )
        return {kind: found[kind] for kind in self._groupings if len(found.get(kind, ())) > 1}
