"""No initialisation: the weights are there."""

from __future__ import annotations

from typing import Literal

import torch

from crosscode.config.registry import ConfigModel
from crosscode.errors import InputError
from crosscode.models.coder import Coder
from crosscode.models.initialization.base import INITIALIZATIONS, InitStrategy, SampleBatches


@INITIALIZATIONS.register
class GivenInit(InitStrategy):
    """Stands in the config of a run whose initialised model was passed to `crosscode.train` in Python."""

    class Config(ConfigModel):
        type: Literal["given"] = "given"

    takes_compound = True

    def init_weights(self, model: Coder, generator: torch.Generator, samples: SampleBatches | None = None) -> None:
        """Raises InputError: a config cannot make these weights."""
        raise InputError(
            "crosscoder.init.type = 'given': the weights came with a model that was passed in Python; name another "
            "initialisation, or pass the model again"
        )
