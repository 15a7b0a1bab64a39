"""What a sparse coder holds: sizes, weights and how to look at them.

Axes: Xi/Xo any input/output crosscoding dims · Di/Do input/output width · I/O flattened · X crosscoding positions of the
output · L latents.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from crosscode_kernels import AnyBackend, Backend, OpSet, resolve_backend
from crosscode_kernels.decoder_norms import DecoderNorms, NormMode
from crosscode_kernels.row_view import row_view
from torch import Tensor, nn

from crosscode.errors import InputError
from crosscode.models.activations.base import ActivationFunction
from crosscode.models.coder import Coder
from crosscode.models.partition import Partition
from crosscode.models.shapes import check_sizes
from crosscode.widths import Widths


def view(name: str) -> Any:
    """A property: another name, of other axes, for the weight that `name` gives."""
    return property(attrgetter(name))


class CoderWeights(nn.Module, Coder):
    """The part of `BaseCrosscoder` that computes no latents."""

    default_decoder_norm: ClassVar[NormMode] = "sum"
    first_row: int = 0
    """The latent whose weights are in row 0 of the encoder and the decoder, which hold as many as they have rows."""
    n_shared_latents: int = 0
    partition: Partition | None = None
    prefixes: tuple[int, ...] = ()
    prefix_thresholds_S: Tensor | None
    use_pre_bias: bool = False
    position_names: tuple[str, ...] = ()
    """Names of the output's positions, where they are known (of a saved model, from its metadata)."""
    metadata: Mapping[str, Any] = MappingProxyType({})
    """What is known of the activations that it was trained on: `language_models` (path, name, fingerprint, n_layers, ...),
    `hookpoints`, `architecture`; of a saved model, and saved again with it."""
    folded_scaling_in_Xi: Tensor | None
    folded_scaling_out_Xo: Tensor | None

    def __init__(
        self,
        in_dims: tuple[int, ...],
        d_in: int,
        out_dims: tuple[int, ...],
        d_out: int,
        n_latents: int,
        decoder_norm: NormMode | None,
        backend: AnyBackend,
    ):
        nn.Module.__init__(self)
        check_sizes(in_dims=in_dims, d_in=d_in, out_dims=out_dims, d_out=d_out, n_latents=n_latents)
        self.in_dims, self.out_dims = tuple(in_dims), tuple(out_dims)
        self.d_in, self.d_out, self.n_latents = d_in, d_out, n_latents
        self.widths = Widths.of((), self.out_dims, d_out)
        self.decoder_norm: NormMode = decoder_norm or self.default_decoder_norm
        self.backend = Backend.parse(backend)
        self.op_set_of: Callable[..., OpSet] = resolve_backend
        """makes the op set: of the backend, the device and the dtype"""
        self._ops: tuple[Any, OpSet] | None = None
        self.register_buffer("prefix_thresholds_S", None)
        self.register_buffer("folded_scaling_in_Xi", None)
        self.register_buffer("folded_scaling_out_Xo", None)

    # ---- views and facts

    def rows_here(self, latents: slice) -> slice:
        """The rows of these latents, as far as they are here."""
        first, n_rows = self.first_row, self.W_dec_LXoDo.shape[0]
        return slice(*(min(max(latent - first, 0), n_rows) for latent in (latents.start, latents.stop)))

    def found_here(self, latents_R: Tensor) -> tuple[Tensor, Tensor]:
        """Which of these latents have their weights here `(R,)`, and the rows of those that have `(those,)`."""
        row_R = latents_R - self.first_row
        here_R = (row_R >= 0) & (row_R < self.W_dec_LXoDo.shape[0])
        return here_R, row_R[here_R]

    @property
    def W_enc_LI(self) -> Tensor:
        """The encoder as a matrix `(L, I)`, a view: a row for each latent."""
        return self._matrix(self.W_enc_LXiDi)

    @property
    def W_dec_LO(self) -> Tensor:
        """The decoder as a matrix `(L, O)`, a view: a row for each latent."""
        return self._matrix(self.W_dec_LXoDo)

    def _matrix(self, W_L: Tensor) -> Tensor:
        return row_view(W_L) if self.ops.name == "torch" else W_L.flatten(1)  # the others give dense gradients

    @property
    def W_enc_XiDiL(self) -> Tensor:
        """The encoder with the latents last, a view."""
        return self.W_enc_LXiDi.movedim(0, -1)

    @property
    def segments(self) -> tuple[int, ...]:
        """Widths of the crosscoding positions along O, padding included."""
        return (self.d_out,) * math.prod(self.out_dims)

    @property
    def spaces_match(self) -> bool:
        """Whether input and output have the same crosscoding dims and width."""
        return (self.in_dims, self.d_in) == (self.out_dims, self.d_out)

    @property
    def is_folded(self) -> bool:
        """Whether activation scaling is folded in: the model takes and returns raw activations."""
        return self.folded_scaling_in_Xi is not None

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.parts[0].W_enc_LXiDi.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters."""
        return self.parts[0].W_enc_LXiDi.dtype

    @property
    def parts(self) -> Sequence[Coder]:
        """The models with weights of their own: this one, or the source layers of a compound model."""
        return (self,)

    @property
    def outputs_of_parts(self) -> Sequence[slice]:
        """The output positions (flattened) that each part writes to."""
        return (slice(0, len(self.segments)),)

    @property
    def activation_fns(self) -> list[ActivationFunction]:
        """One for each part."""
        return [part.activation_fn for part in self.parts]

    @property
    def ops(self) -> OpSet:
        """The ops of the chosen backend, for where the parameters are now."""
        key = (self.backend, self.device, self.dtype)
        if self._ops is None or self._ops[0] != key:
            self._ops = (key, self.op_set_of(*key))
        return self._ops[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ops": None}

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Trainable parameters: `weights`, and the activations' `thresholds`, which may want another learning rate."""
        thresholds = [param for activation in self.activation_fns for param in activation.parameters()]
        ids = {id(param) for param in thresholds}
        return {"weights": [p for p in self.parameters() if id(p) not in ids], "thresholds": thresholds}

    def mark_uninitialised_(self) -> None:
        """NaN in the first row: whatever fills the weights overwrites it, and until then nothing looks like a result."""
        with torch.no_grad():
            self.W_enc_LXiDi[0].fill_(math.nan)
            self.W_dec_LXoDo[0].fill_(math.nan)

    def check_initialised(self) -> None:
        """Raise `InputError` where the weights were never filled. Reads a few values from the device."""
        for part in self.parts:
            firsts = (part.W_enc_LXiDi[:1], part.W_dec_LXoDo[:1])  # none, where it holds no rows
            if all(len(first) and bool(first.isnan().all()) for first in firsts):
                raise InputError("model: its weights are not initialised; call model.init_weights(...), or load them")

    def extra_repr(self) -> str:
        """Sizes, activation, backend and parameters, for `repr(model)`."""
        into, out = (*self.in_dims, self.d_in), (*self.out_dims, self.d_out)
        activation = self.parts[0].activation_fn
        widths = "".join(f"{name} {value}, " for name, value in self.widths.as_option().items())
        return (
            f"{into} -> {self.n_latents:,} latents -> {out}, {activation.type_name()}({activation.extra_repr()}), "
            f"backend={str(self.backend)!r}, {widths}"
            f"{sum(param.numel() for param in self.parameters()):,} parameters ({self.dtype}, {self.device}), "
            f"scaling {'folded in' if self.is_folded else 'not folded in'}"
        )

    def __repr__(self) -> str:
        hookpoints, shown = self.metadata.get("hookpoints") or (), ""
        written = {name.rpartition("/")[2] for name in self.position_names}
        if reads := [name for name in hookpoints if name not in written]:
            shown += f", reads {', '.join(reads)}"
        if self.position_names:
            shown += f", positions: {', '.join(self.position_names)}"
        architecture = self.metadata.get("architecture")
        return f"{type(self).__name__}({f'{architecture}: ' if architecture else ''}{self.extra_repr()}{shown})"

    # ---- decoder norms

    def decoder_norms(self) -> DecoderNorms:
        """Norms of the decoder vectors per crosscoding position and per latent."""
        return self.ops.decoder_norms(self.W_dec_LO, self.segments, self.decoder_norm)

    def ranking_norms_L(self) -> Tensor:
        """`n_L` in the space of training: folding rescales the decoder, which must not change what is selected."""
        norms = self.decoder_norms()
        if self.folded_scaling_out_Xo is None:
            return norms.n_L
        norms_LX = norms.norms_LX * self.folded_scaling_out_Xo.flatten()
        return norms_LX.sum(1) if self.decoder_norm == "sum" else norms_LX.norm(dim=1)
