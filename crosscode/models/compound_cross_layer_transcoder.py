"""A cross-layer transcoder for every layer at once ("Circuit Tracing", Anthropic, March 2025).

Axes: B tokens · P layers of the language model · S source layers · D model dimension (Di in, Do out) · L latents of
all source layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Self

import torch
from crosscode_kernels import AnyBackend
from crosscode_kernels.decoder_norms import DecoderNorms, NormMode
from crosscode_kernels.recon_loss import ReconLoss
from crosscode_kernels.sparse import Latents
from torch import Tensor, nn

from crosscode.errors import InputError
from crosscode.models.activations.base import ActivationFunction
from crosscode.models.architecture import ARCHITECTURES, ArchitectureConfig
from crosscode.models.base import BaseCrosscoder, ForwardResult
from crosscode.models.cross_layer_transcoder import CrossLayerTranscoder
from crosscode.models.initialization.base import InitStrategy, SampleBatches
from crosscode.models.layered_latents import concat_latents, keep_largest, layer_of_latents
from crosscode.models.prefixes import sizes_of
from crosscode.models.shapes import check_shape, checked_latents
from crosscode.models.split import Split
from crosscode.models.weights import CoderWeights
from crosscode.seeds import derived_seed

TopkScope = Literal["layer", "all_layers"]


@ARCHITECTURES.register
class CompoundCrossLayerTranscoder(BaseCrosscoder):
    """One `CrossLayerTranscoder` per source layer; their outputs add up: `Xi = Xo = (P,)`.

    Source layer s reads the input of layer s and decodes to the output of every layer from s on (with
    `own_layer = False`: from s + 1 on, and the last layer is no source; with `later_layers = False`: to layer s alone,
    which makes it a set of transcoders, one for each layer). Each has its own encoder bias and activation; there is one
    output bias per layer.

    Args:
        n_layers: P.
        n_latents: latents of all source layers together.
        activation_fn: a pattern; every source layer gets its own copy for its share of the latents.
        topk_scope: "layer": TopK and BatchTopK keep k latents in each source layer; "all_layers": k over all of them.

    Raises:
        InputError: as `BaseCrosscoder`.
    """

    capturable = True

    class Config(ArchitectureConfig):
        type: Literal["compound_cross_layer_transcoder"] = "compound_cross_layer_transcoder"
        own_layer: bool = True
        """whether a source layer decodes to its own layer, too, not only to later ones"""
        later_layers: bool = True
        """whether a source layer decodes to later layers, too; false: a set of transcoders, one for each layer"""
        topk_scope: TopkScope = "layer"
        """whether TopK and BatchTopK keep k latents in each source layer, or k over all of them"""
        title = "compound cross-layer transcoder"
        usual_init = "compound_uniform"
        takes_init_of_activation = False
        split = Split(
            type,
            lambda p: (slice(0, p // 2), slice(p // 2, None)),
            lambda p: p >= 2 and p % 2 == 0,
            "needs as many output as input hookpoints, [input of each layer ..., output of each layer ...]",
        )

    own_arguments = ("n_layers", "d_in", "d_out", "own_layer", "later_layers", "topk_scope")
    default_decoder_norm = "joint"

    def __init__(
        self,
        n_layers: int,
        d_in: int,
        d_out: int,
        n_latents: int,
        activation_fn: ActivationFunction,
        *,
        own_layer: bool = True,
        later_layers: bool = True,
        topk_scope: TopkScope = "layer",
        use_encoder_bias: bool = True,
        use_decoder_bias: bool = True,
        linear_skip: bool = False,
        decoder_norm: NormMode | None = None,
        prefixes: Sequence[float] = (),
        backend: AnyBackend = "auto",
        dtype: torch.dtype = torch.float32,
    ):
        # The weights are those of the layers, so not what BaseCrosscoder would make.
        CoderWeights.__init__(self, (n_layers,), d_in, (n_layers,), d_out, n_latents, decoder_norm, backend)
        self.n_layers, self.own_layer, self.later_layers, self.topk_scope = (
            n_layers,
            own_layer,
            later_layers,
            topk_scope,
        )
        if not (own_layer or later_layers):
            raise InputError("crosscoder.later_layers = False: with own_layer = False nothing would be written")
        n_sources = n_layers if own_layer else n_layers - 1
        if n_sources < 1:
            raise InputError(f"n_layers = {n_layers}: without own_layer at least two layers are needed")
        if n_latents % n_sources:
            raise InputError(f"n_latents = {n_latents}: must divide by the {n_sources} source layers")
        if topk_scope == "all_layers" and not activation_fn.keeps_k:
            raise InputError(
                f"crosscoder.topk_scope = 'all_layers': needs crosscoder.activation.type 'topk' or 'batch_topk', "
                f"got {activation_fn.type_name()!r}"
            )
        self.prefixes = sizes_of(prefixes, n_latents, n_sources)
        self.layers = nn.ModuleList(
            CrossLayerTranscoder(
                len(range(n_layers)[self._outputs(source)]),
                d_in,
                d_out,
                n_latents // n_sources,
                activation_fn.for_n_latents(n_latents // n_sources, n_latents if self.selects_over_parts else None),
                use_encoder_bias=use_encoder_bias,
                use_decoder_bias=False,
                linear_skip=linear_skip,
                decoder_norm=decoder_norm,
                prefixes=[size // n_sources for size in self.prefixes],
                backend=backend,
                dtype=dtype,
            )
            for source in range(n_sources)
        )
        self.b_dec_XoDo = nn.Parameter(torch.empty(n_layers, d_out, dtype=dtype)) if use_decoder_bias else None

    def _outputs(self, source: int) -> slice:
        """The layers that a source layer writes to."""
        first = source if self.own_layer else source + 1
        return slice(first, self.n_layers if self.later_layers else first + 1)

    @property
    def outputs_of_parts(self) -> tuple[slice, ...]:
        return tuple(self._outputs(source) for source in range(len(self.parts)))

    def _padding(self, source: int, width: int = 1) -> tuple[int, int]:
        """Zeros before and behind what a source layer writes, of `width` for each layer."""
        outputs = self._outputs(source)
        return outputs.start * width, (self.n_layers - outputs.stop) * width

    @classmethod
    def dims_for(cls, n_models: int, n_hookpoints: int, d_model: int) -> dict[str, int]:
        return {"n_layers": n_hookpoints // 2, "d_in": d_model, "d_out": d_model}

    @property
    def parts(self) -> tuple[CrossLayerTranscoder, ...]:
        return tuple(self.layers)  # pyright: ignore[reportReturnType]

    def inputs_of_parts(self, x_BXiDi: Tensor) -> Sequence[Tensor]:
        return x_BXiDi[:, : len(self.parts)].unbind(1)

    @property
    def selects_over_parts(self) -> bool:
        return self.topk_scope == "all_layers"

    def select_by_part_(self) -> None:
        self.topk_scope = "layer"

    # ---- forward

    def _encode_layers(self, x_BPD: Tensor) -> list[Latents]:
        check_shape("input", x_BPD, self.in_dims, self.d_in)
        layers = [part.encode_latents(x_BPD[:, source]) for source, part in enumerate(self.parts)]
        activation = self.activation_fns[0]
        selection = activation.selection() if self.selects_over_parts else None
        if selection is None or len(layers) == 1:
            return layers
        scale_L = self.ranking_norms_L().detach() if activation.uses_decoder_norms else None
        return keep_largest(layers, min(selection.k, self.n_latents), scale_L, over_batch=selection.over_batch)

    def _decode_layers(self, layers: Sequence[Latents], x_BPD: Tensor | None) -> Tensor:
        y_BO = self._grouped(layers, self._b_dec_O)
        for source, part in enumerate(self.parts):
            if part.W_skip_XiDiXoDo is not None:
                if x_BPD is None:
                    raise InputError("decode: this model has a linear skip, so it needs the input x_BXiDi as well")
                skip_BO = part._skip_BO(part.W_skip_XiDiXoDo, x_BPD[:, source])
                y_BO = y_BO + nn.functional.pad(skip_BO, self._padding(source, self.d_out))
        return y_BO.reshape(-1, self.n_layers, self.d_out)

    def _grouped(self, layers: Sequence[Latents], b_dec_O: Tensor | None) -> Tensor:
        """`y_BO`: what all source layers write, and the bias."""
        first_S = [self._padding(source, self.d_out)[0] for source in range(len(layers))]
        weights = [part.W_dec_LO for part in self.parts]
        return self.parts[0].ops.grouped_decode(layers, weights, b_dec_O, first_S, self.n_layers * self.d_out)

    def encode_latents(self, x_BXiDi: Tensor) -> Latents:
        return concat_latents(self._encode_layers(x_BXiDi))

    def decode(self, latents: Latents | Tensor, x_BXiDi: Tensor | None = None) -> Tensor:
        latents, n_layers = checked_latents(latents, self.n_latents), len(self.parts)
        return self._decode_layers([layer_of_latents(latents, s, n_layers) for s in range(n_layers)], x_BXiDi)

    def forward_train(self, x_BXiDi: Tensor) -> ForwardResult:
        layers = self._encode_layers(x_BXiDi)
        return ForwardResult.of(self, x_BXiDi, concat_latents(layers), *layers)

    def decode_parts(self, latents_of_parts: Sequence[Latents], x_BXiDi: Tensor) -> Tensor:
        return self._decode_layers(latents_of_parts, x_BXiDi)

    def decode_prefixes(self, latents_of_parts: Sequence[Latents], x_BXiDi: Tensor, sizes: Sequence[int]) -> Tensor:
        sizes_of_part = [size // len(self.parts) for size in sizes]
        outputs = []
        for source, (part, latents) in enumerate(zip(self.parts, latents_of_parts, strict=True)):
            y_BSPD = part.decode_prefixes([latents], x_BXiDi[:, source], sizes_of_part)
            outputs.append(nn.functional.pad(y_BSPD, (0, 0, *self._padding(source))))
        y_BSPD = torch.stack(outputs).sum(0)
        return y_BSPD if self.b_dec_XoDo is None else y_BSPD + self.b_dec_XoDo

    def recon_loss(self, latents_of_parts: Sequence[Latents], x_BXiDi: Tensor, target_BXoDo: Tensor) -> ReconLoss:
        y_BO, target_BO = self._decode_layers(latents_of_parts, x_BXiDi).flatten(1), target_BXoDo.flatten(1)
        return self.ops.recon_loss(y_BO, target_BO, self.segments)

    def dead_recon_loss(self, x_BXiDi: Tensor, dead_mask_L: Tensor, k: int, residual_BO: Tensor) -> Tensor:
        masks = dead_mask_L.chunk(len(self.parts))
        k_layer = min(k, self.parts[0].n_latents)
        layers = [
            part.dead_latents(x_BXiDi[:, source], mask_L, k_layer)
            for source, (part, mask_L) in enumerate(zip(self.parts, masks, strict=True))
        ]
        if len(layers) > 1:
            layers = keep_largest(layers, k, None, over_batch=False)
        y_BO = self._grouped(layers, None).to(residual_BO.dtype)
        return self.ops.recon_loss(y_BO, -residual_BO, [y_BO.shape[1]]).loss

    @torch.no_grad()
    def after_step(self, latents: Latents) -> None:
        for source, part in enumerate(self.parts):
            activation = part.activation_fn
            if self.selects_over_parts:
                # One selection over all layers has one threshold: every layer tracks the same statistic.
                n_L = self.ranking_norms_L() if activation.uses_decoder_norms else None
                activation.after_step(latents, n_L)
            else:
                part.after_step(layer_of_latents(latents, source, len(self.parts)))

    # ---- norms, folding, initialisation

    def decoder_norms(self) -> DecoderNorms:
        norms = [part.decoder_norms() for part in self.parts]
        norms_LX = [nn.functional.pad(norm.norms_LX, self._padding(source)) for source, norm in enumerate(norms)]
        return DecoderNorms(torch.cat(norms_LX), torch.cat([norm.n_L for norm in norms]))

    def scale_weights_(self, scaling_in_Xi: Tensor, scaling_out_Xo: Tensor) -> None:
        for source, part in enumerate(self.parts):
            part.fold_activation_scaling_into_weights_(scaling_in_Xi[source], scaling_out_Xo[self._outputs(source)])
        if self.b_dec_XoDo is not None:
            self.b_dec_XoDo.div_(scaling_out_Xo[:, None])

    def init_weights(self, strategy: InitStrategy, seed: int = 0, samples: SampleBatches | None = None) -> Self:
        """Each source layer is initialised as a cross-layer transcoder, unless the strategy knows compound models."""
        if strategy.takes_compound:
            return super().init_weights(strategy, seed, samples)
        for source, part in enumerate(self.parts):
            part_samples = None if samples is None else self._samples_of(source, samples)
            part.init_weights(strategy, derived_seed(seed, source, base=len(self.parts)), part_samples)
        strategy.init_output_bias(self, samples)
        return self

    def _samples_of(self, source: int, samples: SampleBatches) -> SampleBatches:
        def of_source():
            for input_BPD, target_BPD in samples():
                yield input_BPD[:, source], target_BPD[:, self._outputs(source)]

        return of_source
