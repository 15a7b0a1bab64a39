"""The one abstraction: a sparse coder from `(Xi, Di)` to `(Xo, Do)`.

Axes: B tokens · Xi/Xo any input/output crosscoding dims · Di/Do input/output width · I/O flattened · L latents.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

import torch
from crosscode_kernels import AnyBackend
from crosscode_kernels.decoder_norms import NormMode
from crosscode_kernels.recon_loss import ReconLoss
from crosscode_kernels.sparse import Latents
from torch import Tensor, nn

from crosscode.config.registry import type_of
from crosscode.errors import InputError
from crosscode.models import folding
from crosscode.models.activations.base import ActivationFunction
from crosscode.models.coder_files import CoderFiles
from crosscode.models.forward import ForwardResult as ForwardResult
from crosscode.models.initialization.base import InitStrategy, SampleBatches
from crosscode.models.prefixes import prefix_of, sizes_of
from crosscode.models.shapes import check_shape, checked_latents


class BaseCrosscoder(CoderFiles):
    """Encode, decode, save, load, clone and fold for every architecture; a subclass names the dimensions.

    Args:
        in_dims: sizes of the crosscoding dimensions Xi of the input, `()` for none.
        d_in: width Di of the vector at each of these positions.
        out_dims: sizes of the crosscoding dimensions Xo of the output.
        d_out: width Do of the vector at each of these positions.
        n_latents: number of latents L.
        activation_fn: owns the encode.
        use_encoder_bias: whether `b_enc_L` exists.
        use_decoder_bias: whether `b_dec_XoDo` exists.
        use_pre_bias: whether `b_dec` is subtracted from the input before encoding (Gao et al. 2024).
        linear_skip: adds `x . W_skip` to the output.
        decoder_norm: how the norms of one latent's decoder vectors combine: "sum" lets latents be exclusive to a
            position (default of crosscoders), "joint" is the norm of their concatenation (default of cross-layer
            transcoders).
        prefixes: sizes of nested dictionaries that must reconstruct alone (see `crosscode.models.prefixes`).
        backend: see `crosscode_kernels.resolve_backend`; changes speed and memory, never results.
        dtype: of the parameters; default: torch's own.

    Parameters start uninitialised: call `init_weights`, or `load`.

    Raises:
        InputError: sizes or options that do not go together.
    """

    capturable: bool = False
    """Whether its steps can be CUDA graphs: but for `before_step` they launch the same each time. A subclass says so of
    itself."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "Config" in cls.__dict__ and "kind" not in cls.__dict__:
            cls.kind = type_of(cls.Config)  # pyright: ignore[reportAttributeAccessIssue]

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
        prefixes: Sequence[float] = (),
        backend: AnyBackend = "auto",
        dtype: torch.dtype = torch.float32,
    ):
        if activation_fn.n_latents != n_latents:
            raise InputError(f"n_latents = {n_latents}: the activation was made for {activation_fn.n_latents} latents")
        super().__init__(in_dims, d_in, out_dims, d_out, n_latents, decoder_norm, backend)
        if "screened" in self.backend.options and not activation_fn.is_screened:
            raise InputError(
                f"backend = {str(self.backend)!r}: screens the encode of crosscoder.activation.type 'topk', "
                f"got {activation_fn.type_name()!r}"
            )
        self.activation_fn = activation_fn.to_param_dtype(dtype)
        self.prefixes = sizes_of(prefixes, n_latents)
        if self.prefixes and activation_fn.keeps_k:
            self.prefix_thresholds_S = torch.full((len(self.prefixes),), -1.0)
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
        self.mark_uninitialised_()

    @property
    def parts(self) -> Sequence[BaseCrosscoder]:
        return (self,)

    def inputs_of_parts(self, x_BXiDi: Tensor) -> Sequence[Tensor]:
        """What each of `parts` reads of the input: a tensor `(B, Xi, Di)` of each."""
        return (x_BXiDi,)

    @property
    def selects_over_parts(self) -> bool:
        """Whether the activations of `parts` select as one, over the latents of them all."""
        return False

    def select_by_part_(self) -> None:
        """From now on they do not."""

    # ---- forward

    def encode_latents(self, x_BXiDi: Tensor) -> Latents:
        """Latents of a batch in the form that the backend prefers (sparse or dense)."""
        check_shape("input", x_BXiDi, self.in_dims, self.d_in)
        x_BI, n_L = self.encoder_input(x_BXiDi), self._norms_to_rank_by()
        return self.activation_fn.encode(self.ops, x_BI, self.W_enc_LI, self.b_enc_L, n_L)

    def encode(self, x_BXiDi: Tensor) -> Tensor:
        """Dense `latents_BL`. For large L prefer `encode_latents`."""
        return self.encode_latents(x_BXiDi).to_dense()

    def decode(self, latents: Latents | Tensor, x_BXiDi: Tensor | None = None) -> Tensor:
        """`output_BXoDo` from latents (either form, or a dense `latents_BL`).

        Raises:
            InputError: another number of latents; a model with a linear skip, which needs the input as well.
        """
        y_BO = self.ops.sparse_decode(checked_latents(latents, self.n_latents), self.W_dec_LO, self._b_dec_O)
        if self.W_skip_XiDiXoDo is not None:
            if x_BXiDi is None:
                raise InputError("decode: this model has a linear skip, so it needs the input x_BXiDi as well")
            y_BO = y_BO + self._skip_BO(self.W_skip_XiDiXoDo, x_BXiDi)
        return y_BO.reshape(-1, *self.out_dims, self.d_out)

    def decode_parts(self, latents_of_parts: Sequence[Latents], x_BXiDi: Tensor) -> Tensor:
        """`output_BXoDo` from the latents of each of `parts`."""
        return self.decode(latents_of_parts[0], x_BXiDi)

    def decode_prefixes(self, latents_of_parts: Sequence[Latents], x_BXiDi: Tensor, sizes: Sequence[int]) -> Tensor:
        """`output_BSXoDo`: what `decode_parts` would give of the first `sizes[s]` latents alone (of a compound model, of the
        first ones of each source layer), for each s in one pass."""
        y_BSO = self.ops.nested_decode(latents_of_parts[0], self.W_dec_LO, self._b_dec_O, sizes)
        if self.W_skip_XiDiXoDo is not None:
            y_BSO = y_BSO + self._skip_BO(self.W_skip_XiDiXoDo, x_BXiDi)[:, None]
        return y_BSO.reshape(-1, len(sizes), *self.out_dims, self.d_out)

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
        return self.ops.aux_topk(self.encoder_input(x_BXiDi), self.W_enc_LI, self.b_enc_L, dead_mask_L, k)

    def dead_recon_loss(self, x_BXiDi: Tensor, dead_mask_L: Tensor, k: int, residual_BO: Tensor) -> Tensor:
        """Squared error (summed over the output, mean over the batch) once the k latents of `dead_latents` have added what they
        decode to, without bias or skip, to `residual_BO`, output less target (for AuxK). The weights' gradients may be sparse
        over rows, until they are added to those of the reconstruction."""
        encoder = (self.encoder_input(x_BXiDi), self.W_enc_LI, self.b_enc_L)
        return self.ops.dead_recon_loss(*encoder, dead_mask_L, k, self.W_dec_LO, residual_BO, sparse_grad=True)

    def forward_train(self, x_BXiDi: Tensor) -> ForwardResult:
        """Latents, and what follows from them, for an `Objective`."""
        latents = self.encode_latents(x_BXiDi)
        return ForwardResult.of(self, x_BXiDi, latents)

    def forward(self, x_BXiDi: Tensor) -> Tensor:
        """The reconstruction `output_BXoDo`."""
        return self.forward_train(x_BXiDi).output_BXoDo

    def encoder_input(self, x_BXiDi: Tensor) -> Tensor:
        """What the encoder is multiplied with: `x_BI`."""
        if self.use_pre_bias:
            assert self.b_dec_XoDo is not None
            x_BXiDi = x_BXiDi - self.b_dec_XoDo
        return x_BXiDi.flatten(1)

    # ---- hooks of the training loop

    def before_step(self, step: int, n_steps: int) -> None:
        """Called at the start of each training step, e.g. for annealing k."""
        for activation in self.activation_fns:
            activation.before_step(step, n_steps)

    @torch.no_grad()
    def after_step(self, latents: Latents) -> None:
        """Called once per training step with the latents of the whole batch, for running statistics."""
        self.activation_fn.after_step(latents, self._norms_to_rank_by())

    @contextmanager
    def k_multiplied(self, factor: int) -> Iterator[None]:
        """Within the block every TopK-style activation keeps `factor` times as many latents (multi-TopK)."""
        for activation in self.activation_fns:
            activation.multiply_k(factor)
        try:
            yield
        finally:
            for activation in self.activation_fns:
                activation.multiply_k(1)

    def _norms_to_rank_by(self) -> Tensor | None:
        return self.ranking_norms_L() if self.activation_fn.uses_decoder_norms else None

    # ---- initialisation, folding, copies

    def init_weights(self, strategy: InitStrategy, seed: int = 0, samples: SampleBatches | None = None) -> Self:
        """Fill all parameters; returns the model itself.

        Raises:
            InputError: the strategy cannot fill this model, or looks at activations and there are no `samples`.
        """
        self.check_init(strategy)
        if strategy.needs_data and samples is None:
            raise InputError(f"init: {type(strategy).__name__} looks at activations: pass `samples`")
        strategy.init_weights(self, torch.Generator().manual_seed(seed), samples)
        return self

    def check_init(self, strategy: InitStrategy) -> None:
        """Raise `InputError` where the strategy cannot fill this model."""
        for part in [self] if strategy.takes_compound else self.parts:
            strategy.check_model(part)

    def fold_activation_scaling_into_weights_(self, scaling_in_Xi: Tensor, scaling_out_Xo: Tensor) -> None:
        """Afterwards the model takes raw activations and returns raw reconstructions; latents are unchanged.

        Args:
            scaling_in_Xi: factors that training multiplied input activations with, one per position.
            scaling_out_Xo: those of the output.

        Raises:
            InputError: if scaling is folded in already, or a factor is not positive and finite.
        """
        folding.fold_scaling_(self, scaling_in_Xi, scaling_out_Xo)

    def scale_weights_(self, scaling_in_Xi: Tensor, scaling_out_Xo: Tensor) -> None:
        """What folding does to the weights."""
        folding.scale_weights_(self, scaling_in_Xi, scaling_out_Xo)

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

    def prefix(self, n_latents: int) -> Self:
        """The first `n_latents` latents as a model of their own, in eval mode: it keeps of them what this one keeps (of TopK and
        BatchTopK, as many as training keeps), by thresholds of its own.

        Raises:
            InputError: what is kept cannot be told of these latents alone, or thresholds were not calibrated for that size.
        """
        return prefix_of(self, n_latents)

    @classmethod
    def dims_for(cls, n_models: int, n_hookpoints: int, d_model: int) -> dict[str, int]:
        """The constructor arguments that follow from the harvested activations."""
        raise NotImplementedError
