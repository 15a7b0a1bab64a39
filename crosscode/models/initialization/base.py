"""What an initialisation is.

Axes: B tokens · X crosscoding dims · I/O flattened input/output · L latents.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from crosscode.config.registry import Configured, Registry
from crosscode.errors import InputError
from crosscode.models.coder import Coder

SampleBatches = Callable[[], Iterator[tuple[Tensor, Tensor]]]
"""A function that starts an iterator of `(input_BXiDi, target_BXoDo)` batches, for initialisations that read data."""


class InitStrategy(Configured, ABC):
    """Sets every parameter of a model in place. A subclass is one file in this folder."""

    needs_data: bool = False
    """Whether `init_weights` needs `samples`."""
    takes_compound: bool = False
    """Whether `init_weights` fills all source layers of a compound model; else it is called for each of them."""

    @abstractmethod
    def init_weights(self, model: Coder, generator: torch.Generator, samples: SampleBatches | None = None) -> None:
        """Fill all parameters. Random numbers come from `generator` (a CPU one) only."""

    def check_model(self, model: Coder) -> None:
        """Raise `InputError` where this strategy cannot fill the model. Looks at no values."""

    @torch.no_grad()
    def init_output_bias(self, model: Coder, samples: SampleBatches | None) -> None:
        """Fill `b_dec` alone, for models that hold it apart from their other weights (compound ones)."""
        zero_(model.b_dec_XoDo)


class DecoderFirstInit(InitStrategy):
    """An initialisation that draws the decoder first and derives everything else from it.

    `IdenticalLatentsInit` steps in between the two.
    """

    def init_weights(self, model: Coder, generator: torch.Generator, samples: SampleBatches | None = None) -> None:
        with torch.no_grad():
            self.init_decoder(model, generator)
            model.widths.trim_(model.W_dec_LXoDo)
            if model.partition is not None:
                model.partition.clear_(model.W_dec_LXoDo)
            self.derive_encoder(model, generator, samples)

    @abstractmethod
    def init_decoder(self, model: Coder, generator: torch.Generator) -> None:
        """Fill `W_dec_LXoDo`."""

    @abstractmethod
    def derive_encoder(self, model: Coder, generator: torch.Generator, samples: SampleBatches | None) -> None:
        """Fill everything else, from the decoder as it is now."""


def randn(shape: tuple[int, ...], generator: torch.Generator, like: Tensor) -> Tensor:
    """Standard normal numbers that do not depend on the device."""
    return torch.randn(shape, generator=generator, dtype=torch.float32).to(like)


def uniform(shape: tuple[int, ...], bound: float, generator: torch.Generator, like: Tensor) -> Tensor:
    """Uniform numbers in [-bound, bound] that do not depend on the device."""
    return (torch.rand(shape, generator=generator, dtype=torch.float32) * 2 - 1).mul_(bound).to(like)


def random_directions(shape: tuple[int, ...], norm: float, generator: torch.Generator, like: Tensor) -> Tensor:
    """Random vectors of length `norm` along the last axis."""
    vectors = randn(shape, generator, like)
    return vectors.mul_(norm / vectors.norm(dim=-1, keepdim=True))


def require_spaces_match(model: Coder, init_type: str) -> None:
    if not model.spaces_match:
        raise InputError(
            f"crosscoder.init.type = {init_type!r}: needs equal input and output spaces, got "
            f"{(*model.in_dims, model.d_in)} and {(*model.out_dims, model.d_out)}"
        )


def zero_(*params: Tensor | None) -> None:
    """Zero the parameters that exist."""
    for param in params:
        if param is not None:
            param.zero_()


INITIALIZATIONS: Registry[Any] = Registry("crosscoder.init", __package__ or "")
