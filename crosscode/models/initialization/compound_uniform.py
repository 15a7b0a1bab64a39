"""Uniform weights for compound cross-layer transcoders ("Circuit Tracing", Anthropic, March 2025).

Axes: Xi/Xo input/output crosscoding dims · Di/Do widths · L latents of one source layer.
"""

from __future__ import annotations

from typing import Literal

import torch

from crosscode.config.registry import ConfigModel
from crosscode.models.coder import Coder
from crosscode.models.initialization.base import INITIALIZATIONS, InitStrategy, SampleBatches, uniform, zero_


@INITIALIZATIONS.register
class CompoundUniformInit(InitStrategy):
    """`W_enc ~ U(+-1/sqrt(L))`, `W_dec ~ U(+-1/sqrt(n_layers D))`; biases and skip 0."""

    class Config(ConfigModel):
        type: Literal["compound_uniform"] = "compound_uniform"

    takes_compound = True

    @torch.no_grad()
    def init_weights(self, model: Coder, generator: torch.Generator, samples: SampleBatches | None = None) -> None:
        n_layers = len(model.segments)
        for part in model.parts:
            W_enc, W_dec = part.W_enc_LXiDi, part.W_dec_LXoDo
            W_enc.copy_(uniform(tuple(W_enc.shape), part.n_latents**-0.5, generator, W_enc))
            W_dec.copy_(uniform(tuple(W_dec.shape), (n_layers * part.d_out) ** -0.5, generator, W_dec))
            zero_(part.b_enc_L, part.b_dec_XoDo, part.W_skip_XiDiXoDo)
        zero_(model.b_dec_XoDo)
