"""A model's life beyond forward and backward: initialise, fold, copy, save, load.

Axes: Xi/Xo input/output crosscoding dims.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

import torch
from crosscode_kernels import AnyBackend
from torch import Tensor, nn

from crosscode.errors import InputError
from crosscode.models import checkpoint, folding
from crosscode.models.initialization.base import InitStrategy, SampleBatches

if TYPE_CHECKING:
    from crosscode.models.base import BaseCrosscoder


class Lifecycle(nn.Module):
    """What `BaseCrosscoder` inherits; see there."""

    kind: ClassVar[str]
    n_latents: int
    folded_scaling_in_Xi: Tensor | None
    folded_scaling_out_Xo: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("folded_scaling_in_Xi", None)
        self.register_buffer("folded_scaling_out_Xo", None)

    @property
    @abstractmethod
    def parts(self) -> Sequence[BaseCrosscoder]:
        """The models with weights of their own: this one, or the source layers of a compound model."""

    @property
    def _base(self) -> BaseCrosscoder:
        return cast("BaseCrosscoder", self)

    @property
    def is_folded(self) -> bool:
        """Whether activation scaling is folded in: the model takes and returns raw activations."""
        return self.folded_scaling_in_Xi is not None

    # ---- initialisation, folding, copies

    def init_weights(self, strategy: InitStrategy, seed: int = 0, samples: SampleBatches | None = None) -> Self:
        """Fill all parameters; returns the model itself."""
        self.check_init(strategy)
        if strategy.needs_data and samples is None:
            raise InputError(f"init: {type(strategy).__name__} looks at activations: pass `samples`")
        strategy.init_weights(self._base, torch.Generator().manual_seed(seed), samples)
        return self

    def check_init(self, strategy: InitStrategy) -> None:
        """Raise `InputError` where the strategy cannot fill this model."""
        for part in [self._base] if strategy.takes_compound else self.parts:
            strategy.check_model(part)

    def fold_activation_scaling_into_weights_(self, scaling_in_Xi: Tensor, scaling_out_Xo: Tensor) -> None:
        """Afterwards the model takes raw activations and returns raw reconstructions; latents are unchanged.

        Args:
            scaling_in_Xi, scaling_out_Xo: factors that training multiplied activations with, one per position.

        Raises:
            InputError: if scaling is folded in already, or a factor is not positive and finite.
        """
        folding.fold_scaling_(self._base, scaling_in_Xi, scaling_out_Xo)

    def with_folded_scaling_factors(self, scaling_in_Xi: Tensor, scaling_out_Xo: Tensor) -> Self:
        """A copy with the scaling folded in; the model itself is unchanged."""
        folded = self.clone()
        folded.fold_activation_scaling_into_weights_(scaling_in_Xi, scaling_out_Xo)
        return folded

    def fold_decoder_norms_into_encoder_(self) -> None:
        """Decoder norms become 1, latents are multiplied by what their norms were; the function is unchanged.

        Raises:
            InputError: for activations whose selection depends on the latents' scale (TopK and GroupMax).
        """
        for part in self.parts:
            folding.fold_decoder_norms_(part)

    def clone(self) -> Self:
        """An independent copy."""
        return copy.deepcopy(self)

    # ---- checkpoints

    def config_dict(self) -> dict[str, Any]:
        """All that is needed to build this model again, without its weights."""
        return checkpoint.model_config(self._base)

    def save(self, path: str | Path, metadata: dict[str, Any] | None = None) -> None:
        """Write `model.safetensors` and `config.json` into the folder `path`, whole or not at all.

        Args:
            metadata: JSON values that belong to the weights, such as models and hookpoints.
        """
        checkpoint.save_model(self._base, Path(path), metadata or {})

    @classmethod
    def load(cls, path: str | Path, *, backend: AnyBackend = "auto", device: str | torch.device = "cpu") -> Self:
        """A saved model, equal to the bit, in eval mode.

        Raises:
            InputError: a missing folder, another architecture, or tensors whose names, shapes or dtypes differ.
        """
        base = cast("type[BaseCrosscoder]", cls)
        return cast(Self, checkpoint.load_model(base, Path(path), backend=backend, device=torch.device(device)))
