"""Positions of different width in one crosscoder: models of another size, neurons beside a residual stream.

Vectors are padded with zeros to the widest, D, and weights there are exactly 0. Nothing moves them: inputs, targets and
outputs are 0 there, so that every gradient is. Scaling gives each position a mean norm of sqrt(D), whatever its own width:
each has the same part of the loss, and a latent that serves two alike has the same decoder norm at both.

Axes: L latents · X positions, any dims · D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from crosscode.errors import InputError

Widths = tuple[tuple[int, ...], ...]
"""Of M models at P hookpoints; `()`: all have the same."""


def widths_of(given: Sequence[Sequence[int]], n_models: int, n_hookpoints: int, width: int) -> Widths:
    """`given` as a model keeps it, `()` where all are `width`.

    Raises:
        InputError: not one for each model and hookpoint, or the widest is not `width`.
    """
    widths = tuple(tuple(int(one) for one in row) for row in given)
    flat = [one for row in widths for one in row]
    if not flat or set(flat) == {width}:
        return ()
    if [len(row) for row in widths] != [n_hookpoints] * n_models or max(flat) != width or min(flat) < 1:
        raise InputError(
            f"widths = {[list(row) for row in widths]}: must be one width of at least 1 for each of {n_models} model(s) x "
            f"{n_hookpoints} hookpoint(s), and the widest must be {width}"
        )
    return widths


@torch.no_grad()
def trim_(vectors_LXD: Tensor, widths: Widths) -> None:
    """Zero what is beyond each position's width; vectors keep their length."""
    if not widths:
        return
    norms_LX1 = vectors_LXD.norm(dim=-1, keepdim=True)
    clear_(vectors_LXD, widths)
    vectors_LXD.mul_(norms_LX1 / vectors_LXD.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(norms_LX1.dtype).tiny))


@torch.no_grad()
def clear_(vectors_LXD: Tensor, widths: Widths) -> None:
    """Zero what is beyond each position's width."""
    for m, row in enumerate(widths):
        for p, width in enumerate(row):
            vectors_LXD[:, m, p, width:].zero_()
