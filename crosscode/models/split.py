"""Harvested activations -> (input, target). Each architecture states in its own file how it reads them.

Axes: B tokens · M models · P hookpoints · D model dimension · Xi/Xo input/output crosscoding dims.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from crosscode.errors import InputError

Hookpoints = int | slice
"""One hookpoint (its axis disappears), or several (its axis stays)."""


@dataclass(frozen=True)
class Split:
    """How one architecture reads `acts_BMPD`."""

    type: str
    """the architecture, as configs name it"""
    hookpoints: Callable[[int], tuple[Hookpoints, Hookpoints]]
    """of P hookpoints, those of the input and those of the target"""
    accepts: Callable[[int], bool]
    """whether P hookpoints can be read"""
    rule: str
    """what `accepts` asks, in words"""
    keeps_models: bool = False
    """whether the axis M is part of Xi and Xo; else there is exactly one model"""

    def check(self, n_models: int, n_hookpoints: int) -> None:
        """Raise `InputError` where this architecture cannot read M models at P hookpoints."""
        if n_models < 1 or (n_models != 1 and not self.keeps_models):
            raise InputError(f"crosscoder.type = {self.type!r}: reads one language model, got {n_models}")
        if not self.accepts(n_hookpoints):
            raise InputError(f"crosscoder.type = {self.type!r}: {self.rule}, got {n_hookpoints} hookpoint(s)")

    def activations(self, acts_BMPD: Tensor) -> tuple[Tensor, Tensor]:
        """`(input_BXiDi, target_BXoDo)`: views of `acts_BMPD`, which may have any leading axes in place of B."""
        if acts_BMPD.ndim < 3:
            raise InputError(f"activations: expected shape (..., M, P, D), got {tuple(acts_BMPD.shape)}")
        in_, out = self._indices(*acts_BMPD.shape[-3:-1])
        return acts_BMPD[(..., *in_, slice(None))], acts_BMPD[(..., *out, slice(None))]

    def scaling(self, scaling_MP: Tensor) -> tuple[Tensor, Tensor]:
        """`(scaling_in_Xi, scaling_out_Xo)`: what `fold_activation_scaling_into_weights_` takes."""
        if scaling_MP.ndim != 2:
            raise InputError(f"scaling: expected shape (M, P), got {tuple(scaling_MP.shape)}")
        in_, out = self._indices(*scaling_MP.shape)
        return scaling_MP[in_], scaling_MP[out]

    def output_names(self, names_MP: Sequence[Sequence[str]]) -> list[str]:
        """Names of the output's crosscoding positions, flattened in the order of Xo."""
        return self._names(names_MP, 1)

    def input_names(self, names_MP: Sequence[Sequence[str]]) -> list[str]:
        """Names of the input's crosscoding positions, flattened in the order of Xi."""
        return self._names(names_MP, 0)

    def output_places(self, n_models: int, n_hookpoints: int) -> list[tuple[int, int]]:
        """`(m, p)` of each output position, flattened in the order of Xo."""
        return self._places(n_models, n_hookpoints, 1)

    def input_places(self, n_models: int, n_hookpoints: int) -> list[tuple[int, int]]:
        """`(m, p)` of each input position, flattened in the order of Xi."""
        return self._places(n_models, n_hookpoints, 0)

    def _places(self, n_models: int, n_hookpoints: int, side: int) -> list[tuple[int, int]]:
        models, hookpoints = self._indices(n_models, n_hookpoints)[side]

        def taken(index: Hookpoints, n: int) -> list[int]:
            return list(range(n))[index] if isinstance(index, slice) else [range(n)[index]]

        return [(m, p) for m in taken(models, n_models) for p in taken(hookpoints, n_hookpoints)]

    def _indices(self, n_models: int, n_hookpoints: int) -> tuple[tuple[Hookpoints, Hookpoints], ...]:
        self.check(n_models, n_hookpoints)
        models: Hookpoints = slice(None) if self.keeps_models else 0
        in_, out = self.hookpoints(n_hookpoints)
        return (models, in_), (models, out)

    def _names(self, names_MP: Sequence[Sequence[str]], side: int) -> list[str]:
        return [names_MP[m][p] for m, p in self._places(len(names_MP), len(names_MP[0]), side)]
