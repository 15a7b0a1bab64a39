"""Transposed directions for one input and several outputs (after Anthropic, "Sparse Crosscoders", October 2024).

Axes: Xo output crosscoding dims · D model dimension · L latents.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import PositiveFloat

from crosscode.config.registry import ConfigModel
from crosscode.errors import InputError
from crosscode.models.coder import Coder
from crosscode.models.initialization.base import INITIALIZATIONS, InitStrategy, SampleBatches, random_directions, zero_


@INITIALIZATIONS.register
class AnthropicTransposeInitCrossLayerTC(InitStrategy):
    """A random direction over D for each latent: the encoder's row, and the decoder's vector at every output.

    Biases and the linear skip are 0.
    """

    class Config(ConfigModel):
        type: Literal["anthropic_transpose_cross_layer"] = "anthropic_transpose_cross_layer"
        enc_init_norm: PositiveFloat = 1.0
        """norm of each latent's encoder vector at the start"""
        dec_init_norm: PositiveFloat = 0.1
        """norm of each decoder vector at the start, per latent and output"""

    def check_model(self, model: Coder) -> None:
        if model.in_dims != () or model.d_in != model.d_out:
            raise InputError(
                "crosscoder.init.type = 'anthropic_transpose_cross_layer': needs one input position and equal widths, got "
                f"input {(*model.in_dims, model.d_in)} and output {(*model.out_dims, model.d_out)}"
            )

    @torch.no_grad()
    def init_weights(self, model: Coder, generator: torch.Generator, samples: SampleBatches | None = None) -> None:
        direction_LD = random_directions((model.n_latents, model.d_in), 1.0, generator, model.W_enc_LXiDi)
        model.W_enc_LXiDi.copy_(direction_LD * self.enc_init_norm)
        repeated_LXoDo = direction_LD.reshape(model.n_latents, *(1,) * len(model.out_dims), model.d_out)
        model.W_dec_LXoDo.copy_((repeated_LXoDo * self.dec_init_norm).expand_as(model.W_dec_LXoDo))
        zero_(model.b_enc_L, model.b_dec_XoDo, model.W_skip_XiDiXoDo)
