"""Latents of some models only stay so (dedicated feature crosscoder, Jiralerspong & Bricken 2026, arXiv:2602.11729).

Axes: L latents · M models.
"""

from __future__ import annotations

from typing import Literal

from torch import nn

from crosscode.config.registry import ConfigModel
from crosscode.errors import InputError
from crosscode.models.base import BaseCrosscoder
from crosscode.models.partition import Partition, with_ascending_rows
from crosscode.trainers.constraints.base import CONSTRAINTS, Constraint


@CONSTRAINTS.register
class HoldPartition(Constraint):
    """Encoder and decoder weights of a latent at models to which it does not belong are exactly 0, and so are their
    gradients, before anything measures them, and with those whatever an optimizer keeps."""

    class Config(ConfigModel):
        type: Literal["hold_partition"] = "hold_partition"

    takes_row_sparse, capturable = True, True

    def check_model(self, model: BaseCrosscoder) -> None:
        if model.partition is None:
            raise InputError("constraints.hold_partition: the model has no partition; set crosscoder.partition")

    def start(self, model: BaseCrosscoder) -> None:
        _of(model).check_clear({"W_enc_LXiDi": model.W_enc_LXiDi, "W_dec_LXoDo": model.W_dec_LXoDo})

    def after_backward(self, model: BaseCrosscoder) -> None:
        for weight_LM in _weights(model):
            if weight_LM.grad is not None:
                weight_LM.grad = with_ascending_rows(weight_LM.grad)
                _of(model).clear_(weight_LM.grad)

    def after_step(self, model: BaseCrosscoder) -> None:
        """Where gradients are sparse over latents the others did not move."""
        for weight_LM in _weights(model):
            grad_LM = weight_LM.grad
            if grad_LM is None or not grad_LM.is_sparse:
                _of(model).clear_(weight_LM)


def _weights(model: BaseCrosscoder) -> list[nn.Parameter]:
    return [model.W_enc_LXiDi, model.W_dec_LXoDo]


def _of(model: BaseCrosscoder) -> Partition:
    assert model.partition is not None
    return model.partition.of_rows(model.rows_here)
