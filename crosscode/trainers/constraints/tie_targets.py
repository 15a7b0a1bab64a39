"""One decoder direction for all targets of a latent, with a scale for each: tied decoders of cross-layer transcoders.

Axes: L latents · X output positions · D width.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from crosscode.config.registry import ConfigModel
from crosscode.errors import InputError
from crosscode.models.base import BaseCrosscoder
from crosscode.trainers.constraints.base import CONSTRAINTS, Constraint


@CONSTRAINTS.register
class TieTargets(Constraint):
    """`W_dec[l, x] = scale_lx direction_l`, where scales may be negative; the shift of a target is its output bias. The gradient
    is what scales and directions can follow, and behind the step each latent's vectors are the nearest of one direction."""

    class Config(ConfigModel):
        type: Literal["tie_targets"] = "tie_targets"

    capturable = True

    def check_model(self, model: BaseCrosscoder) -> None:
        if len(model.segments) < 2:
            raise InputError("constraints.tie_targets: the model writes to one position; it needs several to tie")

    @torch.no_grad()
    def after_backward(self, model: BaseCrosscoder) -> None:
        for part in model.parts:
            grad_L = part.W_dec_LXoDo.grad
            if grad_L is not None:
                W_LXD, grad_LXD = _by_position(part.W_dec_LXoDo), _by_position(grad_L)
                direction_LD, scale_LX = _one_direction(W_LXD)
                share_LX = normalize(scale_LX, dim=1)
                # Of what is left beside the direction, only what all targets want in proportion to their scales.
                along_LX = torch.einsum("lxd,ld->lx", grad_LXD, direction_LD)
                turn_LD = torch.einsum("lxd,lx->ld", grad_LXD, share_LX)
                turn_LD -= direction_LD * (turn_LD * direction_LD).sum(1, keepdim=True)
                tied_LXD = along_LX[..., None] * direction_LD[:, None] + share_LX[..., None] * turn_LD[:, None]
                is_zero_L = (direction_LD == 0).all(1)  # vectors that have no direction yet may take any
                grad_L.copy_(torch.where(is_zero_L[:, None, None], grad_LXD, tied_LXD).reshape(grad_L.shape))

    @torch.no_grad()
    def after_step(self, model: BaseCrosscoder) -> None:
        for part in model.parts:
            direction_LD, scale_LX = _one_direction(_by_position(part.W_dec_LXoDo))
            part.W_dec_LXoDo.copy_((scale_LX[..., None] * direction_LD[:, None]).reshape(part.W_dec_LXoDo.shape))


def _by_position(W_LXoDo: Tensor) -> Tensor:
    """Where there are no rows, too."""
    return W_LXoDo.reshape(W_LXoDo.shape[0], math.prod(W_LXoDo.shape[1:-1]), W_LXoDo.shape[-1])


def _one_direction(W_LXD: Tensor, n_iterations: int = 3) -> tuple[Tensor, Tensor]:
    """The direction (norm 1) and scales nearest to `W_LXD`, by power iteration from the longest vector: exact for vectors that
    have one direction, and near them to the order of what is taken away, squared to the number of iterations."""
    longest_L = W_LXD.norm(dim=2).argmax(1)
    direction_LD = normalize(W_LXD[torch.arange(len(W_LXD), device=W_LXD.device), longest_L], dim=1)
    for _ in range(n_iterations):
        scale_LX = torch.einsum("lxd,ld->lx", W_LXD, direction_LD)
        direction_LD = normalize(torch.einsum("lxd,lx->ld", W_LXD, scale_LX), dim=1)
    return direction_LD, torch.einsum("lxd,ld->lx", W_LXD, direction_LD)
