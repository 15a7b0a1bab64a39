"""Decoder directions of a fixed norm, encoder = its transpose (Anthropic, "Sparse Crosscoders", October 2024).

Axes: X crosscoding dims · D model dimension · L latents.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import PositiveFloat

from crosscode.config.registry import ConfigModel
from crosscode.models.coder import Coder
from crosscode.models.initialization.base import (
    INITIALIZATIONS,
    DecoderFirstInit,
    SampleBatches,
    random_directions,
    require_spaces_match,
    zero_,
)


@INITIALIZATIONS.register
class AnthropicTransposeInit(DecoderFirstInit):
    """Random decoder directions, norm `dec_init_norm` for every latent and crosscoding position; the encoder is the
    decoder's transpose; biases (and the linear skip) are 0."""

    class Config(ConfigModel):
        type: Literal["anthropic_transpose"] = "anthropic_transpose"
        dec_init_norm: PositiveFloat = 0.1
        """norm of each decoder vector at the start, per latent and crosscoding position"""

    def check_model(self, model: Coder) -> None:
        require_spaces_match(model, "anthropic_transpose")

    def init_decoder(self, model: Coder, generator: torch.Generator) -> None:
        shape = tuple(model.W_dec_LXoDo.shape)
        model.W_dec_LXoDo.copy_(random_directions(shape, self.dec_init_norm, generator, model.W_dec_LXoDo))

    def derive_encoder(self, model: Coder, generator: torch.Generator, samples: SampleBatches | None) -> None:
        model.W_enc_LXiDi.copy_(model.W_dec_LXoDo)
        zero_(model.b_enc_L, model.b_dec_XoDo, model.W_skip_XiDiXoDo)
