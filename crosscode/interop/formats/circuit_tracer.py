"""circuit-tracer: transcoders of every layer as `layer_{i}.safetensors`, or a CLT as `W_enc_{i}` and `W_dec_{i}.safetensors`.

`W_enc [L, D]`, `W_dec [L, D]` (CLT `[L, P - i, D]`), `W_skip [Do, Di]`, thresholds linear; `config.yaml` beside them.

Axes: Di/Do widths · L latents of a layer · P layers.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from crosscode.config.hookpoints import layer_of
from crosscode.config.reading import dump_yaml, load_yaml
from crosscode.config.registry import ConfigModel
from crosscode.files import write_text
from crosscode.interop.circuit_tracer_names import HOOKS, hook_names, name_note, name_problem
from crosscode.interop.format import (
    FORMATS,
    Format,
    Tensors,
    cannot,
    instead_of,
    known,
    read_tensors,
    write_tensors,
)
from crosscode.interop.plain import COMPOUND, SINGLE, PlainCoder, PlainPart

log = logging.getLogger("crosscode")

CONFIG = "config.yaml"
_LAYER = re.compile(r"layer_(\d+)\.safetensors")
_THRESHOLD = "activation_function.threshold"
_ACTIVATIONS = ("relu", "jumprelu", "batch_topk")


@FORMATS.register
class CircuitTracer(Format):
    """Transcoders of all layers, or a compound cross-layer transcoder; ReLU or thresholds."""

    class Config(ConfigModel):
        type: Literal["circuit-tracer"] = "circuit-tracer"

    index = CONFIG
    files = r"config\.yaml|(layer|W_enc|W_dec)_\d+\.safetensors"
    takes_several = True

    def refusal(self, coders: Sequence[PlainCoder], *, complete: bool = True) -> str | None:
        found = next(filter(None, map(_problem_of_one, coders)), None)
        if found is None and any(coder.kind == COMPOUND for coder in coders) and len(coders) > 1:
            found = "a cross-layer transcoder is an export by itself; name it alone"
        return found or _problem_of_set(coders, complete=complete)

    def notes(self, coders: Sequence[PlainCoder]) -> list[str]:
        n_layers = coders[0].language_model().get("n_layers") or 0
        missing = sorted(set(range(n_layers)) - {layer for coder in coders for layer in _layers(coder)})
        found = [f"it wants all layers at once: still to train are {', '.join(map(str, missing))}"] if missing else []
        return [*found, *filter(None, [name_note(coders)])]

    def write(self, coders: Sequence[PlainCoder], folder: Path) -> None:
        is_clt = coders[0].kind == COMPOUND
        for file, tensors in (_clt_files(coders[0]) if is_clt else _layer_files(coders)).items():
            write_tensors(folder / f"{file}.safetensors", tensors)
        (hook_in,), (hook_out,) = hook_names(coders)
        config = {
            "model_name": coders[0].model_name,
            "model_kind": "cross_layer_transcoder" if is_clt else "transcoder_set",
            "feature_input_hook": hook_in,
            "feature_output_hook": hook_out,
            "scan": None,
        }
        write_text(folder / CONFIG, dump_yaml(config))

    def recognises(self, path: Path) -> bool:
        if path.is_file():
            return _LAYER.fullmatch(path.name) is not None
        return (path / "W_enc_0.safetensors").is_file() or any(map(_LAYER.fullmatch, _names(path)))

    def read(self, path: Path) -> list[PlainCoder]:
        folder = path.parent if path.is_file() else path
        config = _config(folder)
        if path.is_file():
            match = _LAYER.fullmatch(path.name)
            if match is None:
                cannot(path, "is not named layer_{i}.safetensors")
            return [_read_layer(path, int(match[1]), config)]
        if (path / "W_enc_0.safetensors").is_file():
            return [_read_clt(path, config)]
        layers = sorted(int(match[1]) for name in _names(path) if (match := _LAYER.fullmatch(name)))
        if not layers:
            cannot(path, "holds neither layer_{i}.safetensors nor W_enc_0.safetensors")
        return [_read_layer(path / f"layer_{layer}.safetensors", layer, config) for layer in layers]


def _names(path: Path) -> list[str]:
    return [file.name for file in path.iterdir()] if path.is_dir() else []


# ---- what can be held


def _problem_of_one(coder: PlainCoder) -> str | None:
    kind = coder.parts[0].kind
    if coder.kind not in (SINGLE, COMPOUND) or (coder.kind == SINGLE and not coder.is_transcoder):
        what = "an SAE" if coder.kind == SINGLE else f"a {coder.kind}"
        return (
            f"it has transcoders of every layer and compound cross-layer transcoders, not {what}; of a cross-layer "
            "transcoder one output position is a transcoder (--position)"
        )
    if kind not in _ACTIVATIONS:
        return f"it has ReLU and JumpReLU, and from a local folder no {kind}; {instead_of(kind)}"
    if coder.d_in != coder.d_out:
        return f"it has one width for input and output, not {coder.d_in} and {coder.d_out}; take saelens"
    if coder.kind == COMPOUND and coder.has_skip:
        return "its cross-layer transcoders are read without a skip; train without crosscoder.linear_skip"
    if coder.kind == COMPOUND and not coder.options.get("own_layer", True):
        return "its cross-layer transcoders write to their own layer, too; train with crosscoder.own_layer: true"
    if not coder.inputs:
        return "it needs layers and hookpoints, and this model does not know its own; set model.metadata (see docs/interop.md)"
    read, written = ([layer_of(hook) for _, hook in side] for side in (coder.inputs, coder.outputs))
    if read != written or (
        coder.kind == COMPOUND and read != sorted(read, key=lambda layer: -1 if layer is None else layer)
    ):
        return f"each transcoder reads and writes one layer, in order; these read {read} and write {written}; name hookpoints so"
    return None


def _problem_of_set(coders: Sequence[PlainCoder], *, complete: bool) -> str | None:
    for name, values in (
        ("n_latents", {part.n_latents for coder in coders for part in coder.parts}),
        ("width", {coder.d_in for coder in coders}),
        ("language model", {coder.model_name for coder in coders}),
    ):
        if len(values) > 1:
            return f"all layers have one {name}, and these have {', '.join(sorted(map(str, values)))}"
    if problem := name_problem(coders):
        return problem
    layers = sorted(layer for coder in coders for layer in _layers(coder))
    shown = ", ".join(map(str, layers))
    if len(set(layers)) < len(layers):
        return f"one transcoder for each layer, and these are of layers {shown}"
    is_clt = coders[0].kind == COMPOUND
    if not (complete or is_clt):
        return None
    n_layers = coders[0].language_model().get("n_layers") or len(layers)
    if layers != list(range(n_layers)):
        way = "name the hookpoints of every layer in the config" if is_clt else "give the runs of all layers at once"
        return f"it wants every layer from 0 to {max(n_layers, layers[-1] + 1) - 1}, and these are {shown}; {way}"
    return None


def _layers(coder: PlainCoder) -> list[int]:
    """The layers that it reads."""
    found = (layer_of(hook) for _, hook in coder.inputs)
    return [layer for layer in found if layer is not None]


# ---- files


def _layer_files(coders: Sequence[PlainCoder]) -> dict[str, Tensors]:
    has_skip = any(coder.has_skip for coder in coders)
    files: dict[str, Tensors] = {}
    for coder in (coder.with_pre_bias(False) for coder in coders):
        part = coder.part
        tensors = {
            "W_enc": part.W_enc_LXiDi,
            "W_dec": part.W_dec_LXoDo,
            "b_enc": part.b_enc_L,
            "b_dec": coder.b_dec_XoDo,
        }
        if has_skip:  # it asks the first layer whether all have one
            skip_DD = part.W_skip_XiDiXoDo
            tensors["W_skip"] = torch.zeros(coder.d_out, coder.d_in) if skip_DD is None else skip_DD.T
        if part.kind != "relu":
            assert part.theta_L is not None
            tensors[_THRESHOLD] = part.theta_L
        files[f"layer_{_layers(coder)[0]}"] = tensors
    return files


def _clt_files(coder: PlainCoder) -> dict[str, Tensors]:
    files: dict[str, Tensors] = {}
    for i, part in enumerate(coder.parts):
        encoder = {f"W_enc_{i}": part.W_enc_LXiDi, f"b_enc_{i}": part.b_enc_L, f"b_dec_{i}": coder.b_dec_XoDo[i]}
        if part.kind != "relu":
            assert part.theta_L is not None
            encoder[f"threshold_{i}"] = part.theta_L
        files |= {f"W_enc_{i}": encoder, f"W_dec_{i}": {f"W_dec_{i}": part.W_dec_LXoDo}}
    return files


def _config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG
    found = load_yaml(file.read_text(encoding="utf-8"), str(file)) if file.is_file() else {}
    if not isinstance(found, dict):
        cannot(file, "is no mapping of fields")
    return found


def _thresholded(theta: Tensor | None, path: Path) -> tuple[dict[str, Any], Tensor | None]:
    if theta is None:
        return {"type": "relu"}, None
    if bool((theta < 0).any()):
        cannot(path, "has negative thresholds, by which negative latents pass; ours are never negative")
    return {"type": "jumprelu"}, theta.flatten()


def _read_layer(file: Path, layer: int, config: dict[str, Any]) -> PlainCoder:
    tensors = read_tensors(file, "W_enc", "W_dec", "b_enc", "b_dec")
    activation, theta = _thresholded(tensors.get(_THRESHOLD), file)
    if config.get("activation") == "topk" and theta is None:
        activation = {"type": "topk", "k": config["k"]}
        log.warning("%s: TopK without a ReLU there; here a negative latent is never kept", file)
    skip = tensors.get("W_skip")
    part = PlainPart(
        tensors["W_enc"], tensors["W_dec"], tensors["b_enc"], activation, theta, None if skip is None else skip.T
    )
    hooks = [f"blocks.{layer}.{name}" for name in (config.get(key) for key in HOOKS) if name]
    metadata = known("transcoder", config.get("model_name"), *hooks)
    return PlainCoder(SINGLE, (part,), tensors["b_dec"], metadata=metadata)


def _read_clt(path: Path, config: dict[str, Any]) -> PlainCoder:
    parts, biases_PD = [], []
    while (path / f"W_enc_{len(parts)}.safetensors").is_file():
        i = len(parts)
        encoder = read_tensors(path / f"W_enc_{i}.safetensors", f"W_enc_{i}", f"b_enc_{i}", f"b_dec_{i}")
        decoder = read_tensors(path / f"W_dec_{i}.safetensors", f"W_dec_{i}")
        activation, theta = _thresholded(encoder.get(f"threshold_{i}"), path)
        parts.append(PlainPart(encoder[f"W_enc_{i}"], decoder[f"W_dec_{i}"], encoder[f"b_enc_{i}"], activation, theta))
        biases_PD.append(encoder[f"b_dec_{i}"])
    for i, part in enumerate(parts):
        if part.W_dec_LXoDo.ndim != 3 or part.W_dec_LXoDo.shape[1] != len(parts) - i:
            cannot(
                path,
                f"W_dec_{i} has shape {tuple(part.W_dec_LXoDo.shape)}; expected (latents, {len(parts) - i}, width)",
            )
    names = [config.get(key) for key in HOOKS]
    hooks = [f"blocks.{layer}.{name}" for name in names for layer in range(len(parts))] if all(names) else []
    metadata = known(COMPOUND, config.get("model_name"), *hooks)
    metadata = metadata | ({"output_positions": _output_names(metadata, hooks[len(parts) :])} if hooks else {})
    return replace(PlainCoder(COMPOUND, tuple(parts), torch.stack(biases_PD)), metadata=metadata)


def _output_names(metadata: dict[str, Any], hooks: Sequence[str]) -> list[str]:
    models = metadata.get("language_models") or [{"name": "model"}]
    return [f"{models[0]['name']}/{hook}" for hook in hooks]
