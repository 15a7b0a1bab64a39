"""The initialisation of Anthropic's January 2025 update, with calibrated firing rates.

Axes: I flattened input · Xo output crosscoding dims · Do output width · L latents.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt

from crosscode.config.registry import ConfigModel
from crosscode.errors import InputError
from crosscode.models.coder import Coder
from crosscode.models.initialization.base import INITIALIZATIONS, DecoderFirstInit, SampleBatches, uniform, zero_
from crosscode.models.initialization.calibration import collect_inputs, firing_share, upper_quantile_L


class CalibrationConfig(ConfigModel):
    """What the calibration looks at."""

    initial_approx_firing_pct: PositiveFloat | None = Field(default=None)
    """share of tokens (0 to 1) that each latent fires on at the start; None: 10^4 / n_latents, clamped below 1"""
    n_calibration_tokens: PositiveInt = 8192
    """tokens of the sample that the calibration looks at"""
    encoder_scale: PositiveFloat | None = None
    """encoder at the start, as a multiple of what it is drawn as (the decoder's transpose, where spaces match); null: n / m"""


class UniformDecoderInit(DecoderFirstInit):
    """`W_dec ~ U(-1/sqrt(n), 1/sqrt(n))`, n the size of the input; `W_enc = (n / m) W_dec^T`, m the number of latents.

    With many latents n / m is small: pre-activations then differ between tokens by less than a step of Adam, and latents fall
    silent for good. `encoder_scale` takes its place. The page first said `U(-1/n, 1/n)`; its erratum is followed here. Where
    input and output spaces differ there is no transpose: the encoder is drawn from the same distribution.
    """

    needs_data = True

    def check_model(self, model: Coder) -> None:
        if model.activation_fn.log_thresholds_L() is None:
            raise InputError(
                f"crosscoder.init.type = {self.type_name()!r}: calibrates JumpReLU thresholds, "
                f"got crosscoder.activation.type = {model.activation_fn.type_name()!r}"
            )

    def init_decoder(self, model: Coder, generator: torch.Generator) -> None:
        bound = model.W_enc_LI.shape[1] ** -0.5
        model.W_dec_LXoDo.copy_(uniform(tuple(model.W_dec_LXoDo.shape), bound, generator, model.W_dec_LXoDo))

    def derive_encoder(self, model: Coder, generator: torch.Generator, samples: SampleBatches | None) -> None:
        n_inputs = model.W_enc_LI.shape[1]
        if model.spaces_match:
            model.W_enc_LXiDi.copy_(model.W_dec_LXoDo)
        else:
            W_enc = model.W_enc_LXiDi
            W_enc.copy_(uniform(tuple(W_enc.shape), n_inputs**-0.5, generator, W_enc))
        model.W_enc_LXiDi.mul_(self.encoder_scale or n_inputs / model.n_latents)
        zero_(model.b_enc_L, model.b_dec_XoDo, model.W_skip_XiDiXoDo)
        assert samples is not None
        x_TI = collect_inputs(model, samples, self.n_calibration_tokens)
        share = firing_share(self.initial_approx_firing_pct, model.n_latents)
        self.calibrate(model, upper_quantile_L(x_TI, model.W_enc_LI, share))

    def calibrate(self, model: Coder, quantile_L: torch.Tensor) -> None:
        """Make each latent fire where `x . W_enc` exceeds its quantile."""
        raise NotImplementedError


@INITIALIZATIONS.register
class JanUpdateInit(UniformDecoderInit):
    """`UniformDecoderInit`, with `b_enc` such that each latent exceeds its threshold on the wanted share of tokens."""

    class Config(CalibrationConfig):
        type: Literal["jan_update"] = "jan_update"

    def check_model(self, model: Coder) -> None:
        super().check_model(model)
        if model.b_enc_L is None:
            raise InputError(
                "crosscoder.init.type = 'jan_update': calibrates the encoder bias, but use_encoder_bias is false; "
                "use 'jan_update_no_encoder_bias'"
            )

    def calibrate(self, model: Coder, quantile_L: torch.Tensor) -> None:
        log_threshold_L = model.activation_fn.log_thresholds_L()
        assert model.b_enc_L is not None and log_threshold_L is not None
        model.b_enc_L.copy_(log_threshold_L.exp() - quantile_L)
