"""SAELens 6: `cfg.json` and `sae_weights.safetensors` (`W_enc [D, L]`, `W_dec [L, D]`, `threshold [L]`, `W_skip [Do, Di]`).

Axes: Di/Do widths · L latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from crosscode.config.registry import ConfigModel
from crosscode.files import write_json
from crosscode.interop.format import (
    FORMATS,
    Format,
    cannot,
    instead_of,
    known,
    peek,
    read_object,
    read_tensors,
    several_parts,
    single,
    write_tensors,
)
from crosscode.interop.plain import SINGLE, PlainCoder, PlainPart

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
_SAES = {"relu": "standard", "topk": "topk", "jumprelu": "jumprelu", "batch_topk": "jumprelu"}
_TRANSCODERS = {"relu": "transcoder", "jumprelu": "jumprelu_transcoder", "batch_topk": "jumprelu_transcoder"}
_READ = {
    "standard": "relu",
    "topk": "topk",
    "jumprelu": "jumprelu",
    "transcoder": "relu",
    "skip_transcoder": "relu",
    "jumprelu_transcoder": "jumprelu",
    "jumprelu_skip_transcoder": "jumprelu",
}


@FORMATS.register
class SAELens(Format):
    """SAEs and transcoders. BatchTopK goes out as JumpReLU, as SAELens itself saves it."""

    class Config(ConfigModel):
        type: Literal["saelens"] = "saelens"

    index = CONFIG
    files = r"cfg\.json|sae_weights\.safetensors"

    def refusal(self, coders: Sequence[PlainCoder], *, complete: bool = True) -> str | None:
        (coder,) = coders
        several = several_parts(coder)
        if several:
            return several
        kind = coder.part.kind
        if _is_transcoder(coder) and kind not in _TRANSCODERS:
            return f"SAELens has no {kind} transcoder; {instead_of(kind)}"
        if kind not in _SAES:
            return f"SAELens has no {kind}; sparsify holds it, and finetune_from trains the weights on with another activation"
        return None

    def write(self, coders: Sequence[PlainCoder], folder: Path) -> None:
        (coder,) = coders
        is_transcoder = _is_transcoder(coder)
        if is_transcoder:
            coder = coder.with_pre_bias(False)
        part = coder.part
        W_enc_LD, W_dec_LD, b_dec_D, W_skip_DD = single(coder)
        tensors = {"W_enc": W_enc_LD.T, "b_enc": part.b_enc_L, "W_dec": W_dec_LD, "b_dec": b_dec_D}
        architecture = (_TRANSCODERS if is_transcoder else _SAES)[part.kind]
        if part.kind in ("jumprelu", "batch_topk"):
            assert part.theta_L is not None
            tensors["threshold"] = part.theta_L
        if W_skip_DD is not None:
            tensors["W_skip"] = W_skip_DD.T
            architecture = architecture.replace("transcoder", "skip_transcoder")
        config: dict[str, Any] = {
            "architecture": architecture,
            "d_in": coder.d_in,
            "d_sae": part.n_latents,
            "dtype": "float32",
            "device": "cpu",
            "apply_b_dec_to_input": coder.pre_bias,
            "normalize_activations": "none",
            "reshape_activations": "none",
            "metadata": _metadata(coder),
        }
        if is_transcoder:
            config["d_out"] = coder.d_out
        if part.kind == "topk":
            config |= {"k": part.activation["k"], "rescale_acts_by_decoder_norm": False}
        write_tensors(folder / WEIGHTS, tensors)
        write_json(folder / CONFIG, config)

    def recognises(self, path: Path) -> bool:
        return (path / WEIGHTS).is_file() and "architecture" in peek(path / CONFIG)

    def read(self, path: Path) -> list[PlainCoder]:
        config = read_object(path / CONFIG)
        architecture, facts = config["architecture"], {**config, **(config.get("metadata") or {})}
        if architecture not in _READ:
            cannot(path, f"architecture {architecture!r} is none of ours; read are {', '.join(_READ)}")
        for name in ("normalize_activations", "reshape_activations"):
            if config.get(name, "none") not in (None, "none"):
                cannot(
                    path, f"{name} = {config[name]!r}: fold it into the weights in SAELens first (fold_activation_...)"
                )
        tensors = read_tensors(path / WEIGHTS, "W_enc", "b_enc", "W_dec", "b_dec")
        for name in ("scaling_factor", "finetuning_scaling_factor"):
            if name in tensors and not bool((tensors[name] == 1).all()):
                cannot(path, f"has {name}, by which SAELens multiplies latents; fold it into W_dec first")
        kind = _READ[architecture]
        W_enc_LD, W_dec_LD, b_enc_L = tensors["W_enc"].T, tensors["W_dec"], tensors["b_enc"]
        activation: dict[str, Any] = {"type": kind}
        if kind == "topk":
            k = config.get("k", (config.get("activation_fn_kwargs") or {}).get("k"))
            if not isinstance(k, int):
                cannot(path, "names no k of its TopK")
            activation["k"] = k
            if config.get("rescale_acts_by_decoder_norm"):  # what is ranked is the latent times its decoder norm
                n_L = W_dec_LD.norm(dim=1)
                W_enc_LD, b_enc_L = W_enc_LD * n_L[:, None], b_enc_L * n_L
                W_dec_LD = torch.where(n_L[:, None] > 0, W_dec_LD / n_L[:, None], W_dec_LD)
        skip = tensors.get("W_skip")
        part = PlainPart(
            W_enc_LD, W_dec_LD, b_enc_L, activation, tensors.get("threshold"), None if skip is None else skip.T
        )
        is_transcoder = "transcoder" in architecture
        hooks = [facts.get("hook_name"), *([facts.get("hook_name_out")] if is_transcoder else [])]
        metadata = known("transcoder" if is_transcoder else "sae", facts.get("model_name"), *hooks)
        coder = PlainCoder(SINGLE, (part,), tensors["b_dec"], metadata=metadata)
        return [replace(coder, pre_bias=bool(config.get("apply_b_dec_to_input", True)) and not is_transcoder)]


def _is_transcoder(coder: PlainCoder) -> bool:
    """Whether one is written: SAEs of SAELens have no skip, and equal widths."""
    return coder.is_transcoder or coder.has_skip or coder.d_in != coder.d_out


def _metadata(coder: PlainCoder) -> dict[str, Any]:
    found: dict[str, Any] = {"sae_lens_version": "6.0.0", "model_name": coder.model_name}
    if coder.inputs:
        found["hook_name"] = coder.inputs[0][1]
        if coder.is_transcoder:
            found["hook_name_out"] = coder.outputs[0][1]
    data = (coder.metadata.get("config") or {}).get("data") or {}
    if "sequence_length" in data:
        found |= {"context_size": data["sequence_length"], "prepend_bos": data.get("bos", "sequence") != "none"}
        if not data.get("keep_first_position", False):
            found["seqpos_slice"] = [1, None]
    return {name: value for name, value in found.items() if value is not None}
