"""One hookpoint in, several out.

Axes: B tokens · P output hookpoints · D model dimension (Di in, Do out) · L latents.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from crosscode.models.activations.base import ActivationFunction
from crosscode.models.architecture import ARCHITECTURES, ArchitectureConfig
from crosscode.models.base import BaseCrosscoder
from crosscode.models.split import Split
from crosscode.models.weights import view


@ARCHITECTURES.register
class CrossLayerTranscoder(BaseCrosscoder):
    """`Xi = ()`, `Xo = (P,)`: reads one hookpoint `[B, Di]` and predicts P others `[B, P, Do]`.

    `n_out_hookpoints` is P. The decoder norm is that of the concatenation by default. Further options are those of
    `BaseCrosscoder`.
    """

    capturable = True

    class Config(ArchitectureConfig):
        type: Literal["cross_layer_transcoder"] = "cross_layer_transcoder"
        title = "cross-layer transcoder"
        usual_init = "anthropic_transpose_cross_layer"
        split = Split(
            type,
            lambda p: (0, slice(1, None)),
            lambda p: p >= 2,
            "needs at least two hookpoints, [input, output, output, ...]",
        )

    own_arguments = ("n_out_hookpoints", "d_in", "d_out")
    default_decoder_norm = "joint"

    W_enc_DL: Tensor = view("W_enc_XiDiL")
    W_dec_LPD: Tensor = view("W_dec_LXoDo")
    b_dec_PD: Tensor | None = view("b_dec_XoDo")
    W_skip_DPD: Tensor | None = view("W_skip_XiDiXoDo")

    def __init__(
        self,
        n_out_hookpoints: int,
        d_in: int,
        d_out: int,
        n_latents: int,
        activation_fn: ActivationFunction,
        **options: Any,
    ):
        out_dims = (n_out_hookpoints,)
        super().__init__((), d_in, out_dims, d_out, n_latents, activation_fn, **options)
        self.n_out_hookpoints = n_out_hookpoints

    @classmethod
    def dims_for(cls, n_models: int, n_hookpoints: int, d_model: int) -> dict[str, int]:
        return {"n_out_hookpoints": n_hookpoints - 1, "d_in": d_model, "d_out": d_model}
