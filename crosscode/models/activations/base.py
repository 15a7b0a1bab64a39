"""What an activation function is.

Axes: B tokens · I flattened input dims · L latents.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Self

import torch
from crosscode_kernels import OpSet
from crosscode_kernels.sparse import Latents
from torch import Tensor, nn

from crosscode.config.registry import ConfigModel, Registry, type_of
from crosscode.errors import InputError


class ActivationFunction(nn.Module, ABC):
    """Turns `(x_BI, W_enc, b_enc)` into latents. It owns the encode: a sparse activation has a sparse gradient.

    A subclass is one file in this folder: a nested `Config`, `encode`, and the plain definition `forward`.
    """

    Config: ClassVar[type[ConfigModel]]
    uses_decoder_norms: bool = False
    """Whether `encode` wants `n_L`, the decoder norms, to rank latents."""
    selects_over_batch: bool = False
    """Whether in train mode the latents of one token depend on the other tokens of the batch."""
    is_screened: bool = False
    """Whether the torch backend can screen its encode (backend "torch:screened")."""
    k_factor: int = 1
    """By what `k` is multiplied for the moment; see `BaseCrosscoder.k_multiplied`."""

    def __init__(self, n_latents: int):
        super().__init__()
        self.n_latents = n_latents

    @abstractmethod
    def encode(
        self, ops: OpSet, x_BI: Tensor, W_enc_LI: Tensor, b_enc_L: Tensor | None, n_L: Tensor | None = None
    ) -> Latents:
        """Latents of a batch, through the ops of a backend."""

    @abstractmethod
    def forward(self, preacts_BL: Tensor) -> Tensor:
        """The definition: dense latents from dense pre-activations."""

    def before_step(self, step: int, n_steps: int) -> None:
        """Called at the start of each training step."""
        return None

    @torch.no_grad()
    def after_step(self, latents: Latents, n_L: Tensor | None = None) -> None:
        """Called once per training step with the latents of the whole batch; for running statistics."""
        return None

    def rescale_latents_(self, scale_L: Tensor) -> None:
        """Called when pre-activations are multiplied by `scale_L`: adapt, so that the same latents are active."""
        raise InputError(
            f"activation.type = {self.type_name()!r}: which latents are kept depends on their scale, "
            "so decoder norms cannot be folded into the encoder"
        )

    def for_n_latents(self, n_latents: int) -> Self:
        """A fresh activation of the same config for another number of latents."""
        names = [name for name in self.Config.model_fields if name != "type"]
        return type(self)(**{name: getattr(self, name) for name in names}, n_latents=n_latents)

    def to_param_dtype(self, dtype: torch.dtype) -> Self:
        """Trainable parameters in the model's dtype; statistics keep their own."""
        for param in self.parameters():
            param.data = param.data.to(dtype)
        return self

    def config(self) -> ConfigModel:
        """The config that builds this activation again."""
        names = [name for name in self.Config.model_fields if name != "type"]
        return self.Config(**{name: getattr(self, name) for name in names})

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v!r}" for k, v in self.config().model_dump().items() if k != "type")

    @classmethod
    def type_name(cls) -> str:
        return type_of(cls.Config)


ACTIVATIONS: Registry[Any] = Registry("activation", __package__ or "")
