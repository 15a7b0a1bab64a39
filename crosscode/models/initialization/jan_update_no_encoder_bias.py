"""The January 2025 initialisation for JumpReLU models without encoder bias: the thresholds are calibrated instead.

Axes: L latents.
"""

from __future__ import annotations

from typing import Literal

import torch

from crosscode.models.coder import Coder
from crosscode.models.initialization.base import INITIALIZATIONS, zero_
from crosscode.models.initialization.jan_update import CalibrationConfig, UniformDecoderInit

SMALLEST_THRESHOLD = 1e-6
"""A threshold is positive; a quantile at or below 0 would make the latent fire more often than wanted."""


@INITIALIZATIONS.register
class JanUpdateNoEncoderBiasInit(UniformDecoderInit):
    """As `JanUpdateInit`, but `theta = quantile of x . W_enc` and `b_enc = 0` (or absent)."""

    class Config(CalibrationConfig):
        type: Literal["jan_update_no_encoder_bias"] = "jan_update_no_encoder_bias"

    def calibrate(self, model: Coder, quantile_L: torch.Tensor) -> None:
        zero_(model.b_enc_L)
        model.activation_fn.set_thresholds_(quantile_L.clamp(min=SMALLEST_THRESHOLD))
