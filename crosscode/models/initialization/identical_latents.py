"""Model diffing: the shared latents start with one decoder vector for all models (Anthropic, February 2025 update).

Axes: M models · P hookpoints · D model dimension · L latents.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import BaseModel, PositiveFloat, field_validator

from crosscode.config.registry import Component, ConfigModel
from crosscode.errors import InputError
from crosscode.models.coder import Coder
from crosscode.models.initialization.base import INITIALIZATIONS, DecoderFirstInit, InitStrategy, SampleBatches


@INITIALIZATIONS.register
class IdenticalLatentsInit(InitStrategy):
    """Another initialisation, in which model 0's decoder rows of the shared latents are copied to the other models
    before the encoder is derived (transpose, calibration)."""

    class Config(ConfigModel):
        type: Literal["identical_latents"] = "identical_latents"
        first: Component = Component(type="anthropic_transpose")
        """the initialisation that draws the decoder and derives the encoder, e.g. {type: jan_update}"""
        own_scale: PositiveFloat = 1.0
        """norm of the decoder vectors of the other latents over that of the shared ones; sqrt(2) where activations of two models
        are nearly equal: one vector in both reads them sqrt(2) times as strongly as two independent ones, and wins first"""

        @field_validator("first", mode="before")
        @classmethod
        def _made_already(cls, first: Any) -> Any:
            config = first.config if isinstance(first, InitStrategy) else first
            return config.model_dump() if isinstance(config, BaseModel) else config

    def setup(self) -> None:
        built = INITIALIZATIONS.build(INITIALIZATIONS.resolve(self.first, f"{self.section}.first"))
        if not isinstance(built, DecoderFirstInit):
            raise InputError(
                f"{self.section}.first.type = {built.type_name()!r}: does not derive the encoder from the decoder, "
                "so it cannot make identical latents; use 'anthropic_transpose' or 'jan_update'"
            )
        self.first_init: DecoderFirstInit = built
        self.needs_data = self.first_init.needs_data

    def check_model(self, model: Coder) -> None:
        if not model.n_shared_latents:
            raise InputError(f"{self.section}.type = 'identical_latents': the model has no shared latents")
        self.first_init.check_model(model)

    def init_weights(self, model: Coder, generator: torch.Generator, samples: SampleBatches | None = None) -> None:
        with torch.no_grad():
            self.first_init.init_decoder(model, generator)
            model.widths.trim_(model.W_dec_LXoDo)
            shared_SMPD = model.W_dec_LXoDo[: model.n_shared_latents]
            shared_SMPD.copy_(shared_SMPD[:, :1].clone().expand_as(shared_SMPD))
            model.W_dec_LXoDo[model.n_shared_latents :].mul_(self.own_scale)
            if model.partition is not None:
                model.partition.clear_(model.W_dec_LXoDo)
            self.first_init.derive_encoder(model, generator, samples)
