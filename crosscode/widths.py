"""Positions of different width in one crosscoder: models of another size, neurons beside a residual stream.

Vectors are padded with zeros to the widest, D, and weights there are exactly 0. Nothing moves them: inputs, targets and
outputs are 0 there, so that every gradient is. Scaling gives each position a mean norm of sqrt(D), whatever its own width:
each has the same part of the loss, and a latent that serves two alike has the same decoder norm at both.

Axes: L latents · X positions, M models · P hookpoints · D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, Self

import torch
from torch import Tensor

from crosscode.errors import InputError


class Widths(tuple[tuple[int, ...], ...]):
    """Of M models at P hookpoints, in that order, equal ones too: these have no padding, and no code of their own."""

    @classmethod
    def of(cls, given: Sequence[Sequence[int]], dims: Sequence[int], width: int) -> Self:
        """`given`, or where it is empty `width` everywhere. `dims`: of the positions, (M, P), (P,) or ().

        Raises:
            InputError: not one for each model and hookpoint, or the widest is not `width`.
        """
        n_models, n_hookpoints = (1, 1, *dims)[-2:]
        widths = cls(tuple(int(one) for one in row) for row in given or [[width] * n_hookpoints] * n_models)
        if (
            [len(row) for row in widths] != [n_hookpoints] * n_models
            or widths.widest != width
            or min(widths.flat_X) < 1
        ):
            raise InputError(
                f"widths = {widths}: must be one width of at least 1 for each of {n_models} model(s) x {n_hookpoints} "
                f"hookpoint(s), and the widest must be {width}"
            )
        return widths

    def __repr__(self) -> str:
        return str([list(row) for row in self])

    @property
    def flat_X(self) -> tuple[int, ...]:
        """One after the other."""
        return tuple(chain(*self))

    @property
    def widest(self) -> int:
        """D."""
        return max(self.flat_X)

    @property
    def padded(self) -> list[tuple[int, int, int]]:
        """`(model, hookpoint, width)` of the positions that are narrower than the widest."""
        return [(m, p, one) for m, row in enumerate(self) for p, one in enumerate(row) if one < self.widest]

    def as_option(self) -> dict[str, Any]:
        """What a constructor is given and a file says: nothing where all are equal, which most architectures need not know."""
        return {"widths": [list(row) for row in self]} if self.padded else {}

    def apart(self, a: int, b: int) -> bool:
        """Whether vectors at two positions (flattened) have no angle and no difference."""
        return self.flat_X[a] != self.flat_X[b]

    def check_alike(self, problem: str, models: Sequence[int] | None = None) -> None:
        """Raise `InputError` where models (default: all) differ in width; `problem` says what that rules out."""
        rows = [self[m] for m in range(len(self)) if models is None or m in models]
        if len({*rows}) > 1:
            raise InputError(f"{problem} (widths {', '.join(str(list(row)) for row in rows)})")

    @torch.no_grad()
    def clear_(self, values_MPD: Tensor) -> None:
        """Zero padding; any axes may stand before M."""
        for m, p, width in self.padded:
            values_MPD[..., m, p, width:].zero_()

    @torch.no_grad()
    def trim_(self, vectors_LMPD: Tensor) -> None:
        """Zero padding of vectors that keep their length."""
        norms_LP1 = [vectors_LMPD[:, m, p].norm(dim=-1, keepdim=True) for m, p, _ in self.padded]
        self.clear_(vectors_LMPD)
        for (m, p, _), norm_L1 in zip(self.padded, norms_LP1, strict=True):
            vectors_LD = vectors_LMPD[:, m, p]
            vectors_LD.mul_(norm_L1 / vectors_LD.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(norm_L1.dtype).tiny))
