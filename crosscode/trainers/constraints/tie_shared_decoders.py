"""Shared latents have one decoder vector for all models (Anthropic, February 2025 update).

Axes: S shared latents · M models · P hookpoints · D model dimension.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from crosscode.config.registry import ConfigModel
from crosscode.errors import InputError
from crosscode.models.base import BaseCrosscoder
from crosscode.trainers.constraints.base import CONSTRAINTS, Constraint


@CONSTRAINTS.register
class TieSharedDecoders(Constraint):
    """The gradients of a shared latent's decoder vectors are summed over models: it is one vector, so the gradient norm
    counts it once; for the optimizer each model gets the sum. Behind the step the vectors are made equal to the bit,
    whatever rounding the optimizer has."""

    class Config(ConfigModel):
        type: Literal["tie_shared_decoders"] = "tie_shared_decoders"

    capturable = True

    def check_model(self, model: BaseCrosscoder) -> None:
        if not model.n_shared_latents:
            raise InputError("constraints.tie_shared_decoders: the model has no shared latents")

    @torch.no_grad()
    def start(self, model: BaseCrosscoder) -> None:
        shared_SMPD = model.W_dec_LXoDo[_shared(model)]
        if not torch.equal(shared_SMPD, shared_SMPD[:, :1].expand_as(shared_SMPD)):
            raise InputError(
                "crosscoder.init: the decoder vectors of shared latents differ between models at the start; "
                "use crosscoder.init.type = 'identical_latents'"
            )

    @torch.no_grad()
    def after_backward(self, model: BaseCrosscoder) -> None:
        grad_LMPD = model.W_dec_LXoDo.grad
        if grad_LMPD is not None:
            shared_SMPD = grad_LMPD[_shared(model)]
            shared_SMPD[:, 0].copy_(shared_SMPD.sum(1))
            shared_SMPD[:, 1:].zero_()

    @torch.no_grad()
    def before_step(self, model: BaseCrosscoder) -> None:
        grad_LMPD = model.W_dec_LXoDo.grad
        if grad_LMPD is not None:
            self._copy_first(grad_LMPD[_shared(model)])

    @torch.no_grad()
    def after_step(self, model: BaseCrosscoder) -> None:
        self._copy_first(model.W_dec_LXoDo[_shared(model)])

    @staticmethod
    def _copy_first(shared_SMPD: Tensor) -> None:
        shared_SMPD[:, 1:].copy_(shared_SMPD[:, :1].expand_as(shared_SMPD[:, 1:]))


def _shared(model: BaseCrosscoder) -> slice:
    return model.rows_here(slice(0, model.n_shared_latents))
