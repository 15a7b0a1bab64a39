"""Gemma Scope 1 (`params.npz`) and 2 (`params.safetensors`, CLTs as `params_layer_{i}.safetensors`), to import.

`W_enc [D, L]`, `W_dec [L, D]` (CLT `[L, P, D]`), `threshold [L]`, `affine_skip_connection [Di, Do]`; JumpReLU throughout.

Axes: Di/Do widths · L latents · P layers.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import torch

from crosscode.config.registry import ConfigModel
from crosscode.interop.format import FORMATS, Format, Tensors, cannot, known, peek, read_tensors
from crosscode.interop.plain import COMPOUND, SINGLE, PlainCoder, PlainPart

_LAYERS = re.compile(r"(?:params_)?layer_(\d+)\.safetensors")
_SITES = {
    "transcoder": ("mlp.hook_in", "hook_mlp_out"),
    "resid_post": ("hook_resid_post",),
    "mlp_out": ("hook_mlp_out",),
    "attn_out": ("attn.hook_z",),
    "pt-res": ("hook_resid_post",),
    "it-res": ("hook_resid_post",),
    "pt-mlp": ("hook_mlp_out",),
    "it-mlp": ("hook_mlp_out",),
    "pt-att": ("attn.hook_z",),
    "it-att": ("attn.hook_z",),
}
"""Parts of the folders' names, and the hookpoints that they stand for"""


@FORMATS.register
class GemmaScope(Format):
    """SAEs and transcoders of Gemma Scope 1; of 2 also with a skip, and cross-layer transcoders. A negative threshold is as
    good as 0: they take `relu(h) * 1[h > threshold]`."""

    class Config(ConfigModel):
        type: Literal["gemma-scope"] = "gemma-scope"

    writes = False

    def recognises(self, path: Path) -> bool:
        return _file(path) is not None or bool(_layer_files(path))

    def read(self, path: Path) -> list[PlainCoder]:
        file = _file(path)
        if file is not None:
            return [_single(file)]
        files = _layer_files(path)
        if not files:
            cannot(path, "no params.npz, params.safetensors or params_layer_0.safetensors there")
        return [_clt(path, files)]


def _file(path: Path) -> Path | None:
    candidates = [path] if path.is_file() else [path / "params.npz", path / "params.safetensors"]
    return next(
        (file for file in candidates if file.is_file() and file.name in ("params.npz", "params.safetensors")), None
    )


def _layer_files(path: Path) -> dict[int, Path]:
    """Only names that circuit-tracer's files do not have: those hold `layer_{i}` with capital names inside."""
    if not path.is_dir() or (path / "config.yaml").is_file():
        return {}
    found = {file: _LAYERS.fullmatch(file.name) for file in path.iterdir() if file.name.startswith("params_")}
    return {int(match[1]): file for file, match in found.items() if match}


def _named(tensors: Tensors) -> Tensors:
    """Both versions under the names of the first."""
    return {name.replace("w_", "W_", 1) if name.startswith("w_") else name: tensor for name, tensor in tensors.items()}


def _part(file: Path) -> tuple[PlainPart, Tensors]:
    tensors = _named(read_tensors(file, "b_enc", "b_dec", "threshold"))
    for name in ("W_enc", "W_dec"):
        if name not in tensors:
            cannot(file, f"lacks {name}")
    scale = tensors.get("scaling_factor")
    if scale is not None and not torch.allclose(scale, torch.ones_like(scale)):
        cannot(file, "has a scaling_factor that is not 1, which no latent of ours has")
    part = PlainPart(
        tensors["W_enc"].T, tensors["W_dec"], tensors["b_enc"], {"type": "jumprelu"}, tensors["threshold"].clamp(min=0)
    )
    return part, tensors


def _single(file: Path) -> PlainCoder:
    part, tensors = _part(file)
    if part.W_dec_LXoDo.ndim != 2:
        cannot(file, "is one layer of a cross-layer transcoder; name the folder of all its layers")
    skip = tensors.get("affine_skip_connection")
    part = PlainPart(part.W_enc_LXiDi, part.W_dec_LXoDo, part.b_enc_L, part.activation, part.theta_L, skip)
    return PlainCoder(SINGLE, (part,), tensors["b_dec"], metadata=_metadata(file, has_skip=skip is not None))


def _metadata(file: Path, *, has_skip: bool) -> dict[str, Any]:
    """What the names of the folders and the config beside the file say."""
    names, config = file.resolve().as_posix(), peek(file.parent / "config.json")
    layer = re.search(r"layer_(\d+)", names)
    site = next((hooks for part, hooks in _SITES.items() if part in names), ())
    hooks = [f"blocks.{layer[1]}.{hook}" for hook in site] if layer else []
    is_transcoder = len(site) == 2 or has_skip
    model = config.get("model_name")
    return known("transcoder" if is_transcoder else "sae", model and str(model).replace("-v3", "-3"), *hooks)


def _clt(path: Path, files: dict[int, Path]) -> PlainCoder:
    n_layers = len(files)
    if sorted(files) != list(range(n_layers)):
        cannot(
            path, f"layers {', '.join(map(str, sorted(files)))} are there; a cross-layer transcoder has all from 0 on"
        )
    parts, biases_PD = [], []
    for layer in range(n_layers):
        part, tensors = _part(files[layer])
        W_dec_LPD = part.W_dec_LXoDo
        if W_dec_LPD.ndim != 3 or W_dec_LPD.shape[1] != n_layers:
            cannot(files[layer], f"W_dec has shape {tuple(W_dec_LPD.shape)}; expected (latents, {n_layers}, width)")
        if bool(W_dec_LPD[:, :layer].any()):
            cannot(files[layer], f"writes to layers before its own, {layer}")
        skip_DPD = None
        if "affine_skip_connection" in tensors:  # of its own layer
            skip_DD = tensors["affine_skip_connection"]
            skip_DPD = torch.zeros(skip_DD.shape[0], n_layers - layer, skip_DD.shape[1])
            skip_DPD[:, 0] = skip_DD
        parts.append(
            PlainPart(part.W_enc_LXiDi, W_dec_LPD[:, layer:], part.b_enc_L, part.activation, part.theta_L, skip_DPD)
        )
        biases_PD.append(tensors["b_dec"])
    hooks = [f"blocks.{p}.{hook}" for hook in _SITES["transcoder"] for p in range(n_layers)]
    metadata = {"architecture": COMPOUND, "hookpoints": hooks}
    return PlainCoder(COMPOUND, tuple(parts), torch.stack(biases_PD), metadata=metadata)
