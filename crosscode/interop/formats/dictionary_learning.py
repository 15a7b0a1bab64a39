"""dictionary_learning: SAEs as `ae.pt` and `config.json`, crosscoders as `model.safetensors` and `config.json`.

SAEs: `encoder.weight [L, D]`, `decoder.weight [D, L]`. Crosscoders, as science-of-finetuning and diffing-toolkit read them:
`encoder.weight [X, D, L]`, `decoder.weight [X, L, D]`, X the positions.

Axes: M models · P hookpoints · X = M x P · D width · L latents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from crosscode.config.hookpoints import layer_of
from crosscode.config.registry import ConfigModel
from crosscode.files import write_json
from crosscode.interop.format import (
    FORMATS,
    Format,
    Tensors,
    cannot,
    known,
    peek,
    read_object,
    read_tensors,
    several_parts,
    single,
    write_tensors,
)
from crosscode.interop.plain import CROSSCODER, SINGLE, PlainCoder, PlainPart

CONFIG, SAE_WEIGHTS, CROSSCODER_WEIGHTS = "config.json", "ae.pt", "model.safetensors"
_SAES = {
    "relu": "AutoEncoderNew",
    "topk": "AutoEncoderTopK",
    "batch_topk": "BatchTopKSAE",
    "jumprelu": "JumpReluAutoEncoder",
}
_NORMS = {"sum": (1, "CROSSCODER"), "joint": (2, "SAE"), None: (4, "NONE")}
"""`code_normalization_id`, by which norm a BatchTopK ranks"""
_EPSILON = 1e-8
"""which it adds to the scaling of a crosscoder's position before it divides the output by it"""


@FORMATS.register
class DictionaryLearning(Format):
    """SAEs with any activation but GroupMax; crosscoders with ReLU or BatchTopK."""

    class Config(ConfigModel):
        type: Literal["dictionary-learning"] = "dictionary-learning"

    index = CONFIG
    files = r"config\.json|ae\.pt|model\.safetensors"

    def refusal(self, coders: Sequence[PlainCoder], *, complete: bool = True) -> str | None:
        (coder,) = coders
        kind = coder.parts[0].kind
        if coder.kind == CROSSCODER:
            return _crosscoder_problem(coder)
        if coder.has_skip or coder.is_transcoder or coder.d_in != coder.d_out:
            return "it has SAEs and crosscoders, no transcoder and no skip; take saelens, sparsify or circuit-tracer"
        several = several_parts(coder)
        if several:
            return several
        if kind not in _SAES:
            return f"it has no {kind}; sparsify holds it"
        return None

    def write(self, coders: Sequence[PlainCoder], folder: Path) -> None:
        (coder,) = coders
        if coder.kind == CROSSCODER:
            _write_crosscoder(coder, folder)
        else:
            _write_sae(coder, folder)

    def recognises(self, path: Path) -> bool:
        config = peek(path / CONFIG)
        if "dict_class" in config:
            return (path / CROSSCODER_WEIGHTS).is_file()
        trainer = config.get("trainer")
        return isinstance(trainer, dict) and "dict_class" in trainer and (path / SAE_WEIGHTS).is_file()

    def read(self, path: Path) -> list[PlainCoder]:
        config = read_object(path / CONFIG)
        trainer = config.get("trainer") or {}
        name = config.get("dict_class") or trainer.get("dict_class") or "nothing"
        file = next((path / each for each in (CROSSCODER_WEIGHTS, SAE_WEIGHTS) if (path / each).is_file()), None)
        if file is None:
            cannot(path, f"holds neither {SAE_WEIGHTS} nor {CROSSCODER_WEIGHTS}")
        tensors = read_tensors(file)
        if name in ("CrossCoder", "BatchTopKCrossCoder"):
            return [_read_crosscoder(name, tensors, file)]
        read = _READ.get(name)
        if read is None:
            cannot(
                path,
                f"dict_class {name!r} is none of ours; read are {', '.join(_READ)}, CrossCoder, BatchTopKCrossCoder",
            )
        try:
            coder = read(tensors)
        except KeyError as error:
            cannot(file, f"lacks {error.args[0]} of a {name}")
        return [replace(coder, metadata=_sae_metadata(trainer))]


# ---- SAEs


