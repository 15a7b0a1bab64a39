"""The one abstraction: a sparse coder from `(Xi, Di)` to `(Xo, Do)`.

Axes: B tokens · Xi/Xo any input/output crosscoding dims · Di/Do input/output width · I/O flattened · L latents.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from crosscode_kernels import AnyBackend, Backend, OpSet, resolve_backend
from crosscode_kernels.decoder_norms import DecoderNorms, NormMode
from crosscode_kernels.recon_loss import ReconLoss
from crosscode_kernels.sparse import DenseLatents, Latents
from torch import Tensor, nn

from crosscode.errors import InputError
from crosscode.models import folding
from crosscode.models.activations.base import ActivationFunction
from crosscode.models.forward import ForwardResult as ForwardResult
from crosscode.models.lifecycle import Lifecycle
from crosscode.models.row_view import row_view


class BaseCrosscoder(Lifecycle):
    """Encode, decode, save, load, clone and fold for every architecture; a subclass names the dimensions.

    Args:
        in_dims, out_dims: sizes of the crosscoding dimensions Xi and Xo, `()` for none.
        d_in, d_out: widths of the vectors at each position.
        n_latents: number of latents L.
        activation_fn: owns the encode.
        use_encoder_bias, use_decoder_bias: whether `b_enc_L` and `b_dec_XoDo` exist.
        use_pre_bias: whether `b_dec` is subtracted from the input before encoding (Gao et al. 2024).
        linear_skip: adds `x . W_skip` to the output.
        decoder_norm: how the norms of one latent's decoder vectors combine: "sum" lets latents be exclusive to a
            position (default of crosscoders), "joint" is the norm of their concatenation (default of cross-layer
            transcoders).
        backend: see `crosscode_kernels.resolve_backend`; changes speed and memory, never results.

    Parameters start uninitialised: call `init_weights`, or `load`.
    """

    kind: ClassVar[str]
    default_decoder_norm: ClassVar[NormMode] = "sum"
    n_shared_latents: int = 0
    """The first latents of the dictionary whose decoder vectors are one and the same for all models."""
    use_pre_bias: bool = False
    activation_fn: ActivationFunction
    W_enc_LXiDi: nn.Parameter
    W_dec_LXoDo: nn.Parameter
    b_dec_XoDo: nn.Parameter | None
    b_enc_L: nn.Parameter | None
    W_skip_XiDiXoDo: nn.Parameter | None

    def __init__(
        self,
        in_dims: tuple[int, ...],
        d_in: int,
        out_dims: tuple[int, ...],
        d_out: int,
        n_latents: int,
        activation_fn: ActivationFunction,
        *,
        use_encoder_bias: bool = True,
        use_decoder_bias: bool = True,
        use_pre_bias: bool = False,
        linear_skip: bool = False,
        decoder_norm: NormMode | None = None,
        backend: AnyBackend = "auto",
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        if activation_fn.n_latents != n_latents:
            raise InputError(f"n_latents = {n_latents}: the activation was made for {activation_fn.n_latents} latents")
        self._set_dims(in_dims, d_in, out_dims, d_out, n_latents, decoder_norm, backend)
        if "screened" in self.backend.options and not activation_fn.is_screened:
            raise InputError(
                f"backend = {str(self.backend)!r}: screens the encode of activation.type 'topk', "
                f"got {activation_fn.type_name()!r}"
            )
        self.activation_fn = activation_fn.to_param_dtype(dtype)
        self.use_pre_bias = use_pre_bias
        if use_pre_bias and not (use_decoder_bias and self.spaces_match):
            raise InputError(
                "use_pre_bias = True: subtracts the decoder bias from the input, so it needs use_decoder_bias and "
                f"equal input and output spaces, got {(*in_dims, d_in)} and {(*out_dims, d_out)}"
            )

        def param(exists: bool, *shape: int) -> nn.Parameter | None:
            return nn.Parameter(torch.empty(shape, dtype=dtype)) if exists else None

        self.W_enc_LXiDi = nn.Parameter(torch.empty(n_latents, *in_dims, d_in, dtype=dtype))
        self.W_dec_LXoDo = nn.Parameter(torch.empty(n_latents, *out_dims, d_out, dtype=dtype))
        self.b_enc_L = param(use_encoder_bias, n_latents)
        self.b_dec_XoDo = param(use_decoder_bias, *out_dims, d_out)
        self.W_skip_XiDiXoDo = param(linear_skip, *in_dims, d_in, *out_dims, d_out)

    def _set_dims(
        self,
        in_dims: tuple[int, ...],
        d_in: int,
        out_dims: tuple[int, ...],
        d_out: int,
        n_latents: int,
        decoder_norm: NormMode | None,
        backend: AnyBackend,
    ) -> None:
        for name, sizes in (("in_dims", in_dims), ("out_dims", out_dims)):
            if any(size < 1 for size in sizes):
                raise InputError(f"{name} = {tuple(sizes)}: every size must be at least 1")
        for name, size in (("d_in", d_in), ("d_out", d_out), ("n_latents", n_latents)):
            if size < 1:
                raise InputError(f"{name} = {size}: must be at least 1")
        self.in_dims, self.out_dims = tuple(in_dims), tuple(out_dims)
        self.d_in, self.d_out, self.n_latents = d_in, d_out, n_latents
        self.decoder_norm: NormMode = decoder_norm or self.default_decoder_norm
        self.backend = Backend.parse(backend)
        self._ops: tuple[Any, OpSet] | None = None

    # ---- views and facts

    @property
    def W_enc_LI(self) -> Tensor:
        return row_view(self.W_enc_LXiDi, "rows" in self.backend.options)

    @property
    def W_dec_LO(self) -> Tensor:
        return row_view(self.W_dec_LXoDo, "rows" in self.backend.options)

    @property
    def W_enc_XiDiL(self) -> Tensor:
        return self.W_enc_LXiDi.movedim(0, -1)

    @property
    def segments(self) -> tuple[int, ...]:
        """Widths of the crosscoding positions along O."""
        return (self.d_out,) * math.prod(self.out_dims)

    @property
    def spaces_match(self) -> bool:
        """Whether input and output have the same crosscoding dims and width."""
        return (self.in_dims, self.d_in) == (self.out_dims, self.d_out)

    @property
    def device(self) -> torch.device:
        return self.parts[0].W_enc_LXiDi.device

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0].W_enc_LXiDi.dtype

    @property
    def parts(self) -> Sequence[BaseCrosscoder]:
        """The models with weights of their own: this one, or the source layers of a compound model."""
        return (self,)

    @property
    def activation_fns(self) -> list[ActivationFunction]:
        return [part.activation_fn for part in self.parts]

    @property
    def ops(self) -> OpSet:
        """The ops of the chosen backend, for where the parameters are now."""
        key = (self.backend, self.device, self.dtype)
        if self._ops is None or self._ops[0] != key:
            self._ops = (key, resolve_backend(*key))
        return self._ops[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ops": None}

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Trainable parameters: `weights`, and the activations' `thresholds`, which may want another learning rate."""
        thresholds = [param for activation in self.activation_fns for param in activation.parameters()]
        ids = {id(param) for param in thresholds}
        return {"weights": [p for p in self.parameters() if id(p) not in ids], "thresholds": thresholds}

    # ---- forward

    def encode_latents(self, x_BXiDi: Tensor) -> Latents:
        """Latents of a batch in the form that the backend prefers (sparse or dense)."""
        self._check_shape("input", x_BXiDi, self.in_dims, self.d_in)
        n_L = self.ranking_norms_L() if self.activation_fn.uses_decoder_norms else None
        return self.activation_fn.encode(self.ops, self._encoder_input(x_BXiDi), self.W_enc_LI, self.b_enc_L, n_L)

    def encode(self, x_BXiDi: Tensor) -> Tensor:
        """Dense `latents_BL`. For large L prefer `encode_latents`."""
        return self.encode_latents(x_BXiDi).to_dense()

    def decode(self, latents: Latents | Tensor, x_BXiDi: Tensor | None = None) -> Tensor:
        """`output_BXoDo` from latents (either form, or a dense `latents_BL`).

        A model with a linear skip needs the input as well.
        """
        y_BO = self.ops.sparse_decode(self._checked_latents(latents), self.W_dec_LO, self._b_dec_O)
        if self.W_skip_XiDiXoDo is not None:
            if x_BXiDi is None:
                raise InputError("decode: this model has a linear skip, so it needs the input x_BXiDi as well")
            y_BO = y_BO + self._skip_BO(self.W_skip_XiDiXoDo, x_BXiDi)
        return y_BO.reshape(-1, *self.out_dims, self.d_out)

    def decode_parts(self, latents_of_parts: Sequence[Latents], x_BXiDi: Tensor) -> Tensor:
        """`output_BXoDo` from the latents of each of `parts`."""
        return self.decode(latents_of_parts[0], x_BXiDi)

    def recon_loss(self, latents_of_parts: Sequence[Latents], x_BXiDi: Tensor, target_BXoDo: Tensor) -> ReconLoss:
        """Squared error of what `decode_parts` would give."""
        target_BO = target_BXoDo.flatten(1)
        if self.W_skip_XiDiXoDo is not None:
            target_BO = target_BO - self._skip_BO(self.W_skip_XiDiXoDo, x_BXiDi)
        return self.ops.decode_recon_loss(latents_of_parts[0], self.W_dec_LO, self._b_dec_O, target_BO, self.segments)

    @property
    def _b_dec_O(self) -> Tensor | None:
        return None if self.b_dec_XoDo is None else self.b_dec_XoDo.flatten()

    def _skip_BO(self, W_skip_XiDiXoDo: Tensor, x_BXiDi: Tensor) -> Tensor:
        return x_BXiDi.flatten(1) @ W_skip_XiDiXoDo.reshape(self.W_enc_LI.shape[1], self.W_dec_LO.shape[1])

    def dead_latents(self, x_BXiDi: Tensor, dead_mask_L: Tensor, k: int) -> Latents:
        """The k largest `relu(h)` of each token among the latents of `dead_mask_L`; never encodes the others."""
        return self.ops.aux_topk(self._encoder_input(x_BXiDi), self.W_enc_LI, self.b_enc_L, dead_mask_L, k)

    def decode_dead(self, x_BXiDi: Tensor, dead_mask_L: Tensor, k: int) -> Tensor:
        """`output_BXoDo` of `dead_latents`, without bias or skip (for AuxK)."""
        y_BO = self.ops.sparse_decode(self.dead_latents(x_BXiDi, dead_mask_L, k), self.W_dec_LO, None)
        return y_BO.reshape(-1, *self.out_dims, self.d_out)

    def forward_train(self, x_BXiDi: Tensor) -> ForwardResult:
        """Latents, and what follows from them, for an `Objective`."""
        latents = self.encode_latents(x_BXiDi)
        return ForwardResult.of(self, x_BXiDi, latents)

    def forward(self, x_BXiDi: Tensor) -> Tensor:
        """The reconstruction `output_BXoDo`."""
        return self.forward_train(x_BXiDi).output_BXoDo

    def _encoder_input(self, x_BXiDi: Tensor) -> Tensor:
        if self.use_pre_bias:
            assert self.b_dec_XoDo is not None
            x_BXiDi = x_BXiDi - self.b_dec_XoDo
        return x_BXiDi.flatten(1)

    def _scale_weights_(self, scaling_in_Xi: Tensor, scaling_out_Xo: Tensor) -> None:
        folding.scale_weights_(self, scaling_in_Xi, scaling_out_Xo)

    def _dims_dict(self) -> dict[str, Any]:
        """The subclass's own constructor arguments."""
        raise NotImplementedError

    def _checked_latents(self, latents: Latents | Tensor) -> Latents:
        if isinstance(latents, Tensor):
            latents = DenseLatents(latents)
        if latents.n_latents != self.n_latents:
            raise InputError(f"latents: expected {self.n_latents} latents, got {latents.n_latents}")
        return latents

    def _check_shape(self, name: str, tensor: Tensor, dims: tuple[int, ...], width: int) -> None:
        if tuple(tensor.shape[1:]) != (*dims, width):
            expected = ", ".join(map(str, (*dims, width)))
            raise InputError(f"{name}: expected shape (B, {expected}), got {tuple(tensor.shape)}")

    # ---- hooks of the training loop

    def before_step(self, step: int, n_steps: int) -> None:
        """Called at the start of each training step, e.g. for annealing k."""
        for activation in self.activation_fns:
            activation.before_step(step, n_steps)

    @torch.no_grad()
    def after_step(self, latents: Latents) -> None:
        """Called once per training step with the latents of the whole batch, for running statistics."""
        n_L = self.ranking_norms_L() if self.activation_fn.uses_decoder_norms else None
        self.activation_fn.after_step(latents, n_L)

    @contextmanager
    def k_multiplied(self, factor: int) -> Iterator[None]:
        """Within the block every TopK-style activation keeps `factor` times as many latents (multi-TopK)."""
        for activation in self.activation_fns:
            activation.k_factor = factor
        try:
            yield
        finally:
            for activation in self.activation_fns:
                activation.k_factor = 1

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

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "kind" in cls.__dict__:
            MODELS[cls.kind] = cls


MODELS: dict[str, type[BaseCrosscoder]] = {}
"""Architectures by the `kind` that checkpoints and configs name."""
