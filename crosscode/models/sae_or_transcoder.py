"""One vector in, one vector out.

Axes: B tokens · D model dimension (Di in, Do out) · L latents.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from crosscode.models.activations.base import ActivationFunction
from crosscode.models.architecture import ARCHITECTURES, PreBiasConfig
from crosscode.models.base import BaseCrosscoder
from crosscode.models.split import Split
from crosscode.models.weights import view


class SAEConfig(PreBiasConfig):
    """A sparse autoencoder: reads and reconstructs one hookpoint."""

    type: Literal["sae"] = "sae"
    title = "SAE"
    split = Split(type, lambda p: (0, 0), lambda p: p == 1, "reads and reconstructs exactly one hookpoint")


class DiffSAEConfig(PreBiasConfig):
    """An SAE of what two models' activations differ in: the second model's minus the first's, scaled alike, so that the
    mean norm of the difference is sqrt(D)."""

    type: Literal["diff_sae"] = "diff_sae"
    title = "SAE on the difference"
    without_verdict = (
        "Each latent is a part of the second model's activations minus the first's, with one vector for both: it says that they "
        "differ there, not that one of them lacks something. So there is no verdict by model, and no calibrated bound; "
        "steering shows what a latent does, and a crosscoder of the same two models says whose it is."
    )
    split = Split(
        type, lambda p: (0, 0), lambda p: p == 1, "reads exactly one hookpoint of two models", difference=True
    )


class TranscoderConfig(PreBiasConfig):
    """A transcoder: reads the first hookpoint and predicts the second."""

    type: Literal["transcoder"] = "transcoder"
    title = "transcoder"
    split = Split(type, lambda p: (0, 1), lambda p: p == 2, "needs exactly two hookpoints, [input, output]")


@ARCHITECTURES.register
class SAEOrTranscoder(BaseCrosscoder):
    """`Xi = Xo = ()`. A sparse autoencoder where input and target are the same activations `[B, D]`, a transcoder
    where they are those of two hookpoints. An SAE may read the difference of two models (`diff_sae`). Further options
    are those of `BaseCrosscoder`."""

    kind = "sae_or_transcoder"
    capturable = True
    own_arguments = ("d_in", "d_out")
    Configs = (SAEConfig, DiffSAEConfig, TranscoderConfig)

    W_enc_DL: Tensor = view("W_enc_XiDiL")
    W_dec_LD: Tensor = view("W_dec_LXoDo")
    b_dec_D: Tensor | None = view("b_dec_XoDo")
    W_skip_DD: Tensor | None = view("W_skip_XiDiXoDo")

    def __init__(self, d_in: int, d_out: int, n_latents: int, activation_fn: ActivationFunction, **options: Any):
        super().__init__((), d_in, (), d_out, n_latents, activation_fn, **options)

    @classmethod
    def dims_for(cls, n_models: int, n_hookpoints: int, d_model: int) -> dict[str, int]:
        return {"d_in": d_model, "d_out": d_model}