def _write_sae(coder: PlainCoder, folder: Path) -> None:
    kind = _sae_kind(coder.part)
    coder = coder.with_pre_bias(kind in ("topk", "batch_topk"))
    part = coder.part
    W_enc_LD, W_dec_LD, b_dec_D, _ = single(coder)
    if kind == "jumprelu":
        assert part.theta_L is not None
        tensors = {
            "W_enc": W_enc_LD.T,
            "b_enc": part.b_enc_L,
            "W_dec": W_dec_LD,
            "b_dec": b_dec_D,
            "threshold": part.theta_L,
        }
    else:
        bias = "decoder.bias" if kind == "relu" else "b_dec"
        tensors = {
            "encoder.weight": W_enc_LD,
            "encoder.bias": part.b_enc_L,
            "decoder.weight": W_dec_LD.T,
            bias: b_dec_D,
        }
    facts: dict[str, Any] = {}
    if kind in ("topk", "batch_topk"):
        facts["k"] = part.activation["k"]
        theta = torch.tensor(-1.0) if part.theta_ranked is None else part.theta_ranked
        tensors |= {"k": torch.tensor(facts["k"], dtype=torch.int32), "threshold": theta}
    hookpoint = coder.inputs[0][1] if coder.inputs else None
    trainer = {
        "dict_class": _SAES[kind],
        "activation_dim": coder.d_in,
        "dict_size": part.n_latents,
        **facts,
        "lm_name": coder.model_name,
        "layer": None if hookpoint is None else layer_of(hookpoint),
        "submodule_name": hookpoint,
    }
    write_tensors(folder / SAE_WEIGHTS, tensors)
    write_json(folder / CONFIG, {"trainer": trainer, "buffer": {}})


def _sae_kind(part: PlainPart) -> str:
    """A BatchTopK that ranks by decoder norms has a threshold for each latent."""
    return "jumprelu" if part.activation.get("rank_by") == "decoder_norm_weighted" else part.kind


def _sae_metadata(trainer: dict[str, Any]) -> dict[str, Any]:
    hookpoint = trainer.get("submodule_name")
    if hookpoint and layer_of(hookpoint) is None:
        hookpoint = None  # theirs is a short name of their own, such as resid_post_layer_3
    return known("sae", trainer.get("lm_name"), hookpoint)


def _linear(
    tensors: Tensors, activation: dict[str, Any], bias: str, theta: Any = None, *, pre_bias: bool
) -> PlainCoder:
    W_enc_LD, W_dec_LD = tensors["encoder.weight"], tensors["decoder.weight"].T
    part = PlainPart(W_enc_LD, W_dec_LD, tensors["encoder.bias"], activation, theta_ranked=theta)
    return PlainCoder(SINGLE, (part,), tensors[bias], pre_bias=pre_bias)


def _topk(tensors: Tensors) -> PlainCoder:
    return _linear(tensors, {"type": "topk", "k": int(tensors["k"])}, "b_dec", pre_bias=True)


def _batch_topk(tensors: Tensors) -> PlainCoder:
    activation = {"type": "batch_topk", "k": int(tensors["k"])}
    if "encoder.weight" in tensors:
        return _linear(tensors, activation, "b_dec", tensors["threshold"], pre_bias=True)
    weights = tensors["W_enc"].T, tensors["W_dec"], tensors["b_enc"]
    part = PlainPart(*weights, activation, theta_ranked=tensors["threshold"])
    return PlainCoder(SINGLE, (part,), tensors["b_dec"], pre_bias=True)


def _jumprelu(tensors: Tensors) -> PlainCoder:
    theta_L = tensors["threshold"].clamp(min=0)  # it is followed by a ReLU
    part = PlainPart(tensors["W_enc"].T, tensors["W_dec"], tensors["b_enc"], {"type": "jumprelu"}, theta_L)
    return PlainCoder(SINGLE, (part,), tensors["b_dec"])


_READ: dict[str, Callable[[Tensors], PlainCoder]] = {
    "AutoEncoder": lambda tensors: _linear(tensors, {"type": "relu"}, "bias", pre_bias=True),
    "AutoEncoderNew": lambda tensors: _linear(tensors, {"type": "relu"}, "decoder.bias", pre_bias=False),
    "AutoEncoderTopK": _topk,
    "BatchTopKSAE": _batch_topk,
    "MatryoshkaBatchTopKSAE": _batch_topk,
    "JumpReluAutoEncoder": _jumprelu,
}


# ---- crosscoders


def _crosscoder_problem(coder: PlainCoder) -> str | None:
    part = coder.part
    if coder.has_skip:
        return "it has no linear skip; train without crosscoder.linear_skip"
    if coder.widths.padded:
        return "its crosscoders have one width; export one model's part of it by --position"
    if part.kind not in ("relu", "batch_topk"):
        way = "`crosscode convert RUN --activation batch_topk`" if part.kind == "topk" else "train with batch_topk"
        return f"its crosscoders have ReLU and BatchTopK, not {part.kind}; {way}"
    return None


