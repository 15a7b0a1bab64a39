"""A sparse coder as every library has one: what all formats are written from and read into.

Axes: Xi/Xo input/output crosscoding dims · Di/Do input/output width · L latents · P layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from crosscode.errors import InputError
from crosscode.models.activations.base import ACTIVATIONS
from crosscode.models.architecture import class_of_kind, split_for
from crosscode.models.base import BaseCrosscoder
from crosscode.models.coder import Coder
from crosscode.models.split import Split
from crosscode.widths import Widths

SINGLE, CROSSCODER, CLT, COMPOUND = (
    "sae_or_transcoder",
    "model_hookpoint_acausal",
    "cross_layer_transcoder",
    "compound_cross_layer_transcoder",
)
_OF_COMPOUND = ("own_layer", "later_layers", "topk_scope")


@dataclass(frozen=True)
class PlainPart:
    """`a = act(x . W_enc + b_enc)`, `y = a . W_dec + x . W_skip`, on raw activations, in float32.

    `activation` is the config of ours. `theta_L`: for those that keep what is above a threshold, that threshold of each latent;
    None: none, or not known yet. `theta_ranked`: of a BatchTopK, the one threshold of what it ranks.
    """

    W_enc_LXiDi: Tensor
    W_dec_LXoDo: Tensor
    b_enc_L: Tensor
    activation: Mapping[str, Any]
    theta_L: Tensor | None = None
    W_skip_XiDiXoDo: Tensor | None = None
    theta_ranked: Tensor | None = None

    @property
    def kind(self) -> str:
        """The type of the activation."""
        return self.activation["type"]

    @property
    def n_latents(self) -> int:
        return self.W_enc_LXiDi.shape[0]


@dataclass(frozen=True)
class PlainCoder:
    """One part, or for a compound model a part for each source layer; `y` of all parts and `b_dec` add up.

    `pre_bias`: `b_dec` is subtracted from `x` first. `metadata`: of the saved model, as far as it is known.
    """

    kind: str
    parts: tuple[PlainPart, ...]
    b_dec_XoDo: Tensor
    pre_bias: bool = False
    metadata: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    """what only a compound model has: `own_layer`, `later_layers`, `topk_scope`; `widths` of a crosscoder, where they differ"""
    decoder_norm: str | None = None
    scaling_Xo: Tensor | None = None
    """by what training multiplied the activations of each output position; folded in"""

    @property
    def part(self) -> PlainPart:
        """The only part."""
        (part,) = self.parts
        return part

    @property
    def d_in(self) -> int:
        return self.parts[0].W_enc_LXiDi.shape[-1]

    @property
    def d_out(self) -> int:
        return self.b_dec_XoDo.shape[-1]

    @property
    def widths(self) -> Widths:
        """Of the output positions, without padding."""
        return Widths.of(self.options.get("widths", ()), self.b_dec_XoDo.shape[:-1], self.d_out)

    @property
    def has_skip(self) -> bool:
        return any(part.W_skip_XiDiXoDo is not None for part in self.parts)

    def with_pre_bias(self, wanted: bool) -> PlainCoder:
        """The same function with `b_dec` subtracted from the input before encoding, or not."""
        if wanted == self.pre_bias:
            return self
        part, sign = self.part, 1 if wanted else -1
        shift_L = part.W_enc_LXiDi.double().flatten(1) @ self.b_dec_XoDo.double().flatten()
        b_enc_L = (part.b_enc_L.double() + sign * shift_L).float()
        return replace(self, parts=(replace(part, b_enc_L=b_enc_L),), pre_bias=wanted)

    # ---- where its activations come from

    @property
    def split(self) -> Split | None:
        """How it reads the activations of its hookpoints; None: unknown."""
        architecture = self.metadata.get("architecture")
        return None if architecture is None else split_for(architecture)

    @property
    def is_transcoder(self) -> bool:
        """Whether input and target are different hookpoints, as far as that is known."""
        if self.kind == CROSSCODER:
            return False
        return self.metadata.get("architecture", "transcoder" if self.has_skip else "sae") != "sae"

    def language_model(self, place: tuple[int, str] | None = None) -> Mapping[str, Any]:
        """What is known of the language model at a place (default: of the first)."""
        models = self.metadata.get("language_models") or []
        index = 0 if place is None else place[0]
        return models[index] if index < len(models) else {}

    @property
    def model_name(self) -> str | None:
        model = self.language_model(next(iter(self.inputs), None))
        return model.get("path") or model.get("name")

    @property
    def inputs(self) -> list[tuple[int, str]]:
        """`(model, hookpoint)` of each input position; empty: unknown."""
        return self._places(Split.input_places)

    @property
    def outputs(self) -> list[tuple[int, str]]:
        """`(model, hookpoint)` of each output position; empty: unknown."""
        return self._places(Split.output_places)

    def _places(self, places: Any) -> list[tuple[int, str]]:
        hookpoints, n_models = self.metadata.get("hookpoints") or [], len(self.metadata.get("language_models") or [])
        if self.split is None or not hookpoints or not n_models:
            return []
        return [(m, hookpoints[p]) for m, p in places(self.split, n_models, len(hookpoints))]


def metadata_of_one(coder: PlainCoder, output: int, source: int | None) -> dict[str, Any]:
    """Of one output position alone: those of a transcoder from an input position, or without a `source` of an SAE."""
    metadata = {**coder.metadata, "architecture": "sae" if source is None else "transcoder"}
    if names := metadata.get("output_positions"):
        metadata["output_positions"] = [names[output]]
    if coder.outputs:
        m, hook = coder.outputs[output]
        read = [] if source is None else [coder.inputs[source][1]]
        metadata["language_models"] = [metadata["language_models"][m]]
        metadata |= {
            "hookpoints": [*read, hook],
            "widths": [[*(coder.d_in for _ in read), coder.widths.flat_X[output]]],
        }
    return metadata


# ---- from and to models


@torch.no_grad()
def from_model(model: BaseCrosscoder) -> PlainCoder:
    """On the CPU; of a model on the meta device without thresholds.

    Raises:
        InputError: scaling is not folded in, weights were never filled, or a BatchTopK has no threshold yet.
    """
    is_meta = model.device.type == "meta"
    if not is_meta:
        model.check_initialised()
        if not model.is_folded:
            raise InputError(
                "export: the scaling of this model's activations is not folded in; load it from its run, or call "
                "model.fold_activation_scaling_into_weights_ (with ones, where activations were not scaled)"
            )
    norms_L = _ranking_norms(model)
    ranked = None if norms_L is None or is_meta else norms_L.split([part.n_latents for part in model.parts])
    parts = tuple(
        _part(part, None if ranked is None else ranked[i], is_meta=is_meta) for i, part in enumerate(model.parts)
    )
    b_dec = model.b_dec_XoDo
    scaling = model.folded_scaling_out_Xo
    return PlainCoder(
        kind=model.kind,
        parts=parts,
        b_dec_XoDo=torch.zeros(*model.out_dims, model.d_out) if b_dec is None else _plain(b_dec),
        pre_bias=model.use_pre_bias,
        metadata=dict(model.metadata),
        options={name: getattr(model, name) for name in model.own_arguments if name in _OF_COMPOUND}
        | model.widths.as_option(),
        decoder_norm=model.decoder_norm,
        scaling_Xo=None if scaling is None else _plain(scaling),
    )


def _ranking_norms(model: BaseCrosscoder) -> Tensor | None:
    """What latents are multiplied with to be ranked. A source layer ranks by norms of its own, unless k are kept over all
    of them; these are the same norms."""
    if not model.activation_fns[0].uses_decoder_norms:
        return None
    return torch.cat([part.ranking_norms_L() for part in model.parts])


def _part(part: Coder, n_L: Tensor | None, *, is_meta: bool) -> PlainPart:
    activation = part.activation_fn
    theta_L = None if is_meta else activation.cutoffs_L(n_L)
    theta_ranked = None if is_meta else activation.ranked_cutoff()
    b_enc = part.b_enc_L
    return PlainPart(
        W_enc_LXiDi=_plain(part.W_enc_LXiDi),
        W_dec_LXoDo=_plain(part.W_dec_LXoDo),
        b_enc_L=torch.zeros(part.n_latents) if b_enc is None else _plain(b_enc),
        activation=activation.config.model_dump(),
        theta_L=None if theta_L is None else _plain(theta_L),
        theta_ranked=None if theta_ranked is None else _plain(theta_ranked),
        W_skip_XiDiXoDo=None if part.W_skip_XiDiXoDo is None else _plain(part.W_skip_XiDiXoDo),
    )


def _plain(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().float()
    return (tensor if tensor.is_meta else tensor.cpu()).contiguous()


def _fill_(name: str, parameter: Tensor | None, value: Tensor) -> None:
    assert parameter is not None
    if parameter.shape != value.shape:
        raise InputError(f"{name} has shape {tuple(value.shape)}, expected {tuple(parameter.shape)}")
    if not bool(value.isfinite().all()):
        raise InputError(f"{name} holds NaN or infinity: the file is damaged, or its training went wrong")
    parameter.copy_(value)


@torch.no_grad()
def to_model(coder: PlainCoder) -> BaseCrosscoder:
    """A model that takes raw activations, in eval mode, on the CPU."""
    first = coder.parts[0]
    n_latents = sum(part.n_latents for part in coder.parts)
    in_dims, out_dims = first.W_enc_LXiDi.shape[1:-1], coder.b_dec_XoDo.shape[:-1]
    dims: dict[str, Any] = {"d_in": coder.d_in, "d_out": coder.d_out}
    if coder.kind == CROSSCODER:
        dims = {"n_models": in_dims[0], "n_hookpoints": in_dims[1], "d_model": coder.d_in}
    elif coder.kind == CLT:
        dims["n_out_hookpoints"] = out_dims[0]
    elif coder.kind == COMPOUND:
        dims["n_layers"] = out_dims[0]
    model: BaseCrosscoder = class_of_kind(coder.kind)(
        **dims,
        **coder.options,
        **({"use_pre_bias": True} if coder.pre_bias else {}),
        n_latents=n_latents,
        activation_fn=ACTIVATIONS.build(dict(first.activation), n_latents=n_latents),
        linear_skip=coder.has_skip,
        decoder_norm=coder.decoder_norm,
    )
    for plain, part in zip(coder.parts, model.parts, strict=True):
        _fill_("W_enc", part.W_enc_LXiDi, plain.W_enc_LXiDi)
        _fill_("W_dec", part.W_dec_LXoDo, plain.W_dec_LXoDo)
        _fill_("b_enc", part.b_enc_L, plain.b_enc_L)
        if part.W_skip_XiDiXoDo is not None:
            skip = plain.W_skip_XiDiXoDo
            _fill_("W_skip", part.W_skip_XiDiXoDo, torch.zeros_like(part.W_skip_XiDiXoDo) if skip is None else skip)
        theta = plain.theta_L if plain.theta_ranked is None else plain.theta_ranked
        if theta is not None:
            if theta.ndim and theta.shape != (plain.n_latents,):
                raise InputError(f"threshold has shape {tuple(theta.shape)}, expected ({plain.n_latents},)")
            if bool(theta.isnan().any()):
                raise InputError("threshold holds NaN: the file is damaged, or its training went wrong")
            part.activation_fn.set_cutoffs_(theta)
    _fill_("b_dec", model.b_dec_XoDo, coder.b_dec_XoDo)
    for part in {model, *model.parts}:
        part.folded_scaling_in_Xi, part.folded_scaling_out_Xo = torch.ones(part.in_dims), torch.ones(part.out_dims)
    if coder.scaling_Xo is not None:
        model.folded_scaling_out_Xo = coder.scaling_Xo
    model.metadata = coder.metadata
    model.position_names = tuple(coder.metadata.get("output_positions") or ())
    return model.eval()
