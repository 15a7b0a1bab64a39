"""Figures apart for each group of tokens: by the text that they come from, by who says them.

T tokens of any shape · G ways to group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Generic, TypeVar

from torch import Tensor

Groupings = Mapping[str, Sequence[str]]
"""Ways to group tokens (source, role), each with the names of its groups by their numbers."""
Sums = TypeVar("Sums")
Figures = TypeVar("Figures")


class ByGroup(Generic[Sums]):
    """Sums of each group that occurs, made when it first does."""

    def __init__(self, groupings: Groupings | None, make: Callable[[], Sums]):
        self._groupings, self._make = groupings or {}, make
        self._of: dict[tuple[str, int], Sums] = {}

    def of(self, group_TG: Tensor | None) -> Iterator[tuple[Sums, Tensor]]:
        """The sums of every group that occurs among tokens, with the places `of_group_T` of its own; none where the groups
        (numbers of each token's, in the order of the groupings) are not known."""
        for g, kind in enumerate(self._groupings if group_TG is not None else ()):
            number_T = group_TG[..., g]  # pyright: ignore[reportOptionalSubscript]
            for number in number_T.unique().tolist():
                if (kind, number) not in self._of:
                    self._of[kind, number] = self._make()
                yield self._of[kind, number], number_T == number

    def result(self, figures: Callable[[Sums], Figures]) -> dict[str, dict[str, Figures]]:
        """By kind and name of the group, where there are several."""
        found: dict[str, dict[str, Figures]] = {kind: {} for kind in self._groupings}
        for kind, number in sorted(self._of):
            found[kind][self._groupings[kind][number]] = figures(self._of[kind, number])
        return {kind: of_kind for kind, of_kind in found.items() if len(of_kind) > 1}
