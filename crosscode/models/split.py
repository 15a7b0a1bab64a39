"""Harvested activations -> (input, target). Each architecture states in its own file how it reads them.

Axes: B tokens · M models · P hookpoints · D model dimension · Xi/Xo input/output crosscoding dims.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
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
    difference: bool = False
    """whether what is read is the second of two models minus the first, both scaled alike; the axis M disappears"""

    def reads(self, n_models: int, n_hookpoints: int) -> bool:
        """Whether it reads M models at P hookpoints."""
        return self._takes(n_models) and self.accepts(n_hookpoints)

    def _takes(self, n_models: int) -> bool:
        return n_models >= 1 if self.keeps_models else n_models == 1 + self.difference

    def check(self, n_models: int, n_hookpoints: int) -> None:
        """Raise `InputError` where this architecture cannot read M models at P hookpoints."""
        if not self._takes(n_models):
            wanted = "the difference of two language models" if self.difference else "one language model"
            raise InputError(f"crosscoder.type = {self.type!r}: reads {wanted}, got {n_models}")
        if not self.accepts(n_hookpoints):
            raise InputError(f"crosscoder.type = {self.type!r}: {self.rule}, got {n_hookpoints} hookpoint(s)")

    def check_widths(self, names_MP: Sequence[Sequence[str]], widths_MP: Sequence[Sequence[int]]) -> None:
        """Raise `InputError` where what is read differs in width, and this architecture cannot take that."""
        if self.keeps_models:
            return
        for names_P, widths_P in zip(names_MP, widths_MP, strict=True):
            for name, width in zip(names_P, widths_P, strict=True):
                if width != widths_MP[0][0]:
                    raise InputError(
                        f"crosscoder.type = {self.type!r}: {name!r} is {width} wide, but {names_MP[0][0]!r} is "
                        f"{widths_MP[0][0]} wide; only a crosscoder ('model_hookpoint_acausal') takes both"
                    )

    def activations(self, acts_BMPD: Tensor) -> tuple[Tensor, Tensor]:
        """`(input_BXiDi, target_BXoDo)`: views of `acts_BMPD`, which may have any leading axes in place of B.

        Raises:
            InputError: fewer than three axes.
        """
        if acts_BMPD.ndim < 3:
            raise InputError(f"activations: expected shape (..., M, P, D), got {tuple(acts_BMPD.shape)}")
        in_, out = self._indices(*acts_BMPD.shape[-3:-1])
        if self.difference:
            acts_BMPD = acts_BMPD - acts_BMPD[..., :1, :, :]
        return acts_BMPD[(..., *in_, slice(None))], acts_BMPD[(..., *out, slice(None))]

    def scaling(self, scaling_MP: Tensor) -> tuple[Tensor, Tensor]:
        """`(scaling_in_Xi, scaling_out_Xo)`: what `fold_activation_scaling_into_weights_` takes.

        Raises:
            InputError: other axes than (M, P).
        """
        if scaling_MP.ndim != 2:
            raise InputError(f"scaling: expected shape (M, P), got {tuple(scaling_MP.shape)}")
        in_, out = self._indices(*scaling_MP.shape)
        if self.difference and not torch.equal(scaling_MP[0], scaling_MP[1]):
            raise InputError(
                f"crosscoder.type = {self.type!r}: reads a difference, so that both models must be scaled by the same "
                f"factor, got {scaling_MP.flatten().tolist()}"
            )
        return scaling_MP[in_], scaling_MP[out]

    def as_scaled(self, acts_BMPD: Tensor) -> Tensor:
        """`(B, M, P, D)`: the vectors whose mean norm scaling makes `sqrt(D)`.

        Raises:
            InputError: a difference that is 0 everywhere.
        """
        if not self.difference:
            return acts_BMPD
        self.check(*acts_BMPD.shape[-3:-1])
        difference_BMPD = acts_BMPD[..., 1:, :, :] - acts_BMPD[..., :1, :, :]
        if not bool(difference_BMPD.any()):
            raise InputError(
                f"crosscoder.type = {self.type!r}: the two models have the same activations: no difference"
            )
        return difference_BMPD.expand(acts_BMPD.shape)

    def beside(self, acts_BMPD: Tensor) -> Tensor | None:
        """What must be added to the output for activations at `output_places`, of their shape (..., Xo, Do); None: nothing."""
        return (
            acts_BMPD[(..., 0, *self._indices(*acts_BMPD.shape[-3:-1])[1][1:], slice(None))]
            if self.difference
            else None
        )

    def output_names(self, names_MP: Sequence[Sequence[str]]) -> list[str]:
        """Names of the output's crosscoding positions, flattened in the order of Xo."""
        places = self._places(len(names_MP), len(names_MP[0]), 1)
        return [
            difference_name(names_MP[0][p], names_MP[1][p]) if self.difference else names_MP[m][p] for m, p in places
        ]

    def output_places(self, n_models: int, n_hookpoints: int) -> list[tuple[int, int]]:
        """`(m, p)` of each output position, flattened in the order of Xo. A difference has the place of the second model,
        to which its first model's activations and the difference add up."""
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
        models: Hookpoints = slice(None) if self.keeps_models else int(self.difference)
        in_, out = self.hookpoints(n_hookpoints)
        return (models, in_), (models, out)


def difference_name(name_a: str, name_b: str) -> str:
    """`b - a/hookpoint` for `b/hookpoint` minus `a/hookpoint`."""
    (model_a, _, hook_a), (model_b, _, hook_b) = name_a.rpartition("/"), name_b.rpartition("/")
    return f"{model_b} - {model_a}/{hook_b}" if hook_a == hook_b and model_a and model_b else f"{name_b} - {name_a}"
