"""The crosscoder over models and hookpoints.

Axes: B tokens · M models · P hookpoints · D model dimension · L latents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

from pydantic import Field, NonNegativeInt
from torch import Tensor

from crosscode.errors import InputError
from crosscode.models.activations.base import ActivationFunction
from crosscode.models.architecture import ARCHITECTURES, PreBiasConfig
from crosscode.models.base import BaseCrosscoder
from crosscode.models.initialization.base import InitStrategy, SampleBatches
from crosscode.models.partition import BlockConfig, Partition, check_order
from crosscode.models.split import Split
from crosscode.models.weights import view
from crosscode.widths import Widths


@ARCHITECTURES.register
class ModelHookpointAcausalCrosscoder(BaseCrosscoder):
    """Reads and reconstructs the activations of M models at P hookpoints: `Xi = Xo = (M, P)`.

    M = 2, P = 1 is the model-diffing crosscoder; M = 1, P > 1 the cross-layer one (Anthropic, "Sparse Crosscoders
    for Cross-Layer Features and Model Diffing", October 2024). Inputs and outputs are `acts_BMPD`. Further options
    are those of `BaseCrosscoder`.

    Args:
        n_models: M.
        n_hookpoints: P.
        d_model: width D of all of them, or of the widest.
        widths: the width of each model at each hookpoint, where they differ (see `crosscode.widths`).
        n_shared_latents: the first latents, whose decoder vectors are tied over the two models (model diffing,
            Anthropic, February 2025 update); `TieSharedDecoders` keeps them so in training.
        partition: blocks of latents that belong to some models only, `{"models": [0], "n_latents": 64}` or with a
            `share` of all latents; `HoldPartition` keeps their weights at other models at 0 in training. What order that
            gives, and what goes together, stands in `crosscode.models.partition`.

    Raises:
        InputError: as `BaseCrosscoder`.
    """

    capturable = True

    class Config(PreBiasConfig):
        type: Literal["model_hookpoint_acausal"] = "model_hookpoint_acausal"
        shared_fraction: float | None = Field(default=None, ge=0, le=1)
        """model diffing: share of latents whose decoder vectors are one and the same for both models"""
        n_shared_latents: NonNegativeInt = 0
        """the same as a number of latents, where shared_fraction is null"""
        partition: tuple[BlockConfig, ...] = ()
        """model diffing: blocks of latents that belong to some models only; all others belong to every model"""
        title = "crosscoder"
        split = Split(
            type,
            lambda p: (slice(None), slice(None)),
            lambda p: p >= 1,
            "needs at least one hookpoint",
            keeps_models=True,
        )

        def options(self, n_latents: int) -> dict[str, Any]:
            options = super().options(n_latents)
            share = options.pop("shared_fraction")
            return options if share is None else options | {"n_shared_latents": round(share * n_latents)}

    own_arguments = ("n_models", "n_hookpoints", "d_model", "n_shared_latents")

    W_enc_MPDL: Tensor = view("W_enc_XiDiL")
    W_dec_LMPD: Tensor = view("W_dec_LXoDo")
    b_dec_MPD: Tensor | None = view("b_dec_XoDo")

    def __init__(
        self,
        n_models: int,
        n_hookpoints: int,
        d_model: int,
        n_latents: int,
        activation_fn: ActivationFunction,
        *,
        n_shared_latents: int = 0,
        widths: Sequence[Sequence[int]] = (),
        partition: Sequence[BlockConfig | Mapping[str, Any]] = (),
        **options: Any,
    ):
        if not 0 <= n_shared_latents <= n_latents:
            raise InputError(f"n_shared_latents = {n_shared_latents}: must be between 0 and n_latents = {n_latents}")
        if n_shared_latents and n_models != 2:
            raise InputError(f"n_shared_latents = {n_shared_latents}: shared latents need n_models = 2, got {n_models}")
        dims = (n_models, n_hookpoints)
        super().__init__(dims, d_model, dims, d_model, n_latents, activation_fn, **options)
        self.n_models, self.n_hookpoints, self.d_model = n_models, n_hookpoints, d_model
        self.n_shared_latents = n_shared_latents
        self.widths = Widths.of(widths, dims, d_model)
        if n_shared_latents:
            self.widths.check_alike(f"n_shared_latents = {n_shared_latents}: must be 0 for models of different width")
        self.partition = Partition.of(partition, n_models, n_latents, n_shared_latents)
        check_order(self.prefixes, n_shared_latents, self.partition)

    def init_weights(self, strategy: InitStrategy, seed: int = 0, samples: SampleBatches | None = None) -> Self:
        super().init_weights(strategy, seed, samples)
        for weight_LMPD in (self.W_enc_LXiDi, self.W_dec_LXoDo):
            self.widths.clear_(weight_LMPD)
            if self.partition is not None:
                self.partition.clear_(weight_LMPD)
        return self

    @classmethod
    def dims_for(cls, n_models: int, n_hookpoints: int, d_model: int) -> dict[str, int]:
        return {"n_models": n_models, "n_hookpoints": n_hookpoints, "d_model": d_model}

    def norms_LMP(self) -> Tensor:
        """Norm of each latent's decoder vector, per model and hookpoint."""
        return self.decoder_norms().norms_LX.reshape(self.n_latents, self.n_models, self.n_hookpoints)
