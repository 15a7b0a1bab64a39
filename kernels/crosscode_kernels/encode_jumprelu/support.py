"""How many entries of a dense batch matter, and where they are.

Axes: B tokens · L latents · N entries of a support.

A latent matters on a token where it is active; for JumpReLU also where it lies within the window of the straight-through
estimator, since the threshold's gradient needs it. What is cheaper, a dense product or a sparse one, depends on how many
these are: that is measured on every batch.
"""

from __future__ import annotations

import logging
from typing import NamedTuple

import torch
from torch import Tensor

from crosscode_kernels.backend import Backend
from crosscode_kernels.blocks import row_blocks

_GROUP, _FEW_GROUPS = 8, 0.1
_logger = logging.getLogger("crosscode_kernels")


class Support(NamedTuple):
    """Entries of a batch in row order; both int32."""

    row_ptr_B1: Tensor
    latent_idx_N: Tensor


class Counts(NamedTuple):
    """What one pass over the pre-activations finds. `mask_BL` marks `h > theta - margin`."""

    mask_BL: Tensor
    n_masked: int
    n_active: int
    deficit_L: Tensor | None


def measure(h_BL: Tensor, theta_L: Tensor | None, margin: float) -> Counts:
    """One pass over `h_BL`. Without theta: ReLU, no margin, no deficit. NaN is marked, and counts as active."""
    mask_BL = torch.empty(h_BL.shape, dtype=torch.bool, device=h_BL.device)
    deficit_L = None if theta_L is None else torch.zeros_like(theta_L)
    n_masked = n_active = 0
    for rows in row_blocks(h_BL):
        above_RL = h_BL[rows] if theta_L is None else h_BL[rows] - theta_L
        torch.le(above_RL, -margin, out=mask_BL[rows]).logical_not_()
        n_masked += _count(mask_BL[rows])
        if theta_L is not None and deficit_L is not None:
            n_active += above_RL.shape[0] * above_RL.shape[1] - _count(above_RL <= 0)
            deficit_L -= above_RL.clamp_(max=0).sum(0)
    return Counts(mask_BL, n_masked, n_masked if theta_L is None else n_active, deficit_L)


def _count(mask_RL: Tensor) -> int:
    # On the CPU, where alone this runs, tolist looks at the memory itself: nothing is brought from a device.
    return torch.count_nonzero(mask_RL).reshape(1).tolist()[0]


def positive(h_BL: Tensor, sparse_below: float) -> tuple[float, Tensor | None]:
    """Which share of `h_BL` is positive or NaN, and its flat indices, tokens ascending; None for these where the share is not
    below `sparse_below`."""
    n_elements, flat_N = max(h_BL.numel(), 1), few_positive(h_BL)
    if flat_N is not None:
        density = flat_N.shape[0] / n_elements
        return density, flat_N if density < sparse_below else None
    counts = measure(h_BL, None, 0.0)
    density = counts.n_active / n_elements
    return density, marked(counts.mask_BL) if density < sparse_below else None


def few_positive(h_BL: Tensor) -> Tensor | None:
    """Flat indices, tokens ascending, of all that is positive or NaN; None where that takes longer than `measure` and `marked`.
    Groups of columns are looked at first, of which few hold anything."""
    n_latents = h_BL.shape[1]
    n_groups = n_latents // _GROUP
    if not n_groups or n_latents % _GROUP:
        return None
    largest_BG = h_BL.view(-1, _GROUP, n_groups).amax(1)
    group_Q = marked((largest_BG <= 0).logical_not_())
    if group_Q.shape[0] > _FEW_GROUPS * largest_BG.numel():
        return None
    first_Q = group_Q + group_Q // n_groups * (n_latents - n_groups)
    flat_N = (first_Q.unsqueeze(1) + torch.arange(0, n_latents, n_groups)).view(-1)
    return flat_N[marked((h_BL.view(-1).index_select(0, flat_N) <= 0).logical_not_())]


def marked(mask: Tensor) -> Tensor:
    """Flat indices of a mask, ascending."""
    return mask.view(-1).nonzero().squeeze(1)


def locate(flat_N: Tensor, n_tokens: int, n_latents: int) -> Support:
    """The entries at flat indices, whose tokens ascend."""
    token_N = flat_N // n_latents
    tokens_B1 = torch.arange(n_tokens + 1, device=flat_N.device)
    row_ptr_B1 = torch.searchsorted(token_N, tokens_B1, out_int32=True)
    return Support(row_ptr_B1, (flat_N - token_N * n_latents).int())


def note(backend: Backend, op: str, mode: str, active: float, support: float) -> None:
    """Say in the log which products are sparse, whenever that changes."""
    if backend.said.get(op) != mode:
        backend.said[op] = mode
        _logger.info("%s: %.2f%% of latents active, %.2f%% with a gradient: %s", op, 100 * active, 100 * support, mode)
