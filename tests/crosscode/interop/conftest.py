"""Models with awkward values, of every architecture that somebody may want to export.

Axes: B tokens · Xi/Xo input/output crosscoding dims · L latents.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from crosscode.models import (
    ACTIVATIONS,
    BaseCrosscoder,
    CompoundCrossLayerTranscoder,
    CrossLayerTranscoder,
    ModelHookpointAcausalCrosscoder,
    SAEOrTranscoder,
)

N_LATENTS, D = 24, 5
IN_OUT = ["blocks.0.mlp.hook_in", "blocks.0.hook_mlp_out"]
LAYERS = [f"blocks.{p}.{hook}" for hook in ("mlp.hook_in", "hook_mlp_out") for p in range(3)]
RESID = ["blocks.0.hook_resid_post"]


@dataclass(frozen=True)
class Architecture:
    make: Callable[..., BaseCrosscoder]
    type: str
    hookpoints: list[str]
    n_models: int = 1
    n_layers: int = 1


def _sae(**own):
    return lambda *a, **o: SAEOrTranscoder(
        D, own.get("d_out", D), *a, **{k: v for k, v in own.items() if k != "d_out"}, **o
    )


def _crosscoder(M, P, **own):
    return lambda *a, **o: ModelHookpointAcausalCrosscoder(M, P, D, *a, **own, **o)


def _clt(P, **own):
    return lambda *a, **o: CrossLayerTranscoder(P, D, D, *a, **own, **o)


def _compound(**own):
    return lambda *a, **o: CompoundCrossLayerTranscoder(3, D, D, *a, **own, **o)


ACAUSAL, CLT, COMPOUND = "model_hookpoint_acausal", "cross_layer_transcoder", "compound_cross_layer_transcoder"
ARCHITECTURES = {
    "sae": Architecture(_sae(), "sae", RESID),
    "sae_pre_bias": Architecture(_sae(use_pre_bias=True), "sae", RESID),
    "sae_without_biases": Architecture(_sae(use_encoder_bias=False, use_decoder_bias=False), "sae", RESID),
    "transcoder": Architecture(_sae(), "transcoder", IN_OUT),
    "transcoder_pre_bias": Architecture(_sae(use_pre_bias=True), "transcoder", IN_OUT),
    "skip_transcoder": Architecture(_sae(linear_skip=True), "transcoder", IN_OUT),
    "wide_skip_transcoder": Architecture(_sae(d_out=7, linear_skip=True), "transcoder", IN_OUT),
    "crosscoder_1x1": Architecture(_crosscoder(1, 1), ACAUSAL, RESID),
    "crosscoder_2x1": Architecture(_crosscoder(2, 1), ACAUSAL, RESID, 2),
    "crosscoder_2x1_pre_bias": Architecture(_crosscoder(2, 1, use_pre_bias=True), ACAUSAL, RESID, 2),
    "crosscoder_2x1_shared": Architecture(_crosscoder(2, 1, n_shared_latents=6), ACAUSAL, RESID, 2),
    "crosscoder_2x3": Architecture(_crosscoder(2, 3, decoder_norm="joint"), ACAUSAL, LAYERS[3:], 2, 3),
    "crosscoder_skip": Architecture(_crosscoder(2, 1, linear_skip=True), ACAUSAL, RESID, 2),
    "crosscoder_widths": Architecture(_crosscoder(2, 1, widths=[[D], [3]]), ACAUSAL, RESID, 2),
    "clt_to_one": Architecture(_clt(1, linear_skip=True), CLT, IN_OUT),
    "clt": Architecture(_clt(3), CLT, [LAYERS[0], *LAYERS[3:]], 1, 3),
    "compound": Architecture(_compound(), COMPOUND, LAYERS, 1, 3),
    "compound_skip": Architecture(_compound(linear_skip=True), COMPOUND, LAYERS, 1, 3),
    "set": Architecture(_compound(later_layers=False), COMPOUND, LAYERS, 1, 3),
    "set_skip": Architecture(_compound(later_layers=False, linear_skip=True), COMPOUND, LAYERS, 1, 3),
    "compound_later_only": Architecture(_compound(own_layer=False), COMPOUND, LAYERS, 1, 3),
}
ACTIVATION_CONFIGS = {
    "relu": {"type": "relu"},
    "topk": {"type": "topk", "k": 4},
    "batch_topk": {"type": "batch_topk", "k": 4},
    "batch_topk_by_norm": {"type": "batch_topk", "k": 4, "rank_by": "decoder_norm_weighted"},
    "groupmax": {"type": "groupmax", "k": 4},
    "jumprelu": {"type": "jumprelu", "log_threshold_init": -1.5},
}


@dataclass(frozen=True)
class Exported:
    """A folded model, and raw activations for it."""

    model: BaseCrosscoder
    raw_BXiDi: Tensor

    def expected(self) -> tuple[Tensor, Tensor]:
        """Latents and outputs."""
        return self.model.encode(self.raw_BXiDi), self.model(self.raw_BXiDi)


@pytest.fixture
def awkward(randomise):
    """`awkward(architecture, activation, hookpoints=..., scaled=..., seed=...)`: zero decoder vectors, dead latents,
    thresholds far below 1, scaling that differs by position; `scaled` a number: from that on down to a thousandth of it."""

    @torch.no_grad()
    def make(architecture, activation, *, hookpoints=None, scaled=True, seed=0, n_layers=None):
        torch.set_num_threads(1)
        kind = ARCHITECTURES[architecture]
        config = dict(ACTIVATION_CONFIGS[activation])
        activation_fn = ACTIVATIONS[config.pop("type")](**config, n_latents=N_LATENTS)
        model = randomise(kind.make(N_LATENTS, activation_fn, backend="torch"), seed)
        for part in model.parts:
            part.W_dec_LXoDo[0] = 0
            if part.b_enc_L is not None:
                part.b_enc_L[1] = -100
            thresholds = part.activation_fn.log_thresholds_L()
            if thresholds is not None:
                thresholds[2] = -200  # a threshold of 0 in float32
        generator = torch.Generator().manual_seed(seed + 1)
        scaled_BXiDi = torch.randn((40, *model.in_dims, model.d_in), generator=generator)
        for _ in range(2):
            model.after_step(model.forward_train(scaled_BXiDi).latents)
        s_in, s_out = torch.ones(model.in_dims), torch.ones(model.out_dims)
        if scaled:
            s_in = torch.rand(model.in_dims, generator=generator) * 3 + 0.2
            if scaled is not True:
                s_in = scaled * 10 ** -torch.linspace(0, 3, s_in.numel()).reshape(s_in.shape)
            same = model.in_dims == model.out_dims
            s_out = s_in if same else torch.rand(model.out_dims, generator=generator) * 3 + 0.2
        model.fold_activation_scaling_into_weights_(s_in, s_out)
        names = ["base", "tuned"][: kind.n_models]
        hookpoints = hookpoints or kind.hookpoints
        n_layers = kind.n_layers if n_layers is None else n_layers
        facts = {"class": "LlamaForCausalLM", "n_layers": n_layers}
        model.metadata = {
            "language_models": [{"path": f"somebody/{name}", "name": name, **facts} for name in names],
            "hookpoints": hookpoints,
            "architecture": kind.type,
        }
        return Exported(model.eval(), scaled_BXiDi / s_in[..., None])

    return make
