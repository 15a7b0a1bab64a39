"""Model diffing: the shared latents start with one decoder vector for all models (Anthropic, February 2025 update).

Axes: M models · P hookpoints · D model dimension · L latents.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from pydantic import BaseModel, ValidationError

from crosscode.config.registry import Component, ConfigModel, build_component
from crosscode.errors import InputError
from crosscode.models.initialization.base import INITIALIZATIONS, DecoderFirstInit, InitStrategy, SampleBatches

if TYPE_CHECKING:
    from crosscode.models.base import BaseCrosscoder


@INITIALIZATIONS.register
class IdenticalLatentsInit(InitStrategy):
    """Another initialisation, in which model 0's decoder rows of the shared latents are copied to the other models
    before the encoder is derived (transpose, calibration)."""

    class Config(ConfigModel):
        type: Literal["identical_latents"] = "identical_latents"
        first: Component = Component(type="anthropic_transpose")
        """the initialisation that draws the decoder and derives the encoder, e.g. {type: jan_update}"""

    def __init__(self, first: InitStrategy | BaseModel):
        built = _build(first) if isinstance(first, BaseModel) else first
        if not isinstance(built, DecoderFirstInit):
            raise InputError(
                f"init.first.type = {built.config().model_dump()['type']!r}: does not derive the encoder "
                "from the decoder, so it cannot make identical latents; use 'anthropic_transpose' or 'jan_update'"
            )
        self.first_init: DecoderFirstInit = built
        self.needs_data = self.first_init.needs_data

    @property
    def first(self) -> Component:
        return Component.model_validate(self.first_init.config().model_dump())

    def check_model(self, model: BaseCrosscoder) -> None:
        if not model.n_shared_latents:
            raise InputError("init.type = 'identical_latents': the model has no shared latents (n_shared_latents = 0)")
        self.first_init.check_model(model)

    def init_weights(
        self, model: BaseCrosscoder, generator: torch.Generator, samples: SampleBatches | None = None
    ) -> None:
        with torch.no_grad():
            self.first_init.init_decoder(model, generator)
            shared_SMPD = model.W_dec_LXoDo[: model.n_shared_latents]
            shared_SMPD.copy_(shared_SMPD[:, :1].clone().expand_as(shared_SMPD))
            self.first_init.derive_encoder(model, generator, samples)


def _build(config: BaseModel) -> InitStrategy:
    try:
        return build_component(INITIALIZATIONS, config)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, ("init", "first", *first["loc"])))
        raise InputError(f"{field} = {first['input']!r}: {first['msg']}") from error
