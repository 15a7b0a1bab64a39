"""What helpers of models (initialisations, folding, files) may read of one: so they need not know `BaseCrosscoder`.

Axes: B tokens · Xi/Xo input/output crosscoding dims · Di/Do input/output width · I/O flattened · L latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

import torch
from crosscode_kernels.decoder_norms import NormMode
from crosscode_kernels.recon_loss import ReconLoss
from crosscode_kernels.sparse import Latents
from torch import Tensor, nn

from crosscode.models.activations.base import ActivationFunction
from crosscode.models.partition import Partition
from crosscode.widths import Widths


class Coder(Protocol):
    """A sparse coder, as its helpers see it. `BaseCrosscoder` is one; meanings of the options stand there."""

    kind: ClassVar[str]
    """The architecture, as files name it: the `type` of its `Config` unless it says otherwise."""
    own_arguments: ClassVar[tuple[str, ...]]
    """Arguments of the constructor that only this architecture has; attributes as well."""
    in_dims: tuple[int, ...]
    out_dims: tuple[int, ...]
    d_in: int
    d_out: int
    n_latents: int
    n_shared_latents: int
    """The first latents of the dictionary, whose decoder vectors are one and the same for all models."""
    partition: Partition | None
    """Which latents belong to some models only; None: every latent belongs to all."""
    widths: Widths
    """Of the output positions, without padding."""
    prefixes: tuple[int, ...]
    """Sizes of the nested dictionaries that must reconstruct alone, ascending, without the whole."""
    prefix_thresholds_S: Tensor | None
    """Where k latents of each token or batch are kept: for each prefix the threshold that lets through as many as training keeps
    of it; -1: not calibrated."""
    use_pre_bias: bool
    decoder_norm: NormMode
    activation_fn: ActivationFunction
    W_enc_LXiDi: nn.Parameter
    W_dec_LXoDo: nn.Parameter
    b_enc_L: nn.Parameter | None
    b_dec_XoDo: nn.Parameter | None
    W_skip_XiDiXoDo: nn.Parameter | None
    folded_scaling_in_Xi: Tensor | None
    folded_scaling_out_Xo: Tensor | None
    """What training multiplied activations with, once it is folded into the weights."""

    @property
    def parts(self) -> Sequence[Coder]: ...
    @property
    def outputs_of_parts(self) -> Sequence[slice]: ...
    @property
    def W_enc_LI(self) -> Tensor: ...
    @property
    def W_dec_LO(self) -> Tensor: ...
    @property
    def segments(self) -> tuple[int, ...]: ...
    @property
    def spaces_match(self) -> bool: ...
    @property
    def is_folded(self) -> bool: ...
    @property
    def dtype(self) -> torch.dtype: ...
    def ranking_norms_L(self) -> Tensor: ...
    def decode(self, latents: Latents | Tensor, x_BXiDi: Tensor | None = None) -> Tensor: ...
    def decode_parts(self, latents_of_parts: Sequence[Latents], x_BXiDi: Tensor) -> Tensor: ...
    def recon_loss(self, latents_of_parts: Sequence[Latents], x_BXiDi: Tensor, target_BXoDo: Tensor) -> ReconLoss: ...
    def scale_weights_(self, scaling_in_Xi: Tensor, scaling_out_Xo: Tensor) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