def _write_crosscoder(coder: PlainCoder, folder: Path) -> None:
    coder = coder.with_pre_bias(False)
    part, n_positions = coder.part, coder.b_dec_XoDo[..., 0].numel()
    is_ranked = part.activation.get("rank_by") == "decoder_norm_weighted"
    norm_id, norm = _NORMS[coder.decoder_norm if is_ranked or part.kind == "relu" else None]
    W_enc_LXD, W_dec_LXD, theta = part.W_enc_LXiDi.flatten(1, -2), part.W_dec_LXoDo.flatten(1, -2), part.theta_ranked
    b_dec_XD, s_X = coder.b_dec_XoDo.flatten(0, -2), torch.ones(n_positions)
    off_XD, mean_XD = torch.full((n_positions, coder.d_in), torch.nan), torch.full((n_positions, coder.d_in), torch.nan)
    if is_ranked and coder.scaling_Xo is not None and bool((coder.scaling_Xo != 1).any()):
        # It ranks by the norms that it sees: they must be those of training, so that the scaling stays outside. What is
        # compared is homogeneous in the scaling: all of it times one number, so that _EPSILON is nothing beside the least.
        s_X = coder.scaling_Xo.flatten()
        factor = torch.exp2((1 / s_X.min()).log2().ceil().clamp(min=0))
        s_X, theta = s_X * factor, None if theta is None else theta * factor
        W_enc_LXD, W_dec_LXD, b_dec_XD = W_enc_LXD / s_X[:, None], W_dec_LXD * s_X[:, None], b_dec_XD * s_X[:, None]
        off_XD, mean_XD = torch.ones_like(off_XD), torch.zeros_like(mean_XD)
    tensors = {
        "encoder.weight": W_enc_LXD.permute(1, 2, 0),
        "encoder.bias": part.b_enc_L,
        "decoder.weight": W_dec_LXD.permute(1, 0, 2),
        "decoder.bias": b_dec_XD,
        "code_normalization_id": torch.tensor(norm_id),
        "target_rms": torch.tensor(1.0),
        "activation_mean": mean_XD,
        "activation_std": off_XD,
        "activation_global_scale": s_X,
    }
    config: dict[str, Any] = {
        "dict_class": "CrossCoder" if part.kind == "relu" else "BatchTopKCrossCoder",
        "activation_dim": coder.d_in,
        "dict_size": part.n_latents,
        "num_layers": n_positions,
        "code_normalization": norm,
    }
    if part.kind != "relu":
        assert theta is not None
        config["k"] = part.activation["k"]
        tensors |= {"k": torch.tensor(config["k"], dtype=torch.int32), "threshold": theta}
    write_tensors(folder / CROSSCODER_WEIGHTS, tensors)
    write_json(folder / CONFIG, config)


def _read_crosscoder(name: str, tensors: Tensors, file: Path) -> PlainCoder:
    needed = {"encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"}
    needed |= set() if name == "CrossCoder" else {"k", "threshold"}
    if missing := sorted(needed - tensors.keys()):
        cannot(file, f"lacks {', '.join(missing)} of a {name}")
    norm_id = int(tensors.get("code_normalization_id", torch.tensor(1)))
    norms: dict[int, str | None] = {number: norm for norm, (number, _) in _NORMS.items()}
    W_enc_LXD, W_dec_LXD = tensors["encoder.weight"].permute(2, 0, 1), tensors["decoder.weight"].permute(1, 0, 2)
    b_enc_L, b_dec_XD, s_X = tensors["encoder.bias"], tensors["decoder.bias"], None
    mean_XD, std_XD = tensors.get("activation_mean"), tensors.get("activation_std")
    if mean_XD is not None and std_XD is not None and not bool((mean_XD.isnan() | std_XD.isnan()).any()):
        W_enc_LXD = W_enc_LXD * tensors["activation_global_scale"][:, None]
        b_enc_L = b_enc_L - torch.einsum("lxd,xd->l", W_enc_LXD, mean_XD)
        s_X = tensors["activation_global_scale"] + _EPSILON
        W_dec_LXD, b_dec_XD = W_dec_LXD / s_X[:, None], b_dec_XD / s_X[:, None] + mean_XD
        s_X = s_X[:, None]
    activation: dict[str, Any] = {"type": "relu"}
    if name == "BatchTopKCrossCoder":
        if norm_id not in norms:
            cannot(file, f"code_normalization_id = {norm_id}: read are 1 (CROSSCODER), 2 (SAE) and 4 (NONE)")
        rank_by = "activation" if norms[norm_id] is None else "decoder_norm_weighted"
        activation = {"type": "batch_topk", "k": int(tensors["k"]), "rank_by": rank_by}
    theta = tensors.get("threshold")
    part = PlainPart(W_enc_LXD[:, :, None], W_dec_LXD[:, :, None], b_enc_L, activation, theta_ranked=theta)
    return PlainCoder(
        CROSSCODER,
        (part,),
        b_dec_XD[:, None],
        metadata={"architecture": CROSSCODER},
        decoder_norm=norms.get(norm_id) or "sum",
        scaling_Xo=s_X,
    )
